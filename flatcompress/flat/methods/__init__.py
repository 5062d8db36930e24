"""The flat-minima methods: each a row of `flatcompress.flat.methods.family.METHODS` over the engine."""

"""Quantizers: LSQ and its variants, and the Brevitas modules that carry them."""

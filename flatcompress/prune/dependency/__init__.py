"""Which channels hang together: axes followed through the network, coupled into groups."""

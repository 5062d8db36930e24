"""From a quantized module to an explicit integer graph: constants folded, BatchNorm folded, scales made plain."""

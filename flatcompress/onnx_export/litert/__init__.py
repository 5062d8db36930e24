"""LiteRT (TFLite) files of the lowered graph: the trained integers themselves, written without a converter."""

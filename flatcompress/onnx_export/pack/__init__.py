"""Weights at their true width, and the standard operators that unpack them when a runtime loads the file."""

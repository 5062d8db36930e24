"""Milliseconds of a network at any channel widths, from kernels and whole networks measured on this machine."""

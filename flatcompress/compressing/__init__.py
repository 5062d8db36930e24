"""`compress`: a trained network and some inputs in; a smaller verified file, and the recipe that repeats it, out."""

from flatcompress.compressing.command import Compressed, compress
from flatcompress.compressing.options import BITS, steps_for

__all__ = ["BITS", "Compressed", "compress", "steps_for"]

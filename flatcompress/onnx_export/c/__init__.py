"""C99 for microcontrollers out of a lowered graph: no allocation, no libm, and of integers every bit onnxruntime's.

`read` makes a program of the lowered graph or names the module that has no C form, `requantize` finds integers for
every scale and proves them for every sum the weights can reach, `plan` lays the tensors into one arena, `emit` writes
the folder, `model` compares it with onnxruntime. What lies between codes on real values is in `real` and `rows`. The
kernels are the C files in ``kernels/``.
"""

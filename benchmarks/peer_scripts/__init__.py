"""What a competent user of each library would write, one script a peer; `python -m benchmarks.peers` runs them.

Each is started as ``python -m benchmarks.peer_scripts.NAME --data DIR --out DIR --epochs N`` in its own environment,
reads the training and validation images and the starting network from DIR, and leaves ``model.onnx`` and
``made.json`` in OUT. It never sees a test image. The lines between ``# user code`` and ``# end`` count as the code
that a user of the library writes, with those of a training loop that the script imports.
"""

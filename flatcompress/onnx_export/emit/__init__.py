"""From the lowered graph to ONNX nodes, per profile."""

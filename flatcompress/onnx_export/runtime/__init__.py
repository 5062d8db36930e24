"""onnxruntime sessions and what they cost: latency, load time, time per kernel."""

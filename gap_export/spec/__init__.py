"""What a model is, what a bundle is, and GAP's arithmetic. No PyTorch, no ONNX."""

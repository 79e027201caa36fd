"""What runs the components of a model: ONNX Runtime and TensorRT behind one interface."""

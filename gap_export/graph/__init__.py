"""ONNX graphs: passes over them, and their lowerings for each runtime."""

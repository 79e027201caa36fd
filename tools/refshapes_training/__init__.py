"""Training of `refshapes-llava`, the demo model; for tools/train_refshapes.py alone."""

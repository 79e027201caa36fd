"""Accuracy: how well a model still grounds, on RefShapes, RefCOCO or images of one's own."""

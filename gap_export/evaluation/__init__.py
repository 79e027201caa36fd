"""Accuracy: how well a model still grounds, on RefShapes, RefCOCO or pictures of one's own."""

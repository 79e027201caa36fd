"""Pruners tried in PyTorch: the tower sees each image once, whatever is kept of it."""

"""A patched export beside the export it was made from: the masked oracle; no PyTorch."""

"""Readers of checkpoints, one file a layout, and what they share."""

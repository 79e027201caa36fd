"""The levels of a check: one file each, from what was recorded to a verdict."""

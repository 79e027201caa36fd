"""The levels of a check, each from what was recorded to a verdict."""

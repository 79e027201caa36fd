"""Inside a graph: its intermediate values, the ids that RoPE saw, where it begins to differ."""

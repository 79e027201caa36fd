"""What families share: the decoder, towers, projectors, pruned vision, and reading configs."""

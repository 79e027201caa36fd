"""Does the exported model compute what PyTorch computes? In tensors, in tokens and in boxes."""

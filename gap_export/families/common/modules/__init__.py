"""PyTorch modules that families are put together from."""

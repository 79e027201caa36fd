"""TensorRT: which GPUs, how engines are built for them, and what a built one says of itself.

Standard library, numpy and a TensorRT package alone, on Python 3.10: all of it runs on a device
that has nothing else.
"""

"""What tools/gpu_session.py does on a machine with a GPU, step by step."""

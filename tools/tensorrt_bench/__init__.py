"""What tools/bench_tensorrt.py measures, and how."""

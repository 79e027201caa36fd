"""Parts of ``tools/bench_rivals.py``."""

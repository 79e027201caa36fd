"""Parts of ``tools/bench_export.py``."""

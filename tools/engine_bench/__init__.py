"""Parts of tools/bench_engines.py."""

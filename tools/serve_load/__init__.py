"""Parts of tools/load_serve.py."""

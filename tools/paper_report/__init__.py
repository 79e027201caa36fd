"""Parts of tools/paper_table.py."""

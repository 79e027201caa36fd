"""The functions that ``import gap_export`` offers; the command line is a thin layer on them."""

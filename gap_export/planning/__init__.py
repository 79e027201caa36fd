"""Before any export: what fits a device, and how fast it will be."""

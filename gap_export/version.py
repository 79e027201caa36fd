"""The version, and where this gap-export may be installed from; known to everything."""

__version__ = "0.1.0"

# What pip is given where nothing is known of the running install: a checkout of the repository, or
# a wheel file of it. It is on no package index; there its name is anybody's to take, and whoever
# took it would run code on the machine of everybody who is told to "pip install" the bare name.
SOURCE = "PATH-TO-GAP-EXPORT"

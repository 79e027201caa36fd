"""Bundles behind HTTP: one application for uvicorn, tests and Ray Serve.

A request takes this way: ``gate`` (keys, limits, logs), ``routes`` or ``chat`` (bodies),
``decoders`` (the image, in a process that can be killed), ``waiting`` (the line before a model),
``worker`` (the thread that owns the session), and back. ``application`` puts these together.
"""

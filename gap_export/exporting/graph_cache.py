"""Graphs that several exports of one process share."""

from __future__ import annotations

from gap_export.spec.manifest import GraphSpec

_CacheKey = tuple[object, ...]


class GraphCache:
    """Graphs that do not depend on the pruning, kept between exports of one process.

    Only the vision encoder prunes: exports that differ in pruner or keep ratio share the rest.
    """

    def __init__(self) -> None:
        self._graphs: dict[_CacheKey, tuple[bytes, GraphSpec]] = {}

    def get(self, key: _CacheKey) -> tuple[bytes, GraphSpec] | None:
        """The bytes of an ONNX file and its description, if the key was met before."""
        return self._graphs.get(key)

    def put(self, key: _CacheKey, file: bytes, spec: GraphSpec) -> None:
        """Keep a graph."""
        self._graphs[key] = file, spec

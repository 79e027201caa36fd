"""Graph passes, one file each; :mod:`gap_export.graph.pipelines` has the order they run in."""

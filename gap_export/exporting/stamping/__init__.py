"""The graph of a deep stack of equal layers, from the trace of three of them.

Tracing takes a second or so for each layer of a transformer, and all layers but the first and the
last come out alike. So the first, the second and the last are traced. The second is the stamp for
all between, once it has been compared node by node with the last: that shows which of the values a
layer reads are its own, which are common to all layers, and which come from the layer before.
"""

from __future__ import annotations

from gap_export.exporting.stamping.shorten import is_stampable, shorten
from gap_export.exporting.stamping.stamp import stamp_layers

__all__ = ["is_stampable", "shorten", "stamp_layers"]

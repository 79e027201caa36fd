"""A checkpoint's tensors by reference: read one at a time, or never.

A tensor is a :class:`Weight`: bytes at an offset of a file, a tensor of an old PyTorch pickle, or
something computed from those. An export points into the files where it can and streams the rest
into one file of its own (:func:`store_weights`).
"""

from __future__ import annotations

from gap_export.checkpoint.weights.derived import (
    add,
    add_rows,
    cast,
    filled,
    merge_lora,
    random_normal,
    reshaped,
    rows,
)
from gap_export.checkpoint.weights.files import read_json_object, shard_files
from gap_export.checkpoint.weights.int8 import INT8_NAME, Int8Place, round_to_int8, store_int8
from gap_export.checkpoint.weights.pickled import (
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    PickledTensor,
    index_pickle,
    index_pickles,
)
from gap_export.checkpoint.weights.placing import PlacedTensor, place_reference, store_weights
from gap_export.checkpoint.weights.quantized import (
    QUANTIZED_NAME,
    QuantizedPlace,
    check_blocks,
    dequantize,
    quantize_columns,
    quantized_bytes,
    store_quantized,
)
from gap_export.checkpoint.weights.safetensors import (
    INDEX_NAME,
    WEIGHTS_NAME,
    TensorRef,
    index_checkpoint,
    index_files,
    read_header,
)
from gap_export.checkpoint.weights.weight import (
    FLOAT_DTYPES,
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    DerivedWeight,
    Weight,
)

__all__ = [
    "FLOAT_DTYPES",
    "INDEX_NAME",
    "INT8_NAME",
    "PICKLE_INDEX_NAME",
    "PICKLE_NAME",
    "QUANTIZED_NAME",
    "SAFETENSORS_NAMES",
    "TORCH_DTYPES",
    "WEIGHTS_NAME",
    "DerivedWeight",
    "Int8Place",
    "PickledTensor",
    "PlacedTensor",
    "QuantizedPlace",
    "TensorRef",
    "Weight",
    "add",
    "add_rows",
    "cast",
    "check_blocks",
    "dequantize",
    "filled",
    "index_checkpoint",
    "index_files",
    "index_pickle",
    "index_pickles",
    "merge_lora",
    "place_reference",
    "quantize_columns",
    "quantized_bytes",
    "random_normal",
    "read_header",
    "read_json_object",
    "reshaped",
    "round_to_int8",
    "rows",
    "shard_files",
    "store_int8",
    "store_quantized",
    "store_weights",
]

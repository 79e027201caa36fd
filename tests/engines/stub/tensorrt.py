"""Stands in for the full TensorRT 10.3 where there is no such package.

The calls of its builder, in plain Python, as far as they are used. A graph's inputs and outputs
are taken from the bundle's gap.json beside it.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path

__version__ = "10.3.0"

Names = enum.Enum("Names", "FLOAT HALF BF16 INT64 INT32 BOOL")
_DTYPES = {"float32": Names.FLOAT, "float16": Names.HALF, "bfloat16": Names.BF16}


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class Tensor:
    def __init__(self, spec):
        self.name = spec["name"]
        self.dtype = _DTYPES.get(spec["dtype"], Names.INT64)
        self.shape = tuple(-1 if isinstance(dim, str) else dim for dim in spec["shape"])
        self.is_shape_tensor = False


class Network:
    num_layers = num_inputs = num_outputs = 0

    def fill(self, graph):
        inputs = [Tensor(spec) for spec in graph["inputs"]]
        outputs = [Tensor(spec) for spec in graph["outputs"]]
        self.num_inputs, self.get_input = len(inputs), inputs.__getitem__
        self.num_outputs, self.get_output = len(outputs), outputs.__getitem__


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self._network = network

    def parse_from_file(self, path):
        graphs = json.loads((Path(path).parent / "gap.json").read_text())["graphs"]
        self._network.fill(next(g for g in graphs if g["file"] == Path(path).name))
        return True


class TimingCache:
    def serialize(self):
        return b"measured"


class Config:
    progress_monitor = None

    def add_optimization_profile(self, profile):
        return 0

    def create_timing_cache(self, content):
        return TimingCache()

    def set_timing_cache(self, cache, ignore_mismatch):
        return True

    def get_timing_cache(self):
        return TimingCache()


class Profile:
    def set_shape(self, name, low, usual, high):
        assert len(low) == len(usual) == len(high)


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        self._logger.log(ILogger.Severity.INFO, "building")
        config.progress_monitor.phase_start("build", None, 1)
        config.progress_monitor.step_complete("build", 0)
        return bytearray(b"an engine of the stub")

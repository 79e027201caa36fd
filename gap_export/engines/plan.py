"""What built engines say of themselves: the typed form of ``engines/<target>/engine.json``.

Folders of engines are read and checked by :mod:`gap_export.engines.folder`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gap_export.errors import BundleError
from gap_export.spec.manifest import (
    EngineLimits,
    QuantizationSpec,
    check_member_path,
    from_plain,
    to_plain,
)

ProfileName = Literal["prefill", "decode", "only"]
WeightsHeld = Literal["included", "streamed", "stripped"]
PLAN_NAME = "engine.json"
FORMAT = "gap-export-engines"
FORMAT_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DIMENSION = (1 << 31) - 1
_MAX_BYTES = (1 << 63) - 1
_MAX_LIMIT = 100_000
_MAX_NUMBERS = 1 << 36
_OWN_HASH = "plan_sha256"
_MAX_SHOWN = 100
_AGAIN = "build the engines again: gap-export build"


@dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """Shapes that one input may have in one profile; ``opt`` is what kernels are chosen for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """One optimization profile; its place in :attr:`EngineSpec.profiles` is TensorRT's index.

    Attributes:
        name: ``prefill`` and ``decode`` of a graph with a KV cache, ``only`` of another.
        shapes: Shapes of each input.
        values: What each input that is a shape tensor may hold.
    """

    name: ProfileName
    shapes: Mapping[str, ShapeRange]
    values: Mapping[str, ShapeRange] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """An input or output as TensorRT parsed it.

    Attributes:
        name: As in the graph.
        dtype: float32, float16, bfloat16, int64, ...
        shape: -1 where a dimension is decided at run time.
        is_shape_tensor: Its values are sizes, and lie in the host's memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_shape_tensor: bool


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine.

    Attributes:
        file: Path within the target's folder; ``size`` and ``sha256`` are that file's.
        graph: The ONNX file it was built from, within the bundle. Lowering, dtype, quantization
            and ``kv_contract`` are what the manifest says of it.
        weights_sha256: Hash of the files that the graph's weights lie in, see
            :func:`gap_export.engines.graph_hash.hash_weights`.
        weights: ``included``; ``streamed``: as that, and the runtime may leave part of them in the
            host's memory; ``stripped``: the engine is refitted from the bundle when loaded.
        profiles: The profiles, in TensorRT's order.
        build_seconds: Wall time.
        peak_memory_bytes: Most resident memory of the process while this engine was built.
    """

    component: str
    file: str
    size: int
    sha256: str
    graph: str
    graph_sha256: str
    weights_sha256: str
    lowering: str
    dtype: str
    quantization: QuantizationSpec | None
    kv_contract: Literal["none", "concat", "in_place"]
    weights: WeightsHeld
    profiles: tuple[ProfileSpec, ...]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    build_seconds: float
    peak_memory_bytes: int

    def profile_index(self, name: str) -> int:
        """TensorRT's index of a profile.

        Raises:
            KeyError: the engine has no profile of that name.
        """
        for index, profile in enumerate(self.profiles):
            if profile.name == name:
                return index
        raise KeyError(name)


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """The whole of ``engine.json``, whose JSON form has ``format`` and ``format_version`` as well.

    Its last key, ``plan_sha256``, is the hash of all before it: see :func:`hash_plan`.

    Attributes:
        library: The Python package that built the engines and runs them.
        library_version: Its full version: TensorRT runs engines of its own version alone.
        target: Name of the target.
        compute_capability: SM number of the GPU they run on, e.g. 89; None where the machine that
            built them could not tell.
        limits: What the profiles were made from.
        engines: One for each component that was built.
    """

    library: Literal["tensorrt", "tensorrt_rtx"]
    library_version: str
    target: str
    compute_capability: int | None
    limits: EngineLimits
    engines: tuple[EngineSpec, ...] = field(default=())

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON."""
        plain = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_plain(self)}
        plain[_OWN_HASH] = hash_plan(plain)
        return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def parse_plan(raw: bytes) -> EnginePlan:
    """Read an ``engine.json``.

    Raises:
        BundleError: not JSON, another format, another version, an unknown or missing key, a value
            of the wrong type or out of range, a path that leaves the folder, or values that its
            own hash does not fit.
    """
    try:
        plain = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{PLAN_NAME} is not JSON", seen=err, fix=_AGAIN) from err
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise BundleError(
            f"{PLAN_NAME} is not a list of gap-export's engines",
            allowed=f'a JSON object with "format": "{FORMAT}"',
            fix=_AGAIN,
        )
    version = plain.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"version of {PLAN_NAME} not supported",
            seen=version,
            allowed=str(FORMAT_VERSION),
            fix="upgrade gap-export, or build the engines again with this version",
        )
    own_hash = plain.pop(_OWN_HASH, None)
    fields = {k: v for k, v in plain.items() if k not in ("format", "format_version")}
    plan = from_plain(EnginePlan, fields, where=PLAN_NAME)
    _check_values(plan)
    if own_hash != hash_plan(plain):
        raise BundleError(
            f"{PLAN_NAME} is not what was written when the engines were built",
            seen=f"{_OWN_HASH} {own_hash!r}"[:_MAX_SHOWN],
            allowed=hash_plan(plain),
            fix=_AGAIN,
        )
    return plan


def hash_plan(plain: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of an ``engine.json`` as data, its own hash left out."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check_values(plan: EnginePlan) -> None:
    if plan.compute_capability is not None:
        _between("compute_capability", plan.compute_capability, 1, 1000)
    for name, value in vars(plan.limits).items():
        _between(f"limits.{name}", value, 1, _MAX_LIMIT)
    for name, values in (
        ("component", [engine.component for engine in plan.engines]),
        ("file", [engine.file for engine in plan.engines]),
    ):
        if len(set(values)) != len(values):
            raise _refuse(name, values, "each once")
    for engine in plan.engines:
        _check_engine(engine)


def _check_engine(engine: EngineSpec) -> None:
    for path in (engine.file, engine.graph):
        check_member_path(path)
    if engine.file == PLAN_NAME:
        raise _refuse("file", engine.file, "another name")
    _between(f"size of {engine.file}", engine.size, 0, _MAX_BYTES)
    _between(f"peak_memory_bytes of {engine.file}", engine.peak_memory_bytes, 0, _MAX_BYTES)
    for name in ("sha256", "graph_sha256", "weights_sha256"):
        digest = getattr(engine, name)
        if _SHA256.fullmatch(digest) is None:
            raise _refuse(f"{name} of {engine.file}", digest, "64 hex digits, lower case")
    if not engine.profiles:
        raise _refuse(f"profiles of {engine.file}", [], "at least one")
    names = [profile.name for profile in engine.profiles]
    if len(set(names)) != len(names):
        raise _refuse(f"profiles of {engine.file}", names, "each name once")
    for tensor in (*engine.inputs, *engine.outputs):
        for size in tensor.shape:
            _between(f"shape of {tensor.name} in {engine.file}", size, -1, _MAX_DIMENSION)
    _check_profiles(engine)


def _check_profiles(engine: EngineSpec) -> None:
    ranks = {tensor.name: len(tensor.shape) for tensor in engine.inputs}
    for profile in engine.profiles:
        if set(profile.shapes) != set(ranks):
            raise _refuse(
                f"profile {profile.name} of {engine.file}",
                sorted(profile.shapes),
                f"the inputs {sorted(ranks)}",
            )
        sizes = {tensor.name for tensor in engine.inputs if tensor.is_shape_tensor}
        if set(profile.values) != sizes:
            raise _refuse(
                f"values of profile {profile.name} of {engine.file}",
                sorted(profile.values),
                f"the shape tensors {sorted(sizes)}",
            )
        for what, ranges in (("", profile.shapes), ("values of ", profile.values)):
            for name, shapes in ranges.items():
                where = f"{what}profile {profile.name}, {name} of {engine.file}"
                three = (shapes.min, shapes.opt, shapes.max)
                # A shape tensor of ours holds one number.
                rank = 1 if what else ranks[name]
                if {len(shape) for shape in three} != {rank}:
                    raise _refuse(where, three, f"{rank} dimensions")
                if any(
                    not 0 <= a <= b <= c <= _MAX_DIMENSION for a, b, c in zip(*three, strict=True)
                ):
                    raise _refuse(where, three, "0 <= min <= opt <= max")
                # A buffer of this size is allocated.
                largest = math.prod(shapes.max)
                _between(f"numbers of the largest shape of {where}", largest, 0, _MAX_NUMBERS)


def _refuse(name: str, seen: object, allowed: str) -> BundleError:
    return BundleError(
        f"{PLAN_NAME}: {name} is not a sensible value",
        seen=repr(seen),
        allowed=allowed,
        fix=_AGAIN,
    )


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _refuse(name, value, f"{low}..{high}")

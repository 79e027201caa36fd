"""The targets of ``--trt``, as one table. Nothing else in the package tests a target's name.

Sources: NVIDIA's support matrices for TensorRT, TensorRT-RTX and JetPack, as of November 2026; for
opsets and operators, ``docs/operators.md`` of onnx-tensorrt: opsets 9 to 20 in 10.0, to 22 in 10.6,
to 24 in 10.15. Each lowering has a closed list of operators (:mod:`gap_export.graph.pipelines`).
The releases below document all of them for the dtypes of our graphs, but for those in
:attr:`Platform.undocumented`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from gap_export.errors import UsageError

Version = tuple[int, int]
Lowering = Literal["portable", "fused"]
# What `--trt` alone stands for.
AUTO = "auto"
# The first GPU generation with a dtype. Ampere brought bfloat16; of INT4 weights TensorRT-RTX 1.7.1
# says that they do not compile for sm75.
_OLDEST_WITH: Mapping[str, int] = MappingProxyType({"bfloat16": 80, "int4": 80})
_NEWEST = 999


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A software release that a target may have, and what its TensorRT takes.

    Attributes:
        name: The maker's name, e.g. ``JetPack 6.2``.
        min_version: Lowest TensorRT it stands for, (major, minor).
        max_version: Highest, of which every patch is meant.
        max_opset: Highest ONNX opset its parser is known to read.
        lowerings: Which forms of the graphs build there, best first.
        undocumented: Operators of our graphs that its documentation does not cover as we use them,
            each with the reason. They may build all the same; none was tried on such a device.
        python: The Python it brings, for the instructions; None where the user chooses.
        cuda: The CUDA release it brings, for the instructions.
    """

    name: str
    min_version: Version
    max_version: Version
    max_opset: int
    lowerings: tuple[Lowering, ...]
    undocumented: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    cuda: str | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of GPU that engines are built for.

    Attributes:
        name: What the user writes.
        summary: One line for people.
        library: The Python package that builds and runs its engines.
        platforms: Releases it may have, oldest first. Graphs made on a host suit all of them.
        compute_capabilities: SM numbers it may have, e.g. 89; empty: that of the GPU.
        default_compute_capabilities: Those built for where the user names none.
        dtypes: Dtypes of floats; the first is used where the bundle's own is not among them.
        quantizations: Dtypes of quantized weights.
        built_on: ``any``: on any machine, with or without a GPU; ``device``: on the GPU it is for.
    """

    name: str
    summary: str
    library: Literal["tensorrt", "tensorrt_rtx"]
    platforms: tuple[Platform, ...]
    compute_capabilities: tuple[int, ...]
    default_compute_capabilities: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    quantizations: tuple[str, ...] = ("int4",)
    built_on: Literal["any", "device"]

    @property
    def lowering(self) -> Lowering:
        """The form of the graphs that builds on every platform of the target, best first.

        A target of several platforms takes what the oldest of them can build.
        """
        common = [
            lowering
            for lowering in self.platforms[0].lowerings
            if all(lowering in platform.lowerings for platform in self.platforms)
        ]
        return common[0]

    def platform(self, version: Version) -> Platform | None:
        """The release a TensorRT version belongs to; None where it is out of range."""
        for platform in reversed(self.platforms):
            if platform.min_version <= version <= platform.max_version:
                return platform
        return None


_BOTH: tuple[Lowering, ...] = ("portable", "fused")
_INTEGERS: Mapping[str, str] = MappingProxyType(
    {
        "CumSum": "CumSum is documented for floats; the graph sums integers",
        "Scan": "Scan is documented for floats; the graph scans integers and booleans as well",
    }
)
# TensorRT has INT4 since 10.0. The parser of 10.6 takes the blocks from the shape of the scales,
# at any opset; nothing is known of the parser of 10.3.
_INTEGERS_AND_INT4: Mapping[str, str] = MappingProxyType(
    {
        **_INTEGERS,
        "DequantizeLinear": "INT4 weights in blocks are of opset 21; documented are opsets 9 to 20",
    }
)
# Both Jetsons have it.
_JETPACK_7_2 = Platform(
    name="JetPack 7.2",
    min_version=(10, 16),
    max_version=(11, 4),
    max_opset=24,
    lowerings=_BOTH,
    undocumented=_INTEGERS,
    python="3.12",
    cuda="13.2",
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                name="rtx",
                summary="desktop RTX cards, Turing to Blackwell, and DGX Spark",
                library="tensorrt_rtx",
                platforms=(
                    Platform(
                        name="TensorRT-RTX 1.7",
                        min_version=(1, 7),
                        max_version=(1, 7),
                        max_opset=25,
                        lowerings=("fused", "portable"),
                    ),
                ),
                compute_capabilities=(75, 80, 86, 89, 120, 121),
                default_compute_capabilities=(86, 89, 120),
                built_on="any",
            ),
            Target(
                name="desktop",
                summary="the GPU at hand, by the full TensorRT",
                library="tensorrt",
                platforms=(
                    Platform(
                        name="TensorRT 10.3 to 10.14",
                        min_version=(10, 3),
                        max_version=(10, 14),
                        max_opset=20,
                        lowerings=("portable",),
                        undocumented=_INTEGERS_AND_INT4,
                    ),
                    Platform(
                        name="TensorRT 10.15 to 11.5",
                        min_version=(10, 15),
                        max_version=(11, 5),
                        max_opset=24,
                        lowerings=_BOTH,
                        undocumented=_INTEGERS,
                    ),
                ),
                compute_capabilities=(),
                default_compute_capabilities=(),
                built_on="device",
            ),
            Target(
                name="orin",
                summary="Jetson Orin",
                library="tensorrt",
                platforms=(
                    Platform(
                        name="JetPack 6.2",
                        min_version=(10, 3),
                        max_version=(10, 3),
                        max_opset=20,
                        lowerings=("portable",),
                        undocumented=_INTEGERS_AND_INT4,
                        python="3.10",
                        cuda="12.6",
                    ),
                    _JETPACK_7_2,
                ),
                compute_capabilities=(87,),
                default_compute_capabilities=(87,),
                built_on="device",
            ),
            Target(
                name="thor",
                summary="Jetson Thor",
                library="tensorrt",
                platforms=(
                    Platform(
                        name="JetPack 7.0",
                        min_version=(10, 13),
                        max_version=(10, 13),
                        max_opset=22,
                        lowerings=("portable",),
                        undocumented=_INTEGERS,
                        python="3.12",
                        cuda="13",
                    ),
                    _JETPACK_7_2,
                ),
                compute_capabilities=(110,),
                default_compute_capabilities=(110,),
                built_on="device",
            ),
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """A target for one GPU generation.

    Attributes:
        target: The row of the table.
        compute_capability: SM number; None: that of the GPU at hand.
    """

    target: Target
    compute_capability: int | None

    @property
    def spec(self) -> str:
        """As ``--trt`` and ``--target`` have it, e.g. ``rtx:sm89``."""
        name = self.target.name
        return name if self.compute_capability is None else f"{name}:sm{self.compute_capability}"

    @property
    def folder(self) -> str:
        """Folder below ``engines/``, e.g. ``rtx-sm89``."""
        if self.compute_capability is None:
            return self.target.name
        return f"{self.target.name}-sm{self.compute_capability}"

    def supports(self, dtype: str) -> bool:
        """Whether the GPU has a dtype, int4 of weights; one that is not known yet is taken to."""
        return (self.compute_capability or _NEWEST) >= _OLDEST_WITH.get(dtype, 0)

    def check_weights(self, dtype: str) -> None:
        """See that the GPU takes quantized weights.

        Raises:
            UsageError: it does not.
        """
        if not self.supports(dtype):
            raise UsageError(
                f"{self.spec} takes no {dtype} weights",
                seen=f"compute capability {self.compute_capability}",
                allowed=f"{_OLDEST_WITH[dtype]} and later",
                fix="export without --dtype int4, or for another target",
            )


def parse_targets(specs: Sequence[str]) -> tuple[TargetChoice, ...]:
    """Read what the user wrote, e.g. ``rtx``, ``rtx:sm89``, ``orin``; ``auto`` is every target.

    Returns:
        Each choice once, in the order given.

    Raises:
        UsageError: an unknown target, or a GPU generation it has not got.
    """
    choices: dict[str, TargetChoice] = {}
    for spec in (each for given in specs for each in (TARGETS if given == AUTO else [given])):
        name, colon, suffix = spec.partition(":")
        target = TARGETS.get(name)
        if target is None:
            raise UsageError(
                "unknown TensorRT target",
                seen=repr(spec),
                allowed=", ".join(TARGETS),
                fix="write it right after --trt, e.g. --trt rtx:sm89; MODEL goes before",
            )
        allowed = {f"sm{number}": number for number in target.compute_capabilities}
        if colon and suffix not in allowed:
            raise UsageError(
                f"target {name} has no such GPU generation",
                seen=repr(suffix),
                allowed=", ".join(allowed) or f"none: write {name} alone, it takes the GPU at hand",
            )
        generations: tuple[int | None, ...] = (
            (allowed[suffix],) if colon else target.default_compute_capabilities
        )
        for generation in generations or (None,):
            choice = TargetChoice(target=target, compute_capability=generation)
            choices.setdefault(choice.folder, choice)
    return tuple(choices.values())

"""The presets that come with the package, and how those of other packages are found.

A package of somebody else's adds a preset by an entry point of the group ``gap_export.pruners``
whose name is the preset's and whose object is a :class:`Preset`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from types import MappingProxyType

from gap_export.errors import GapExportError, MissingDependencyError, UsageError
from gap_export.plugins import Plugins
from gap_export.pruning.cdpruner import CdPruner, LlmCdPruner
from gap_export.pruning.cls import ClsPruner
from gap_export.pruning.d2pruner import D2Pruner, LlmD2Pruner
from gap_export.pruning.dart import DartPruner
from gap_export.pruning.divprune import DivPrunePruner
from gap_export.pruning.extent import ExtentPruner, LlmExtentPruner
from gap_export.pruning.fastervlm import FasterVlmPruner, FasterVlmReceivedPruner
from gap_export.pruning.ivc import IvcExtentPruner, LlmIvcPruner
from gap_export.pruning.litelvlm import LiteLvlmPruner
from gap_export.pruning.nuwa import NuwaPruner, NuwaReceivedPruner
from gap_export.pruning.preset import Preset, check_preset
from gap_export.pruning.prumerge import PruMergePlusPruner, PruMergePruner, PruMergeSelection
from gap_export.pruning.pruner import Pruner
from gap_export.pruning.spatial import SpatialPruner
from gap_export.pruning.text import LlmTextPruner, TextPruner
from gap_export.pruning.trim import TrimPruner
from gap_export.pruning.uniform_random import RandomPruner
from gap_export.pruning.visionzip import VisionZipPruner, VisionZipReceivedPruner

ENTRY_POINT_GROUP = "gap_export.pruners"
# Before the name of a pruner's package, among the tools that a bundle was made with.
PACKAGE_MARK = "pruner: "

_GAP = "arXiv 2506.21873"
_PRUMERGE = "arXiv 2403.15388"
_D2PRUNER = "arXiv 2512.19443"
_NUWA = "arXiv 2602.02951"
_IVC = "arXiv 2602.03060"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(name="cls", pruner=ClsPruner(), paper=_GAP),
            Preset(name="text", pruner=TextPruner(), paper=_GAP),
            Preset(name="random", pruner=RandomPruner(), paper=_GAP),
            Preset(name="spatial", pruner=SpatialPruner(), paper=_GAP),
            Preset(
                name="prumerge",
                pruner=PruMergePruner(),
                order="score",
                extra_token="weighted",
                budget="adaptive",
                paper=_PRUMERGE,
            ),
            Preset(
                name="prumerge+",
                pruner=PruMergePlusPruner(),
                order="score",
                extra_token="weighted",
                paper=_PRUMERGE,
            ),
            Preset(
                name="prumerge-select",
                pruner=PruMergeSelection(),
                budget="adaptive",
                paper=_PRUMERGE,
            ),
            Preset(
                name="trim",
                pruner=TrimPruner(),
                extra_token="mean",
                budget="adaptive",
                pruner_text="question",
                paper="arXiv 2409.10994",
            ),
            Preset(name="fastervlm", pruner=FasterVlmPruner(), paper="arXiv 2412.01818"),
            Preset(
                name="visionzip", pruner=VisionZipPruner(), order="score", paper="arXiv 2412.04467"
            ),
            Preset(
                name="fastervlm-received",
                pruner=FasterVlmReceivedPruner(),
                paper="arXiv 2412.01818",
            ),
            Preset(
                name="visionzip-received",
                pruner=VisionZipReceivedPruner(),
                order="score",
                paper="arXiv 2412.04467",
            ),
            Preset(name="divprune", pruner=DivPrunePruner(), paper="arXiv 2503.02175"),
            Preset(
                name="cdpruner",
                pruner=CdPruner(),
                pruner_text="question",
                long_texts="segments",
                paper="arXiv 2506.10967",
            ),
            Preset(name="text-llm", pruner=LlmTextPruner(), long_texts="segments", paper=_GAP),
            Preset(
                name="cdpruner-llm",
                pruner=LlmCdPruner(),
                long_texts="segments",
                paper="arXiv 2506.10967",
            ),
            Preset(name="dart", pruner=DartPruner(), paper="arXiv 2502.11494"),
            Preset(name="extent", pruner=ExtentPruner(), paper="our own"),
            Preset(
                name="extent-llm", pruner=LlmExtentPruner(), long_texts="segments", paper="our own"
            ),
            Preset(name="d2pruner", pruner=D2Pruner(), paper=_D2PRUNER),
            Preset(
                name="d2pruner-llm", pruner=LlmD2Pruner(), long_texts="segments", paper=_D2PRUNER
            ),
            Preset(name="nuwa", pruner=NuwaPruner(), paper=_NUWA),
            Preset(name="nuwa-received", pruner=NuwaReceivedPruner(), paper=_NUWA),
            Preset(name="ivc-extent", pruner=IvcExtentPruner(), paper=_IVC),
            Preset(name="ivc-text-llm", pruner=LlmIvcPruner(), long_texts="segments", paper=_IVC),
            Preset(name="litelvlm", pruner=LiteLvlmPruner(), paper="arXiv 2605.13178"),
        )
    }
)

# Methods that people ask for, and what they do that no graph of ours does.
LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "fastv": "ranks inside the LLM, by the attention of a layer of it",
        "sparsevlm": "ranks inside the LLM, at several layers, by chosen words",
        "pyramiddrop": "drops inside the LLM, at several layers",
        "vispruner": "takes away a few tokens at a time, in rounds that are all of another shape",
    }
)


def _check(name: str, thing: object, where: str) -> Preset:
    if not isinstance(thing, Preset) or thing.name != name:
        raise GapExportError(
            f"{where} is not a preset of that name",
            seen=thing,
            allowed=f"gap_export.pruning.Preset(name={name!r}, ...)",
        )
    check_preset(thing, where)
    return thing


OTHER_PRESETS: Plugins[Preset] = Plugins(group=ENTRY_POINT_GROUP, kind="pruner", check=_check)


def all_presets() -> Mapping[str, Preset]:
    """Our own, then those of other packages that can be used; see :func:`broken_presets`."""
    others = {n: one for n, one in OTHER_PRESETS.found.items() if isinstance(one, Preset)}
    return MappingProxyType(
        {**PRESETS, **{n: one for n, one in others.items() if n not in PRESETS}}
    )


def broken_presets() -> Mapping[str, GapExportError]:
    """Those of other packages that cannot be used, and why."""
    return OTHER_PRESETS.broken(PRESETS)


def find_preset(name: str) -> Preset:
    """The preset of that name; another package is imported only if it is asked for.

    Raises:
        UsageError: there is none; the nearest names are suggested.
        GapExportError: it is another package's and cannot be used.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name in OTHER_PRESETS.entries:
        return OTHER_PRESETS.load(name)
    names = list(dict.fromkeys((*PRESETS, *sorted(OTHER_PRESETS.entries))))
    lower = name.lower()
    if lower in LEFT_OUT:
        raise UsageError(
            f"pruner {lower} is not offered: it {LEFT_OUT[lower]}", allowed=", ".join(names)
        )
    near = difflib.get_close_matches(lower, names, n=2, cutoff=0.4)
    raise UsageError(
        "no pruner of that name",
        seen=reprlib.repr(name).strip("'") or "''",
        allowed=", ".join(names),
        fix=f"did you mean {' or '.join(near)}?" if near else None,
    )


def package_of(name: str) -> str | None:
    """The package that another package's preset comes with, where that is known."""
    return None if name in PRESETS else OTHER_PRESETS.package_of(name)


def check_pruner_installed(name: str, tools: Mapping[str, str]) -> None:
    """See that the pruner of a bundle is here.

    Args:
        name: Its preset.
        tools: What the bundle was made with: versions by package.

    Raises:
        MissingDependencyError: it is of another package, which is not installed.
    """
    if name in PRESETS or name in OTHER_PRESETS.entries:
        return
    package = next((tool for tool in tools if tool.startswith(PACKAGE_MARK)), None)
    named = package.removeprefix(PACKAGE_MARK) if package is not None else None
    raise MissingDependencyError(
        f"the pruner of this bundle, {reprlib.repr(name)}, is of a package that is not installed",
        seen=f"{named} {tools[package]}" if package is not None else "a package that is not known",
        fix=f"install {named or 'it'} from where you have it (a package of that name on an "
        "index may be another one), or check against a golden, which needs no pruner: --against",
    )


def find_pruner(name: str) -> Pruner:
    """The pruner of a preset; see :func:`find_preset`."""
    return find_preset(name).pruner

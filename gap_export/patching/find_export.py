"""Finds the graphs of an ONNX export that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gap_export.errors import UsageError
from gap_export.manifest import MANIFEST_NAME

COMPONENTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
# Where the community's tools put graphs: beside config.json, or one folder below.
_SUBFOLDER = "onnx"
# File name endings of the dtypes that are handled; no ending is float32 by custom.
VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"fp32": ("", "_fp32"), "fp16": ("_fp16",)}
)
_MAX_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class FoundExport:
    """An export's folder and the one file of each component.

    Attributes:
        folder: As given, links resolved; holds config.json and tokenizer.json.
        graphs: By component.
    """

    folder: Path
    graphs: Mapping[str, Path]


def find_export(folder: str | Path, *, variant: str | None = None) -> FoundExport:
    """Look for ``{component}{ending}.onnx`` in a folder and its ``onnx/``.

    Args:
        folder: Of the export.
        variant: ``fp32`` or ``fp16``; None where there is one file of each component.

    Raises:
        UsageError: no folder, a bundle of ours, a component that is not there, in no dtype that is
            handled, or more than once.
    """
    if variant is not None and variant not in VARIANTS:
        raise UsageError("no such variant", seen=variant, allowed=", ".join(VARIANTS))
    try:
        place = Path(folder).resolve()
        is_folder = place.is_dir()
    except (OSError, ValueError) as err:
        raise UsageError("the export's folder cannot be read", seen=err) from err
    if not is_folder:
        raise UsageError(
            "no folder of that name" if not place.exists() else "this is a file, not a folder",
            seen=place,
            allowed=f"a folder with {', '.join(f'{name}.onnx' for name in COMPONENTS)}",
        )
    if (place / MANIFEST_NAME).exists():
        raise UsageError(
            "this is a bundle, whose graphs are pruned already",
            seen=place,
            allowed="an ONNX export as its maker left it",
            fix="patch the folder it was made from; what takes a bundle: gap-export check, ground",
        )
    graphs = {name: _choose(place, name, variant) for name in COMPONENTS}
    return FoundExport(folder=place, graphs=MappingProxyType(graphs))


def _choose(folder: Path, component: str, variant: str | None) -> Path:
    endings = VARIANTS[variant] if variant is not None else sum(VARIANTS.values(), ())
    places = [folder, folder / _SUBFOLDER]
    wanted = [place / f"{component}{ending}.onnx" for place in places for ending in endings]
    found = [path for path in wanted if path.is_file()]
    if len(found) == 1:
        return found[0]
    if not found:
        others = [path for place in places for path in sorted(place.glob(f"{component}*.onnx"))]
        raise UsageError(
            f"the export has no {component} that can be patched",
            seen=_names(folder, others) or f"none in {folder} and {folder / _SUBFOLDER}",
            allowed=" or ".join(f"{component}{ending}.onnx" for ending in endings),
            fix=_how_to_mend(others, wanted),
        )
    endings_found = {path.stem.removeprefix(component) for path in found}
    choices = [name for name, ends in VARIANTS.items() if endings_found & set(ends)]
    raise UsageError(
        f"the export has several files of {component}",
        seen=_names(folder, found),
        allowed="one",
        fix=f"say which: {' or '.join(f'--variant {name}' for name in choices)}"
        if len(choices) > 1
        else "move the others away",
    )


def _how_to_mend(others: list[Path], wanted: list[Path]) -> str | None:
    if not others:
        return None
    if set(others) & set(wanted):
        return "it is a folder, or a link to what is not there: get the export again"
    return "quantized graphs are not handled: take fp32 or fp16"


def _names(folder: Path, paths: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths[:_MAX_SHOWN]]
    return ", ".join(names) + (", ..." if len(paths) > _MAX_SHOWN else "")

"""Finds the graphs of an ONNX export that another tool made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gap_export.errors import UsageError
from gap_export.spec.manifest import MANIFEST_NAME

COMPONENTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
# Where the community's tools put graphs: beside config.json, or one folder below.
_SUBFOLDER = "onnx"
# File name endings of the dtypes that are handled; no ending is float32 by custom.
VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"fp32": ("", "_fp32"), "fp16": ("_fp16",)}
)
_MAX_SHOWN = 6
_GRAPHS = (".onnx", ".xml", ".pte", ".pt2")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_FROM_CHECKPOINT = "export the checkpoint itself: gap-export export DIR"
# (a file of its, what made it, what to do)
_OTHER_LAYOUTS = (
    (
        "export.json",
        "by transformers' own exporter (language_model, lm_head, decode)",
        f"{_FROM_CHECKPOINT}; of LLaVA that exporter may leave out the vision tower",
    ),
    ("genai_config.json", "for onnxruntime-genai", _FROM_CHECKPOINT),
    ("openvino_model.xml", "for OpenVINO", _FROM_CHECKPOINT),
    ("openvino_language_model.xml", "for OpenVINO", _FROM_CHECKPOINT),
    (
        "decoder_with_past_model.onnx",
        "one with a decoder in two graphs",
        "export it with a merged decoder",
    ),
    ("model.onnx", "one graph of the whole model", _FROM_CHECKPOINT),
)


@dataclass(frozen=True, kw_only=True)
class FoundExport:
    """An export's folder and the one file of each component.

    Attributes:
        folder: The folder with links resolved; it holds config.json and tokenizer.json.
        graphs: The file of each component.
    """

    folder: Path
    graphs: Mapping[str, Path]


def find_export(folder: str | Path, *, variant: str | None = None) -> FoundExport:
    """Look for ``{component}{ending}.onnx`` in a folder and its ``onnx/``.

    Args:
        folder: The export's folder.
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
    _refuse_other_layout(place)
    graphs = {name: _choose(place, name, variant) for name in COMPONENTS}
    return FoundExport(folder=place, graphs=MappingProxyType(graphs))


def _refuse_other_layout(place: Path) -> None:
    """Name the maker of an export that has other graphs than these.

    Raises:
        UsageError: one that is known, or a checkpoint.
    """
    found = [path for folder in (place, place / _SUBFOLDER) for path in sorted(folder.glob("*"))]
    names = {path.name for path in found if path.is_file()}
    if any(name.startswith(COMPONENTS) for name in names if name.endswith(".onnx")):
        return
    graphs = [path for path in found if path.name.endswith(_GRAPHS)]
    for mark, maker, fix in _OTHER_LAYOUTS:
        if mark in names and (graphs or mark.endswith(_GRAPHS)):
            raise UsageError(
                f"this export is {maker}, which patch does not handle",
                seen=f"{place}: {_names(place, [p for p in found if p.name == mark] + graphs)}",
                allowed=f"graphs {', '.join(f'{name}.onnx' for name in COMPONENTS)}",
                fix=fix,
            )
    if "config.json" in names and any(name.endswith(_WEIGHTS) for name in names) and not graphs:
        raise UsageError(
            "this is a checkpoint and no ONNX export",
            seen=place,
            fix="export it with: gap-export export DIR",
        )


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
        else "move all but one away",
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

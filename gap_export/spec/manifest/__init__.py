"""What a bundle is: the typed form of ``gap.json``.

Plain frozen dataclasses on the standard library alone, so that a bundle can be read on a device
that has nothing else. Unknown keys, missing keys (but for those that came later) and wrong types
are errors.
"""

from __future__ import annotations

import json

from gap_export.errors import BundleError
from gap_export.spec.manifest.facts import (
    BoxSpec,
    GridSpec,
    ImageSpec,
    PromptSpec,
    QuestionSpec,
    TilesSpec,
)
from gap_export.spec.manifest.graphs import (
    Activations,
    EngineLimits,
    GraphSpec,
    PreflightVerdict,
    QuantizationSpec,
    TargetSpec,
    TensorPlace,
    TensorSpec,
)
from gap_export.spec.manifest.plain import ADDED_LATER, differing_fields, from_plain, to_plain
from gap_export.spec.manifest.specs import (
    BASE,
    FORMAT,
    FORMAT_VERSION,
    ORT,
    ORT_LOGITS,
    Attention,
    Budget,
    DecoderSpec,
    ExtraPosition,
    ExtraToken,
    FileSpec,
    FormName,
    LongTexts,
    Manifest,
    ModelSpec,
    Order,
    PrunerText,
    PruningSpec,
    SourceFile,
    SourcePart,
    SourceSpec,
    TextEncoderSpec,
    check_form,
)
from gap_export.spec.manifest.values import check_member_path, check_values

__all__ = [
    "ADDED_LATER",
    "BASE",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "ORT",
    "ORT_LOGITS",
    "Activations",
    "Attention",
    "BoxSpec",
    "Budget",
    "DecoderSpec",
    "EngineLimits",
    "ExtraPosition",
    "ExtraToken",
    "FileSpec",
    "FormName",
    "GraphSpec",
    "GridSpec",
    "ImageSpec",
    "LongTexts",
    "Manifest",
    "ModelSpec",
    "Order",
    "PreflightVerdict",
    "PromptSpec",
    "PrunerText",
    "PruningSpec",
    "QuantizationSpec",
    "QuestionSpec",
    "SourceFile",
    "SourcePart",
    "SourceSpec",
    "TargetSpec",
    "TensorPlace",
    "TensorSpec",
    "TextEncoderSpec",
    "TilesSpec",
    "check_form",
    "check_member_path",
    "differing_fields",
    "from_plain",
    "parse_manifest",
    "to_plain",
]

MANIFEST_NAME = "gap.json"


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        BundleError: not JSON, another format, a newer version, an unknown or missing key, a value
            of the wrong type or out of range, or a path that leaves the bundle's folder.
    """
    try:
        plain = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{MANIFEST_NAME} is not JSON", seen=err) from err
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise BundleError(
            f"{MANIFEST_NAME} is not a gap-export manifest",
            allowed=f'a JSON object with "format": "{FORMAT}"',
        )
    version = plain.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            "manifest version not supported",
            seen=version,
            allowed=str(FORMAT_VERSION),
            fix="upgrade gap-export, or export the bundle again with this version",
        )
    fields = {k: v for k, v in plain.items() if k not in ("format", "format_version")}
    manifest = from_plain(Manifest, fields, where=MANIFEST_NAME)
    paths = [file.path for file in manifest.files]
    paths += [file.path for part in manifest.source.parts for file in part.files]
    for path in (*paths, *manifest.used_files()):
        check_member_path(path)
    check_values(manifest)
    return manifest


def _refuse_constant(name: str) -> float:
    raise BundleError(f"{MANIFEST_NAME}: not a number", seen=name, allowed="finite numbers")

"""What is in a golden's ``golden.json``, as plain frozen dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from gap_export.bundle import files
from gap_export.errors import UsageError
from gap_export.outputs import GOLDEN_MARK
from gap_export.parity.replay import NEW_CACHE, Call
from gap_export.runtime.backends.backend import DECODER, EMBEDDING, NEWLINE, PRUNER, TEXT, VISION
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.prompt import TOKENIZER_FILE
from gap_export.spec.manifest import (
    BoxSpec,
    DecoderSpec,
    GridSpec,
    ImageSpec,
    Manifest,
    PromptSpec,
    PruningSpec,
    QuantizationSpec,
    SourceFile,
    TextEncoderSpec,
    from_plain,
    to_plain,
)

GOLDEN_NAME = "golden.json"
HASH_NAME = GOLDEN_MARK
TENSORS_NAME = "golden.safetensors"
NAMES = frozenset({GOLDEN_NAME, HASH_NAME, TENSORS_NAME})
FORMAT = "gap-export-golden"
FORMAT_VERSION = 3
RECORD_AGAIN = "record it again: gap-export check BUNDLE --record DIR"

# A golden's dtypes by their names in a safetensors file.
SAFETENSORS_DTYPES: Mapping[str, str] = MappingProxyType(
    {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8"}
)


class Method(NamedTuple):
    """How a call is stored."""

    component: str
    inputs: tuple[str, ...]
    outputs: frozenset[str]
    optional: frozenset[str] = frozenset()


def _method(component: str, inputs: str, outputs: str, optional: str = "") -> Method:
    must, may = frozenset(outputs.split()), frozenset(optional.split())
    return Method(component, tuple(inputs.split()), must, may)


# A call's "method" in golden.json, which for a vision encoder also says what it gives.
_SEES = "pixel_values text_embeds canvas"
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "encode_text": _method(TEXT, "input_ids", "text_embeds"),
        "encode_image": _method(VISION, _SEES, "image_features keep_indices", "token_scores"),
        "score_tokens": _method(VISION, _SEES, "token_scores patch_features", "patch_keys"),
        "prune_tokens": _method(
            PRUNER,
            "token_scores patch_features patch_keys num_kept_tokens",
            "image_features keep_indices",
            "token_scores",
        ),
        "image_newline": _method(NEWLINE, "", "image_newline"),
        "embed_tokens": _method(EMBEDDING, "input_ids", "inputs_embeds"),
        "new_cache": _method(NEW_CACHE, "batch_size", ""),
        "decode": _method(
            DECODER, "inputs_embeds attention_mask position_ids kept_positions", "logits"
        ),
    }
)
# Inputs of one number, which are stored without a dimension.
SCALARS = frozenset({"batch_size", "num_kept_tokens"})
# Inputs that are not there for every model.
OPTIONAL_INPUTS = frozenset({"text_embeds", "patch_keys"})
# Of those, what came later: it is not named where it is not there.
LATER_INPUTS = frozenset({"canvas"})


def method_of(call: Call) -> str:
    """The name that a call is stored under."""
    return next(
        name
        for name, method in METHODS.items()
        if method.component == call.component and method.outputs <= call.outputs.keys()
    )


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """An array in the golden's safetensors file, by whose header other tools find it, too.

    Attributes:
        dtype: numpy's name, little-endian.
        shape: Dimensions, row-major.
        offset: Place of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class StoredCall:
    """A call of the reference; arrays by their names in the golden. See ``replay.Call``."""

    method: str
    inputs: Mapping[str, str | None]
    outputs: Mapping[str, str]
    margins: str | None


@dataclass(frozen=True, kw_only=True)
class StoredQuestion:
    """A question.

    Attributes:
        image: Array of the image: uint8 [H, W, 3], upright, RGB.
        image_sha256: Hash of that array's bytes.
        expression: What was asked.
        box: Array of the true one, float64 [4] in pixels, where it is known.
    """

    image: str
    image_sha256: str
    expression: str
    box: str | None


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """What turns a question into inputs and tokens into a box; as in the bundle's manifest."""

    grid: GridSpec
    image: ImageSpec
    prompt: PromptSpec
    box: BoxSpec
    decoder: DecoderSpec
    text_encoder: TextEncoderSpec | None
    tokenizers: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> StoredFacts:
        """A bundle's."""
        names = {TOKENIZER_FILE}
        if manifest.text_encoder is not None:
            names.add(manifest.text_encoder.tokenizer_file)
        return cls(
            grid=manifest.grid,
            image=manifest.image,
            prompt=manifest.prompt,
            box=manifest.box,
            decoder=manifest.decoder,
            text_encoder=manifest.text_encoder,
            tokenizers={file.path: file.sha256 for file in manifest.files if file.path in names},
        )


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """One part of the checkpoint that was asked.

    Attributes:
        role: As the recipe has it.
        commit: The repository's commit, where the files lay in a hub's cache; else None.
        files: What was read, with its hashes.
    """

    role: str
    commit: str | None
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True)
class GoldenSpec:
    """The whole of ``golden.json``, but for ``format`` and ``format_version``.

    Attributes:
        recorded: When, in UTC, e.g. ``2026-01-31T23:59:59Z``.
        reference: What was asked, with its version.
        tools: Versions of what computed it, by name.
        seed: Seed of the samples.
        model: Name of the recipe.
        family: The model's.
        source: The checkpoint; empty where the weights are random.
        random_seed: Seed of random weights, else None.
        dtype: What the reference computed in.
        quantization: How the decoder's weights, which were the bundle's own, are quantized; None
            if they are not.
        pruning: What was pruned, and how.
        facts: What else decides inputs and answers.
        tensors_size: Bytes of the safetensors file.
        tensors_sha256: Hash of that file.
        tensors: Arrays by name.
        questions: In the order they were asked.
        calls: Calls by question.
        answers: To each question.
    """

    recorded: str
    reference: str
    tools: Mapping[str, str]
    seed: int
    model: str
    family: str
    source: tuple[StoredPart, ...]
    random_seed: int | None
    dtype: str
    quantization: QuantizationSpec | None
    pruning: PruningSpec
    facts: StoredFacts
    tensors_size: int
    tensors_sha256: str
    tensors: Mapping[str, StoredTensor]
    questions: tuple[StoredQuestion, ...]
    calls: tuple[tuple[StoredCall, ...], ...]
    answers: tuple[Grounding, ...]

    def to_json(self) -> bytes:
        """The file's content: ASCII, so that half characters in an expression do no harm."""
        plain = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_plain(self)}
        return (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()


def parse_golden(raw: bytes) -> GoldenSpec:
    """Read ``golden.json``.

    Raises:
        UsageError: not JSON, another format or version, an unknown or missing key, or a value of
            the wrong type.
    """
    try:
        plain = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise UsageError(f"{GOLDEN_NAME} is not JSON", seen=err, fix=RECORD_AGAIN) from err
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UsageError(
            f"{GOLDEN_NAME} is not a golden of gap-export",
            allowed=f'a JSON object with "format": "{FORMAT}"',
        )
    version = plain.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UsageError(
            "the golden has a format_version that is not supported",
            seen=repr(version),
            allowed=str(FORMAT_VERSION),
            fix=RECORD_AGAIN,
        )
    fields = {k: v for k, v in plain.items() if k not in ("format", "format_version")}
    return from_plain(GoldenSpec, fields, where=GOLDEN_NAME)


def without_scores(answer: Grounding) -> Grounding:
    """Scores are for images, and as outputs of a graph they are among the calls."""
    return replace(answer, tokens=tuple(replace(grid, scores=None) for grid in answer.tokens))


def hash_line(raw: bytes) -> bytes:
    """Content of ``golden.json.sha256``, as ``sha256sum -c`` reads it."""
    return files.hash_line(raw, name=GOLDEN_NAME)


def _refuse_constant(name: str) -> float:
    raise UsageError(f"{GOLDEN_NAME}: not a number", seen=name, allowed="finite numbers")

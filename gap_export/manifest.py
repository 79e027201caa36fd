"""What a bundle is: the typed form of ``gap.json``.

Plain frozen dataclasses on the standard library alone, so that a bundle can be read on a device
that has nothing else. Unknown keys, missing keys and wrong types are errors.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

from gap_export.errors import BundleError

FORMAT = "gap-export-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "gap.json"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Strict:
    # pydantic reads this where a recipe nests one of these classes; it needs no import here.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class GridSpec(_Strict):
    """Visual tokens before pruning, in raster order: N = rows * cols."""

    rows: int
    cols: int

    @property
    def num_visual_tokens(self) -> int:
        """N, visual tokens of one image before pruning."""
        return self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class ImageSpec(_Strict):
    """How a picture becomes ``pixel_values`` [I,3,height,width] float32.

    Attributes:
        height: Pixels the vision encoder reads, vertical.
        width: Pixels the vision encoder reads, horizontal.
        preparation: ``pad``: padded to a square, centred, with pad_color, then resized;
            ``squash``: resized without regard to the aspect ratio.
        pad_color: RGB 0..255 of the padding.
        resample: Filter of the resize.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
    """

    height: int
    width: int
    preparation: Literal["pad", "squash"]
    pad_color: tuple[int, int, int]
    resample: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class PromptSpec(_Strict):
    """How an expression becomes token ids.

    Attributes:
        template: Holds ``image_token`` once and ``{expression}`` once.
        image_token: The text that stands for the image; one id of the tokenizer.
        max_expression_tokens: A longer expression is refused.
        max_new_tokens: Upper bound of the answer's length, in tokens.
    """

    template: str
    image_token: str
    max_expression_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class BoxSpec(_Strict):
    """How the answer's text becomes a box.

    Attributes:
        syntax: ``bracketed``: ``[x1, y1, x2, y2]``.
        scale: Coordinates run from 0 to this.
        frame: What they are relative to: the ``padded_square`` or the ``image`` as given.
    """

    syntax: Literal["bracketed"]
    scale: float
    frame: Literal["padded_square", "image"]


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec(_Strict):
    """The CLIP text tower that text-aware pruners read.

    Attributes:
        template: Holds ``{expression}`` once.
        tokenizer_file: In the bundle: which tokenizer the tower reads.
        max_tokens: Longer texts are cut, keeping the last token (CLIP's end-of-text).
    """

    template: str
    tokenizer_file: str
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(_Strict):
    """Facts of the decoder that a runtime needs.

    ``max_position_embeddings`` bounds ids of the *unpruned* sequence: pruning saves KV memory, not
    context length.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PruningSpec(_Strict):
    """What was pruned, and how; see design: selection x order x extra token x positions.

    Attributes:
        pruner: Name of the pruner.
        order: ``raster``: kept tokens ascend; ``score``: best first.
        extra_token: Token added after the kept ones.
        positions: ``gap``: original ids; ``compact``: re-numbered, the naive baseline.
        keep_ratio: In (0, 1].
        seed: Of the pruners that draw; None for the others.
        num_visual_tokens: N.
        num_kept_tokens: K.
        num_emitted_tokens: K' = K plus extra tokens.
        text_similarity_sign: +1 keeps the patches most similar to the text, -1 the least; None
            where the pruner reads no text.
    """

    pruner: str
    order: Literal["raster", "score"]
    extra_token: Literal["none"]
    positions: Literal["gap", "compact"]
    keep_ratio: float
    seed: int | None
    num_visual_tokens: int
    num_kept_tokens: int
    num_emitted_tokens: int
    text_similarity_sign: int | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Strict):
    """Which model this is."""

    name: str
    family: str
    summary: str
    license: str


@dataclass(frozen=True, kw_only=True)
class SourceFile(_Strict):
    """One file of the source checkpoint."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceSpec(_Strict):
    """The checkpoint the bundle was made from. ``location`` is where it was, for information."""

    location: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSpec(_Strict):
    """A graph's input or output. A dimension is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphSpec(_Strict):
    """One ONNX file of the bundle.

    Attributes:
        component: vision_encoder, text_encoder, embed_tokens or decoder_model_merged.
        lowering: ``onnxruntime`` for the base graphs.
        dtype: Of the float inputs and outputs; ``pixel_values`` is float32 in any case.
        kv_contract: ``concat``: present = past and new, joined; ``none``: no cache.
        file: Path within the bundle.
    """

    component: str
    lowering: str
    dtype: str
    kv_contract: Literal["none", "concat"]
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class FileSpec(_Strict):
    """One file of the bundle. ``held`` says how its bytes got there."""

    path: str
    size: int
    sha256: str
    held: Literal["written", "copied", "linked"]


@dataclass(frozen=True, kw_only=True)
class Manifest(_Strict):
    """The whole of ``gap.json``, whose JSON form has ``format`` and ``format_version`` as well."""

    model: ModelSpec
    source: SourceSpec
    pruning: PruningSpec
    grid: GridSpec
    image: ImageSpec
    prompt: PromptSpec
    box: BoxSpec
    text_encoder: TextEncoderSpec | None
    decoder: DecoderSpec
    dtype: str
    opset: int
    graphs: tuple[GraphSpec, ...]
    files: tuple[FileSpec, ...]
    tools: Mapping[str, str]

    def graph(self, component: str, *, lowering: str = "onnxruntime") -> GraphSpec:
        """The graph of a component.

        Raises:
            BundleError: the bundle has none.
        """
        for graph in self.graphs:
            if graph.component == component and graph.lowering == lowering:
                return graph
        raise BundleError(
            "the bundle has no such graph",
            seen=f"{component} ({lowering})",
            allowed=", ".join(f"{g.component} ({g.lowering})" for g in self.graphs),
        )

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON."""
        plain = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_plain(self)}
        return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        BundleError: not JSON, another format, a newer version, an unknown or missing key, a value
            of the wrong type, or a path that leaves the bundle's folder.
    """
    try:
        plain = json.loads(raw)
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
    for path in (f.path for f in manifest.files):
        check_member_path(path)
    for path in (g.file for g in manifest.graphs):
        check_member_path(path)
    if manifest.text_encoder is not None:
        check_member_path(manifest.text_encoder.tokenizer_file)
    return manifest


def check_member_path(path: str) -> PurePosixPath:
    """A relative POSIX path that stays within the bundle.

    Raises:
        BundleError: absolute, with ``..``, a backslash, a drive, or empty parts.
    """
    pure = PurePosixPath(path)
    unsafe = "\\" in path or ":" in path or "\0" in path or pure.is_absolute()
    if unsafe or not pure.parts or ".." in pure.parts or str(pure) != path:
        raise BundleError(
            "a path in the bundle leaves its folder or is not plain",
            seen=repr(path),
            allowed="relative paths with forward slashes and no '..'",
            fix="do not use this bundle; get it again from a source you trust",
        )
    return pure


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value


def from_plain(cls: type[T], plain: Any, *, where: str) -> T:
    """Build a frozen dataclass from JSON data, checking every key and type.

    Args:
        cls: The dataclass.
        plain: What ``json.loads`` gave.
        where: Named in error messages.

    Raises:
        BundleError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(plain, dict):
        raise BundleError(f"{where} must be an object", seen=type(plain).__name__)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(plain) - set(names))
    missing = [n for n in names if n not in plain]
    if unknown or missing:
        raise BundleError(
            f"{where}: wrong keys",
            seen=f"unknown {unknown or 'none'}, missing {missing or 'none'}",
            allowed=", ".join(names),
        )
    return cls(**{n: _convert(hints[n], plain[n], f"{where}: {n}") for n in names})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where=where)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise BundleError(where, seen=repr(value), allowed=", ".join(map(repr, args)))
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) == len(args):
            pairs = enumerate(zip(args, value, strict=True))
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in pairs)
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise BundleError(f"{where} has the wrong type", seen=repr(value), allowed=str(hint))


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    failure: BundleError | None = None
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except BundleError as err:
            failure = err
    raise failure or BundleError(f"{where} has the wrong type", seen=repr(value))

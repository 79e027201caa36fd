"""The parts of ``gap.json`` as plain frozen dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gap_export.errors import BundleError, UsageError
from gap_export.spec.manifest.facts import BoxSpec, GridSpec, ImageSpec, PromptSpec, Strict
from gap_export.spec.manifest.graphs import EngineLimits, GraphSpec, TargetSpec, TensorPlace
from gap_export.spec.manifest.plain import ADDED_LATER, RARE, to_plain

FORMAT = "gap-export-bundle"
FORMAT_VERSION = 1

Order = Literal["raster", "score"]
ExtraToken = Literal["none", "mean", "weighted"]
ExtraPosition = Literal["last", "centroid"]
Budget = Literal["fixed", "adaptive"]
Attention = Literal["plain", "proportional"]
PrunerText = Literal["expression", "question"]
LongTexts = Literal["cut", "segments"]
TextReader = Literal["text_encoder", "embed_tokens"]
# Lowerings of graphs that ONNX Runtime runs: any runtime's, and one of its own operators.
BASE, ORT = "onnxruntime", "ort"
# Most tokens whose logits the form for ONNX Runtime gives at once: the last ones that were fed.
ORT_LOGITS = 8
FormName = Literal["base", "ort"]


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec(Strict):
    """What makes one vector of a text, for pruners that read the text.

    Attributes:
        template: What it reads; holds ``{expression}`` once. See ``PruningSpec.pruner_text``.
        tokenizer_file: In the bundle: whose tokens it reads.
        max_tokens: How many it reads at a time.
        long_texts: What becomes of a longer one: ``cut``: its end is left out, the last token
            (CLIP's end-of-text) kept; ``segments``: it is read in pieces of so many tokens, whose
            unit vectors are averaged.
        component: The graph that reads it: ``text_encoder``, a CLIP text tower, gives one vector of
            a text; ``embed_tokens`` gives the decoder's embedding of each of its tokens, without
            special ones, and the vector is the mean of their unit vectors.
    """

    template: str
    tokenizer_file: str
    max_tokens: int
    long_texts: LongTexts = field(default="cut", metadata=ADDED_LATER)
    component: TextReader = field(default="text_encoder", metadata=RARE)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(Strict):
    """Facts of the decoder that a runtime needs.

    Attributes:
        num_layers: Number of layers, each with a KV cache.
        num_key_value_heads: Heads of the KV cache.
        head_dim: Width of a head.
        hidden_size: Width of the embeddings.
        vocab_size: Number of logits.
        max_position_embeddings: Bounds ids of the *unpruned* sequence: pruning saves KV memory,
            not context length.
        eos_token_ids: Any of these ends an answer.
        position_axes: Ids of a token that RoPE reads: 1, or 3 with M-RoPE (time, row, column); see
            ``spec.positions``.
        num_heads: Heads of the queries; None where they are hidden_size / head_dim.
        num_taps: Planes that stand behind the hidden state in a token's embedding, each added
            behind one of the first layers (DeepStack).
        rope_axes: With several position axes, the axis that each frequency of RoPE turns by; empty
            where that is not known, as of somebody else's export.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    position_axes: Literal[1, 3] = field(default=1, metadata=RARE)
    num_heads: int | None = field(default=None, metadata=RARE)
    num_taps: int = field(default=0, metadata=RARE)
    rope_axes: tuple[int, ...] = field(default=(), metadata=RARE)

    @property
    def embeds_size(self) -> int:
        """Width of an embedding with its planes."""
        return self.hidden_size * (1 + self.num_taps)


@dataclass(frozen=True, kw_only=True)
class PruningSpec(Strict):
    """What was pruned, and how; see design: selection x order x extra token x positions.

    Attributes:
        pruner: Name of the pruner.
        order: ``raster``: kept tokens ascend; ``score``: best first.
        extra_token: Token added after the kept ones: the ``mean`` of the dropped ones, or their sum
            ``weighted`` by score.
        positions: ``gap``: original ids; ``compact``: re-numbered, the naive baseline.
        keep_ratio: In (0, 1].
        seed: The seed of a pruner that draws; None for one that does not.
        num_visual_tokens: N of one image or tile.
        num_kept_tokens: K of one image or tile; the upper bound with ``adaptive``.
        num_emitted_tokens: K' = K plus extra tokens.
        text_similarity_sign: +1 keeps the patches most similar to the text, -1 the least; None
            where the pruner reads no text.
        extra_position: Index of the extra token: that of the ``last`` visual token, or of the cell
            at the ``centroid`` of what was dropped.
        budget: ``fixed``: K of every image; ``adaptive``: as many as stand out by their scores.
        kept_buckets: Numbers that an adaptive one is rounded up to, ascending, K the last; empty
            in bundles made since every number of 1..K can be kept.
        pruner_text: What a pruner that reads the text reads: the ``expression`` alone, or the whole
            ``question`` that the decoder is asked.
        baked_positions: For each axis of positions the ids that the decoder's graph holds in place
            of its input ``kept_positions``: those of a prompt's tokens up to the first behind the
            image. Empty where they are fed.
        attention: ``plain``: each kept token counts as one; ``proportional``: as many as there were
            for each that is left, which ``attention_mask`` then says in place of 1.
    """

    pruner: str
    order: Order
    extra_token: ExtraToken
    positions: Literal["gap", "compact"]
    keep_ratio: float
    seed: int | None
    num_visual_tokens: int
    num_kept_tokens: int
    num_emitted_tokens: int
    text_similarity_sign: int | None
    extra_position: ExtraPosition = "last"
    budget: Budget = "fixed"
    kept_buckets: tuple[int, ...] = ()
    pruner_text: PrunerText = field(default="expression", metadata=ADDED_LATER)
    baked_positions: tuple[tuple[int, ...], ...] = field(default=(), metadata=RARE)
    attention: Attention = field(default="plain", metadata=RARE)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Strict):
    """Which model this is."""

    name: str
    family: str
    summary: str
    license: str


@dataclass(frozen=True, kw_only=True)
class SourceFile(Strict):
    """One file of the source checkpoint."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourcePart(Strict):
    """One part of the source checkpoint.

    Attributes:
        role: ``main``, or what the recipe calls it, e.g. ``base`` or ``tower``.
        location: The folder where it was, for information.
        files: What was read, by path within the folder.
    """

    role: str
    location: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True)
class SourceSpec(Strict):
    """Where the weights are from.

    Attributes:
        parts: Parts of the checkpoint; empty where the weights are random.
        random_seed: The seed of weights that are noise of the true shape, for work on latency and
            engines; None where there was a checkpoint.
    """

    parts: tuple[SourcePart, ...]
    random_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class FileSpec(Strict):
    """One file of the bundle.

    Attributes:
        path: Path within the bundle.
        size: Bytes.
        sha256: Hash of its bytes, in hex.
        held: How they got there: ``written`` by the export; ``copied``; ``cloned``: a copy that
            shares the source's blocks until one of them changes; ``linked``: the source's own file.
    """

    path: str
    size: int
    sha256: str
    held: Literal["written", "copied", "cloned", "linked"]


@dataclass(frozen=True, kw_only=True)
class Manifest(Strict):
    """The whole of ``gap.json``, whose JSON form has ``format`` and ``format_version`` as well.

    ``newline`` [H] stands at the end of each row of an image tiled by ``anyres``; None without.
    ``targets`` and ``engine_limits`` are there where engines are to be built.
    """

    model: ModelSpec
    source: SourceSpec
    pruning: PruningSpec
    grid: GridSpec
    image: ImageSpec
    prompt: PromptSpec
    box: BoxSpec
    text_encoder: TextEncoderSpec | None
    decoder: DecoderSpec
    newline: TensorPlace | None
    dtype: str
    opset: int
    graphs: tuple[GraphSpec, ...]
    files: tuple[FileSpec, ...]
    tools: Mapping[str, str]
    engine_limits: EngineLimits | None = None
    targets: tuple[TargetSpec, ...] = ()

    def graph(
        self, component: str, *, lowering: str = "onnxruntime", dtype: str | None = None
    ) -> GraphSpec:
        """The graph of a component.

        Args:
            component: Its name.
            lowering: Its form.
            dtype: Dtype of its floats; None where there is one dtype only.

        Raises:
            BundleError: the bundle has none.
        """
        for graph in self.graphs:
            form = (graph.component, graph.lowering, dtype or graph.dtype)
            if form == (component, lowering, graph.dtype):
                return graph
        raise BundleError(
            "the bundle has no such graph",
            seen=" ".join(filter(None, (component, lowering, dtype))),
            allowed=", ".join(f"{g.component} {g.lowering} {g.dtype}" for g in self.graphs),
            fix="export it again with --trt, naming the target",
        )

    @property
    def has_int8_tower(self) -> bool:
        """Whether the vision tower multiplies 8-bit integers."""
        return any(graph.linear_layers == "int8" for graph in self.graphs)

    def target(self, name: str) -> TargetSpec:
        """What the bundle has for a target.

        Raises:
            BundleError: nothing.
        """
        for target in self.targets:
            if target.name == name:
                return target
        raise BundleError(
            "the bundle was not made for this target",
            seen=name,
            allowed=", ".join(t.name for t in self.targets) or "none",
            fix=f"export it again with --trt {name}",
        )

    def used_files(self) -> list[str]:
        """Paths of the files that a runtime reads."""
        files = [graph.file for graph in self.graphs]
        files += [] if self.text_encoder is None else [self.text_encoder.tokenizer_file]
        return files + ([] if self.newline is None else [self.newline.file])

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON."""
        plain = {"format": FORMAT, "format_version": FORMAT_VERSION, **to_plain(self)}
        return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def check_form(manifest: Manifest, form: str | None) -> None:
    """See that a bundle has a form of its graphs.

    Raises:
        UsageError: it has not.
    """
    known = ["base"] + (["ort"] if any(g.lowering == ORT for g in manifest.graphs) else [])
    if form is not None and form not in known:
        raise UsageError(
            "the bundle's graphs have no such form",
            seen=form,
            allowed=", ".join(known),
            fix="export it again with this version of gap-export, in float32, float16 or INT4, "
            "without --bake-positions"
            if form == "ort"
            else None,
        )

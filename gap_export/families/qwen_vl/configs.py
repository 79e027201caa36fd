"""From a config.json of Qwen's models to sizes, refusing what the modules do not implement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.configs import decoder_shape
from gap_export.families.common.checkpoints.limits import require
from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.manifest import ImageSpec

# Norms of towers and mergers have it; no config says so.
_EPS = 1e-6
_AXES = 3
# Base of the frequencies of a tower's 2-D RoPE. Published configs leave it out.
TOWER_ROPE_THETA = 1e4
# What transformers has called that RoPE.
_TOWER_ROPES = ("axial", "default")
# Both mean RoPE without scaling, by sections; transformers has written either.
_ROPE_TYPES = ("mrope", "default")


@dataclass(frozen=True, kw_only=True)
class ConfigKind:
    """How one of the three families says its sizes.

    Attributes:
        config_class: transformers' config.
        decoder: Whose layers the decoder has.
        interleaved: Whether axes take turns in the frequencies of its RoPE.
        norm: Of tower and merger.
        layer_sizes: What a vision config calls the tower's width and the inner width of its MLPs.
        more: What it says beyond, for a ``VisionShape``.
        mlp: Names of an MLP's linear layers in files, by ours; empty where they are the same.
        merger: Names of the merger's parts in files, by ours.
    """

    config_class: type[PreTrainedConfig]
    decoder: Literal["qwen2", "qwen3"]
    interleaved: bool = False
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_sizes: Callable[[Any], tuple[int, int]]
    more: Callable[[Any, Path], dict[str, Any]] = lambda _vision, _file: {}
    mlp: Mapping[str, str]
    merger: Mapping[str, str]


def read_architecture(kind: ConfigKind, config: Any, image: ImageSpec, file: Path) -> Architecture:
    """Sizes of a model on a canvas.

    Args:
        kind: Which family it is of.
        config: The parsed config; its class leaves most fields open.
        image: Says the canvas, or several.
        file: Where it was read, for messages.

    Raises:
        CheckpointError: a kind of RoPE, attention or patch that is not implemented, or sizes that
            do not fit each other.
    """
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    _check_patches(vision, file)
    tower = _vision_shape(kind, vision, image, file)
    if image.grids and tower.window_size is not None:
        raise CheckpointError(
            f"{file}: the windows of this tower are those of one canvas",
            seen=", ".join(f"{rows}x{cols} tokens" for rows, cols in image.grids),
            fix="export a bundle for each canvas",
        )
    taps = len(tower.taps)
    width = merge * merge * tower.width
    decoder = _decoder_shape(kind, config, file)
    hidden = vision.hidden_size if kind.config_class is Qwen2VLConfig else vision.out_hidden_size
    require(
        hidden == decoder.hidden_size,
        "the merger's width in vision_config",
        hidden,
        f"hidden_size, {decoder.hidden_size}",
        where=file,
    )
    projector = ProjectorShape(
        width=width,
        hidden_size=decoder.hidden_size,
        activation="gelu",
        joined_rows=merge,
        inner_size=width,
        norm=kind.norm,
        norm_eps=_EPS,
        norm_width=tower.width,
        num_taps=taps,
    )
    return Architecture(vision=tower, projector=projector, decoder=replace(decoder, num_taps=taps))


def check_rope_type(plain: Mapping[str, Any], file: Path) -> None:
    """Refuse RoPE with scaling by its name, before the config's own parser looks at it.

    Args:
        plain: The parsed file.
        file: Named in the message.

    Raises:
        CheckpointError: RoPE of another type.
    """
    text = plain.get("text_config")
    for section in (plain, text if isinstance(text, dict) else {}):
        for key in ("rope_scaling", "rope_parameters"):
            rope = section.get(key)
            if not isinstance(rope, dict):
                continue
            # An old file that was edited by hand may say it by both names, and differently.
            for seen in (rope.get("rope_type", "default"), rope.get("type", "default")):
                require(
                    seen in _ROPE_TYPES,
                    f"{key}: RoPE of type",
                    seen,
                    f"{' or '.join(_ROPE_TYPES)}: RoPE without scaling",
                    where=file,
                )


def _check_patches(vision: Any, file: Path) -> None:
    for key in ("patch_size", "temporal_patch_size", "spatial_merge_size", "num_heads"):
        value = getattr(vision, key)
        require(type(value) is int and value > 0, key, value, "a whole number", where=file)
    require(vision.in_channels == 3, "in_channels", vision.in_channels, "3", where=file)
    rope = vision.rope_parameters or {}
    theta, kind = rope.get("rope_theta", TOWER_ROPE_THETA), rope.get("rope_type", _TOWER_ROPES[0])
    allowed = f"{TOWER_ROPE_THETA:.0f}"
    require(theta == TOWER_ROPE_THETA, "rope_theta of vision_config", theta, allowed, where=file)
    allowed = " or ".join(_TOWER_ROPES)
    require(kind in _TOWER_ROPES, "rope_type of vision_config", kind, allowed, where=file)


def _vision_shape(kind: ConfigKind, vision: Any, image: ImageSpec, file: Path) -> VisionShape:
    width, inner = kind.layer_sizes(vision)
    require(
        width % (4 * vision.num_heads) == 0,
        "vision_config.num_heads",
        vision.num_heads,
        f"a divisor of the width, {width}, with heads a multiple of 4 wide",
        where=file,
    )
    return VisionShape(
        width=width,
        intermediate_size=inner,
        num_layers=vision.depth,
        num_heads=vision.num_heads,
        layer_norm_eps=_EPS,
        activation=vision.hidden_act,
        image_size=(image.height, image.width),
        grids=image.grids,
        patch_size=vision.patch_size,
        **kind.more(vision, file),
    )


def _decoder_shape(kind: ConfigKind, config: Any, file: Path) -> DecoderShape:
    text = config.text_config
    shape = decoder_shape(text, file, kind=kind.decoder, rope_types=_ROPE_TYPES)
    sections = text.rope_parameters.get("mrope_section")
    require(
        isinstance(sections, list)
        and len(sections) == _AXES
        and all(type(number) is int and number > 0 for number in sections)
        and sum(sections) == shape.num_frequencies,
        "mrope_section",
        sections,
        f"{_AXES} numbers that add up to {shape.num_frequencies}",
        where=file,
    )
    return replace(
        shape,
        rope_sections=tuple(sections),
        rope_interleaved=kind.interleaved,
        tied_embeddings=bool(config.tie_word_embeddings) or shape.tied_embeddings,
    )


def _windows(vision: Any, file: Path) -> dict[str, Any]:
    token = vision.patch_size * vision.spatial_merge_size
    size, full = vision.window_size, tuple(vision.fullatt_block_indexes)
    require(
        type(size) is int and size > 0 and size % token == 0,
        "window_size",
        size,
        f"a multiple of {token}, the side of a token",
        where=file,
    )
    # What comes behind the layers, and what pruners read, is of a layer that sees the whole image.
    require(
        all(type(index) is int and 0 <= index < vision.depth for index in full)
        and vision.depth - 1 in full,
        "fullatt_block_indexes",
        full,
        f"numbers of layers, the last one, {vision.depth - 1}, among them",
        where=file,
    )
    return {"window_size": size, "full_attention": full}


def _table_and_taps(vision: Any, file: Path) -> dict[str, Any]:
    number, taps = vision.num_position_embeddings, tuple(vision.deepstack_visual_indexes)
    side = math.isqrt(number) if type(number) is int and number > 0 else 0
    require(
        side > 0 and side * side == number,
        "num_position_embeddings",
        number,
        "a square number",
        where=file,
    )
    require(
        all(type(index) is int and 0 <= index < vision.depth for index in taps)
        and list(taps) == sorted(set(taps)),
        "deepstack_visual_indexes",
        taps,
        f"numbers of layers, 0..{vision.depth - 1}, ascending",
        where=file,
    )
    return {"position_side": side, "taps": taps}


_SEQUENTIAL = {"norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"}
QWEN2 = ConfigKind(
    config_class=Qwen2VLConfig,
    decoder="qwen2",
    layer_sizes=lambda vision: (vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)),
    mlp={},
    merger=_SEQUENTIAL,
)
QWEN2_5 = ConfigKind(
    config_class=Qwen2_5_VLConfig,
    decoder="qwen2",
    norm="rms_norm",
    layer_sizes=lambda vision: (vision.hidden_size, vision.intermediate_size),
    more=_windows,
    mlp={},
    merger=_SEQUENTIAL,
)
QWEN3 = ConfigKind(
    config_class=Qwen3VLConfig,
    decoder="qwen3",
    interleaved=True,
    layer_sizes=lambda vision: (vision.hidden_size, vision.intermediate_size),
    more=_table_and_taps,
    mlp={"fc1": "linear_fc1", "fc2": "linear_fc2"},
    merger={"norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"},
)

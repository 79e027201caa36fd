"""What sizes a recipe may give a model, and how they must fit each other."""

from __future__ import annotations

from gap_export.spec.architecture import Architecture, ProjectorShape, VisionShape
from gap_export.spec.manifest import GridSpec, ImageSpec

MAX_TOKEN_ID = 1 << 24
_MAX_WIDTH = 1 << 20
_MAX_SIZES = {
    "num_layers": 1_000,
    "vocab_size": MAX_TOKEN_ID,
    "max_position_embeddings": MAX_TOKEN_ID,
}
# One matrix of each layer's MLP; in a 70B model they have 19e9.
_MAX_WEIGHTS = 1 << 38
# A position in M-RoPE has time, row and column.
_AXES = 3


def check_sizes(architecture: Architecture, image: ImageSpec, grid: GridSpec) -> None:
    """Refuse a grid that no model of these sizes has, and modules that do not fit each other."""
    vision, projector, decoder = architecture.vision, architecture.projector, architecture.decoder
    for name, module in vars(architecture).items():
        for key, size in vars(module).items():
            if isinstance(size, int) and not isinstance(size, bool):
                most = _MAX_SIZES.get(key, _MAX_WIDTH)
                low = 0 if key == "num_taps" else 1
                check_in_range(f"architecture.{name}.{key}", size, low, most)
    weights = decoder.num_layers * decoder.hidden_size * decoder.intermediate_size
    check_in_range(
        f"weights of architecture.decoder's layers ({weights})", weights, 1, _MAX_WEIGHTS
    )
    if (image.height, image.width) != vision.canvas:
        height, width = vision.canvas
        raise ValueError(
            f"image must be {height} px high and {width} wide, architecture.vision.image_size"
        )
    _check_vision(vision, projector, image)
    if projector.num_taps != decoder.num_taps:
        raise ValueError("architecture.projector and architecture.decoder must have as many taps")
    if projector.width % vision.width or projector.hidden_size != decoder.hidden_size:
        raise ValueError("architecture.projector must go from vision.width to decoder.hidden_size")
    if projector.width % (projector.norm_width or 1):
        raise ValueError("architecture.projector.norm_width must divide its width")
    if vision.width % vision.num_heads or decoder.num_heads % decoder.num_key_value_heads:
        raise ValueError("architecture: heads must divide the width, and groups the heads")
    sections, turned = decoder.rope_sections, decoder.num_frequencies
    if sections and (len(sections) != _AXES or sum(sections) != turned):
        raise ValueError(
            f"architecture.decoder.rope_sections must be {_AXES} numbers that add up to {turned}"
        )
    channels = decoder.rotary_dim if decoder.rotary_dim is not None else decoder.head_dim
    if channels % 2 or channels > decoder.head_dim:
        raise ValueError("architecture.decoder: RoPE turns pairs of a head's channels")
    rows, cols = architecture.token_grid
    if (grid.rows, grid.cols) != (rows, cols):
        raise ValueError(f"grid must be {rows} rows, {cols} cols, as architecture says")


def _check_vision(vision: VisionShape, projector: ProjectorShape, image: ImageSpec) -> None:
    """Refuse layers that the tower has not got, and canvases that are not the image's."""
    if vision.grids != image.grids or (vision.grids and vision.window_size is not None):
        raise ValueError("architecture.vision.grids must be image.grids, and no windows beside it")
    for key, layers in (("full_attention", vision.full_attention), ("taps", vision.taps)):
        if list(layers) != sorted(set(layers) & set(range(vision.num_layers))):
            raise ValueError(
                f"architecture.vision.{key} must be layers of 0..{vision.num_layers - 1}, ascending"
            )
    if vision.window_size is not None and vision.num_layers - 1 not in vision.full_attention:
        raise ValueError("architecture.vision: the last layer must see the whole image")
    if vision.taps and len(vision.taps) != projector.num_taps:
        raise ValueError("architecture.projector must have as many taps as architecture.vision")


def check_in_range(key: str, value: int, low: int, high: int) -> None:
    """Refuse a number that is too small or too large.

    Raises:
        ValueError: it is.
    """
    if not low <= value <= high:
        raise ValueError(f"{key} must lie in {low}..{high}")

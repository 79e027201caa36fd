"""A pass that has a vision encoder for images of any size take those of one canvas."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import add_initializer, new_value, static_dim
from gap_export.patching.model_facts import ModelFacts
from gap_export.patching.prune_features import FEATURES
from gap_export.spec.manifest import GridSpec, ImageSpec

PIXELS, GRID = "pixel_values", "image_grid_thw"
_ROWS, _FLAT = f"{PIXELS}_in_patches", f"{FEATURES}_in_one_list"
_CHANNELS = 3


class FixCanvas(GraphPass):
    """Makes an image [1, 3, h, w] the input, and features [1, N, H] the output.

    Encoders of Qwen2-VL's kind take two inputs: all patches in one list, ``pixel_values``
    [patches, 3 * frames * p * p], and how many there are of each image, ``image_grid_thw``
    [images, 3]; they give features in one list, [N, H]. On a canvas the second is a constant, and
    the first is the image cut up: four neighbors, which become one token, stand one after the
    other, from left to right and from top to bottom; in each the channel comes first, then the
    frame, of which a still image has the same twice, then row and column of the pixel.

    An encoder that takes whole images stays as it is. Does not handle: several images at a time,
    features of unknown width.

    Args:
        image: Says the canvas.
        grid: Rows and columns of visual tokens on it.
        facts: Say the sizes of a patch.
    """

    def __init__(self, *, image: ImageSpec, grid: GridSpec, facts: ModelFacts) -> None:
        self._image, self._grid, self._facts = image, grid, facts

    def apply(self, model: ir.Model) -> bool:
        """Fix the canvas; False if there is nothing to fix.

        Raises:
            PassError: a canvas that does not fit the patches, or an input or output of another
                shape.
        """
        graph = model.graph
        inputs = {str(value.name): value for value in graph.inputs}
        if not takes_patches(graph):
            return False
        pixels = inputs[PIXELS]
        patch, frames, join = self._sizes()
        numbers = _CHANNELS * frames * patch * patch
        if inputs.keys() - {PIXELS, GRID} or static_dim(pixels, 1) not in (None, numbers):
            raise PassError(
                "the vision encoder does not take the patches that config.json speaks of",
                seen=", ".join(f"{name} {value.shape}" for name, value in inputs.items()),
                allowed=f"{PIXELS} [patches, {numbers}] and {GRID} [images, 3]",
            )
        flat = next((value for value in graph.outputs if value.name == FEATURES), None)
        width = None if flat is None else static_dim(flat, 1)
        if flat is None or flat.shape is None or flat.shape.rank() != 2 or width is None:
            raise PassError(
                "the vision encoder does not give the features of all images in one list",
                seen=", ".join(f"{value.name} {value.shape}" for value in graph.outputs),
                allowed=f"{FEATURES} [tokens, width]",
            )
        if GRID in inputs:
            counts = np.array([[1, self._grid.rows * join, self._grid.cols * join]], np.int64)
            constant = add_initializer(graph, f"{GRID}_of_canvas", counts)
            inputs[GRID].replace_all_uses_with(constant)
            graph.inputs.remove(inputs[GRID])
        self._cut_up(graph, pixels, sizes=(patch, frames, join))
        self._join_features(graph, flat, width)
        return True

    def _sizes(self) -> tuple[int, int, int]:
        """Pixels of a patch's side, frames of a patch, patches along a token's side."""
        facts, grid, image = self._facts, self._grid, self._image
        if not (facts.patch_size and facts.frames_per_patch and facts.patches_per_side):
            raise PassError(
                "config.json does not say how an image is cut into patches",
                seen="vision_config",
                allowed="patch_size, temporal_patch_size and spatial_merge_size in vision_config",
            )
        side = facts.patch_size * facts.patches_per_side
        canvas = grid.rows * side, grid.cols * side
        if (image.height, image.width) != canvas:
            raise PassError(
                "the recipe's canvas is not one of whole tokens",
                seen=f"{image.width}x{image.height} pixels, {grid.rows}x{grid.cols} tokens",
                allowed=f"{canvas[1]}x{canvas[0]} pixels for so many tokens of {side}x{side}",
                fix="choose one with --canvas, or correct image and grid of the recipe",
            )
        return facts.patch_size, facts.frames_per_patch, facts.patches_per_side

    def _cut_up(self, graph: ir.Graph, rows: ir.Value, *, sizes: tuple[int, int, int]) -> None:
        """Put an image in front of the input of patches."""
        patch, frames, join = sizes
        down, across = self._grid.rows, self._grid.cols
        image = new_value(
            PIXELS, rows.dtype, ir.Shape([1, _CHANNELS, self._image.height, self._image.width])
        )
        graph.inputs[graph.inputs.index(rows)] = image
        nodes: list[ir.Node] = []

        def add(op_type: str, *operands: ir.Value | list[int], **attributes: object) -> ir.Value:
            name = f"{_ROWS}_{len(nodes)}"
            given = [
                add_initializer(graph, f"{name}_shape", np.array(operand, np.int64))
                if isinstance(operand, list)
                else operand
                for operand in operands
            ]
            node = ir.node(op_type, given, attributes=attributes, name=name)  # type: ignore[arg-type]
            node.outputs[0].name = name
            nodes.append(node)
            return node.outputs[0]

        # Channel, token row, patch row in it, pixel row in that, and the same of columns.
        cells = add("Reshape", image, [_CHANNELS, down, join, patch, across, join, patch])
        # Token row, token column, the patches of a token, channel, one frame, pixels.
        ordered = add("Transpose", cells, perm=[1, 4, 2, 5, 0, 3, 6])
        number = down * across * join * join
        frame = add("Reshape", ordered, [number, _CHANNELS, 1, patch * patch])
        all_frames = add("Concat", *[frame] * frames, axis=2)
        found = add("Reshape", all_frames, [number, _CHANNELS * frames * patch * patch])
        found.type = rows.type
        found.shape = ir.Shape([number, _CHANNELS * frames * patch * patch])
        rows.replace_all_uses_with(found)
        graph.insert_before(graph[0], nodes)

    def _join_features(self, graph: ir.Graph, flat: ir.Value, width: int) -> None:
        """Give features an axis of images."""
        shape = [1, self._grid.num_visual_tokens, width]
        flat.name = _FLAT
        joined = new_value(FEATURES, flat.dtype, ir.Shape(shape))
        wanted = add_initializer(graph, f"{FEATURES}_shape", np.array(shape, np.int64))
        graph.append(ir.node("Reshape", [flat, wanted], outputs=[joined], name=f"{_FLAT}_joined"))
        graph.outputs[graph.outputs.index(flat)] = joined


def takes_patches(graph: ir.Graph) -> bool:
    """Whether a vision encoder reads the patches of images, of any size, and not images."""
    shapes = [value.shape for value in graph.inputs if value.name == PIXELS]
    return len(shapes) == 1 and shapes[0] is not None and shapes[0].rank() == 2


def reads_any_grid(graph: ir.Graph) -> bool:
    """Whether an encoder of patches is told their rows and columns, or was made for some."""
    return any(value.name == GRID for value in graph.inputs)

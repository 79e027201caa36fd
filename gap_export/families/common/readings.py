"""What a pruner may read from each family's models, as far as a recipe tells; no torch.

Whether a pruner fits a model must be known at once, before the seconds that importing torch takes.
"""

from __future__ import annotations

from gap_export.pruning import Reading
from gap_export.spec.recipe import Recipe


def clip_readings(recipe: Recipe) -> frozenset[Reading]:
    """Of a CLIP tower: CLS is always there, the text tower where the recipe names one."""
    found: set[Reading] = {"cls_features", "cls_attention", "keys", "image_embeds"}
    if has_next_layer(recipe):
        found.add("next_layer")
    if recipe.text_tower is not None:
        found.add("text")
    return frozenset(found)


def eva_readings(recipe: Recipe) -> frozenset[Reading]:  # noqa: ARG001 - the same for all of them
    """Of EVA: no text, as it was not trained together with a text tower; no layer left behind."""
    return frozenset({"cls_features", "cls_attention", "keys", "image_embeds"})


def has_next_layer(recipe: Recipe) -> bool:
    """Whether the tower has a layer behind the select layer, as far as the recipe tells."""
    if recipe.select_layer < 0:
        return recipe.select_layer < -1
    # Counted from the front: without the sizes nobody knows.
    shapes = recipe.architecture
    return shapes is not None and recipe.select_layer < shapes.vision.num_layers

"""What a pruner may read from the towers that several families have."""

from __future__ import annotations

# The features of any tower can be projected, its attention has keys, its tokens have places in a
# grid; and any decoder has words and RoPE.
ANY_TOWER = frozenset({"image_embeds", "keys", "llm_text", "places", "rope_sums"})
WITH_CLS = ANY_TOWER | {"cls_features", "cls_attention", "received_attention"}
# CLIP was trained with a text tower, and its select layer is not the last.
CLIP = WITH_CLS | {"next_layer", "text"}

"""Which bundles are the unpruned form of another one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.baseline import check_baseline
from gap_export.spec.manifest import (
    QuantizationSpec,
    QuestionSpec,
    SourceFile,
    SourcePart,
    SourceSpec,
)


def unpruned(manifest, **source):
    """The manifest's model at keep 1."""
    pruning = replace(manifest.pruning, keep_ratio=1.0)
    return replace(manifest, pruning=pruning, source=SourceSpec(**source))


def part(role, sha256):
    file = SourceFile(path="model.safetensors", size=1, sha256=sha256)
    return SourcePart(role=role, location="/nowhere", files=(file,))


def test_files_of_a_baseline_are_compared_within_their_part(sample_manifest):
    manifest = replace(
        sample_manifest, source=SourceSpec(parts=(part("main", "a"), part("base", "b")))
    )
    same = unpruned(manifest, parts=(part("base", "b"), part("main", "a"), part("tower", "c")))
    check_baseline(manifest, same)
    other = unpruned(manifest, parts=(part("main", "a"), part("base", "a")))
    with pytest.raises(UsageError, match=r"another base/model\.safetensors"):
        check_baseline(manifest, other)
    with pytest.raises(UsageError, match="no common weights"):
        check_baseline(manifest, unpruned(manifest, parts=(part("tower", "a"),)))


def test_a_baseline_whose_weights_are_rounded_otherwise_is_refused(sample_manifest):
    manifest = replace(sample_manifest, source=SourceSpec(parts=(part("main", "a"),)))
    whole = unpruned(manifest, parts=(part("main", "a"),))
    check_baseline(manifest, whole)
    spec = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    graphs = tuple(replace(graph, quantization=spec) for graph in manifest.graphs)
    with pytest.raises(UsageError, match="another quantization"):
        check_baseline(replace(manifest, graphs=graphs), whole)


def test_a_bundle_of_before_recipes_named_the_question_has_the_same_baseline(sample_manifest):
    manifest = replace(sample_manifest, source=SourceSpec(parts=(part("main", "a"),)))
    whole = unpruned(manifest, parts=(part("main", "a"),))
    question = QuestionSpec(start="USER:", end="ASSISTANT:", image="<image>")
    now = replace(whole, prompt=replace(whole.prompt, question=question))
    check_baseline(replace(manifest, prompt=replace(manifest.prompt, question=None)), now)
    other = replace(now, prompt=replace(now.prompt, template="<image> {expression} ?"))
    with pytest.raises(UsageError, match="another prompt"):
        check_baseline(manifest, other)


def test_random_weights_are_compared_by_their_seed(sample_manifest):
    manifest = replace(sample_manifest, source=SourceSpec(parts=(), random_seed=3))
    check_baseline(manifest, unpruned(manifest, parts=(), random_seed=3))
    for source in ({"parts": (), "random_seed": 4}, {"parts": (part("main", "a"),)}):
        with pytest.raises(UsageError, match="other random weights"):
            check_baseline(manifest, unpruned(manifest, **source))

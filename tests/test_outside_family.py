"""A family of another package, from its checkpoint to answers, without a word of it in gap_export.

Its code is tests/outside_family; that a Phi is behind it is known from transformers alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import read_header
from gap_export.cli import main
from gap_export.errors import GapExportError
from gap_export.exporting import ExportOptions, export_model
from gap_export.exporting.quantization import SCALES_NAME
from gap_export.families import (
    broken_families,
    build_reference,
    find_family,
    resolve_pruning,
    supported_pruners,
)
from gap_export.parity.patched.masked_oracle import compare_with_unpatched
from gap_export.parity.question import Question
from gap_export.patching import PatchOptions, patch_export
from gap_export.runtime.images.geometry import Frame
from gap_export.runtime.session import GroundingSession
from gap_export.spec.family import OTHER_FAMILIES
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.recipe import broken_recipes, find_recipe, list_recipes
from gap_export.spec.requests import PruningRequest
from tests import outside_family
from tests.conftest import _randomise, _write_tokenizer
from tests.parity.checking import check_with_torch, statuses
from tests.patching.exports import build_export
from tests.shared import sort_options

MODEL = "tiny-phi"


def install(folder: Path, *entries: str, name: str = "phi-siglip") -> None:
    """A package with entry points where Python finds it, as pip would."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gap_export.families]\n" + "\n".join(entries) + "\n")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The family, installed."""
    install(tmp_path / "site", "phi_siglip = tests.outside_family:PHI_SIGLIP")
    monkeypatch.syspath_prepend(tmp_path / "site")
    OTHER_FAMILIES.forget()
    yield
    OTHER_FAMILIES.forget()


@pytest.fixture(scope="module")
def theirs():
    """The model as transformers computes it."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        PhiConfig,
        SiglipVisionConfig,
    )

    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=PhiConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=130,
            max_position_embeddings=128,
            partial_rotary_factor=0.5,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=3,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    _randomise(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def checkpoint(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-phi")
    theirs.save_pretrained(folder)
    _write_tokenizer(folder / "tokenizer.json")
    return folder


def export(checkpoint: Path, out: Path, **options) -> Path:
    given = sort_options({"pruner": "divprune", "keep_ratio": 0.4, **options})
    export_model(ExportOptions(model=MODEL, checkpoint={"main": checkpoint}, out=out, **given))
    return out


def questions(number: int = 3) -> list[Question]:
    rng = np.random.default_rng(0)
    sizes = [(40, 32), (32, 40), (64, 64)]
    return [
        Question(
            image=rng.integers(0, 255, (*sizes[i % 3], 3)).astype(np.uint8),
            box=(4.0, 4.0, 20.0, 20.0),
            expression=("the small red star", "a big circle", "the blue square")[i % 3],
        )
        for i in range(number)
    ]


def test_its_model_is_found_and_offers_what_its_tower_can(package):
    recipe, folder = find_recipe(MODEL)
    assert folder.name == MODEL and recipe.family == "phi_siglip"
    assert set(supported_pruners(recipe)) == {"random", "spatial", "divprune", "dart", "extent"}


def test_unpruned_it_is_what_transformers_computes(package, theirs, checkpoint):
    recipe, _ = find_recipe(MODEL)
    pruning = resolve_pruning(recipe, PruningRequest(pruner="spatial", keep_ratio=1.0))
    reference = build_reference(
        recipe, Checkpoint(parts={"main": checkpoint}), pruning, device="cpu", dtype="float32"
    )
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    ids = torch.tensor([[1, 5, *[3] * 16, 20, 21, 6]])
    with torch.inference_mode():
        wanted = theirs(input_ids=ids, pixel_values=pixels).logits[:, -1]
        features, _ = reference.vision_encoder(pixels)
        embeds = reference.embed_tokens(ids)
        embeds[:, 2:18] = features
        past = [torch.zeros(1, 2, 0, 16)] * 8
        slots = torch.arange(ids.shape[1])[None]
        logits, *_ = reference.decoder(embeds, torch.ones_like(ids), slots, *past)
    torch.testing.assert_close(logits[:, 0], wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "pruner",
    ["divprune", *(pytest.param(name, marks=pytest.mark.full) for name in ("spatial", "dart"))],
)
def test_it_is_pruned_checked_at_all_levels_and_grounds(package, checkpoint, tmp_path, pruner):
    bundle = export(checkpoint, tmp_path / "bundle", pruner=pruner)
    recipe, _ = find_recipe(MODEL)
    report = check_with_torch(bundle, recipe, Checkpoint(parts={"main": checkpoint}), questions())
    assert report.passed, report
    assert set(statuses(report).values()) == {"passed"}, statuses(report)
    manifest = open_bundle(bundle).manifest
    assert manifest.tools["family: phi-siglip"] == "1.0"
    with GroundingSession.open(bundle) as session:
        answer = session.ground(questions()[0].image, "the star")
    assert len(answer.keep_indices) == 6
    # Of 32 x 40 pixels the middle square, which the family's own preparation shows.
    assert answer.tokens[0].frame == Frame(left=0, top=4, width=32, height=32)


@pytest.mark.parametrize("method", [pytest.param("rtn", marks=pytest.mark.full), "awq"])
def test_it_is_quantized_and_checked(package, checkpoint, tmp_path, method):
    """AWQ scales what the family groups: one norm's readers, attention and MLP alike."""
    spec = QuantizationSpec(dtype="int4", block_size=32, method=method, lm_head=False)
    asked = questions()
    samples = tuple((question.image, question.expression) for question in asked)
    bundle = export(
        checkpoint,
        tmp_path / "bundle",
        quantization=spec,
        calibration=samples if method == "awq" else None,
    )
    recipe, _ = find_recipe(MODEL)
    report = check_with_torch(bundle, recipe, Checkpoint(parts={"main": checkpoint}), asked)
    assert report.passed, statuses(report)
    if method == "awq":
        scaled = {name.removesuffix(".input_scale") for name in read_header(bundle / SCALES_NAME)}
        layer = {name.partition("layers.0.")[2] for name in scaled if "layers.0." in name}
        attention = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")}
        assert layer == {*attention, "mlp.fc1"}


def test_an_unpruned_export_that_others_made_is_patched(package, checkpoint, tmp_path):
    """Made with torch.onnx.export from transformers' own modules; logits tell whether it holds."""
    made = build_export(checkpoint, tmp_path / "export")
    pruning = PruningRequest(pruner="spatial", keep_ratio=0.4)
    report = patch_export(
        PatchOptions(export=made, recipe=MODEL, pruning=pruning, out=tmp_path / "bundle")
    )
    asked = questions(2)
    verdict = compare_with_unpatched(
        report.bundle, made, [one.image for one in asked], [one.expression for one in asked]
    )
    assert verdict.passed and verdict.compact_max_abs_diff > 0.5, verdict
    with GroundingSession.open(report.bundle) as session:
        assert len(session.ground(asked[0].image, "the star").keep_indices) == 6


@pytest.mark.full
def test_its_forms_for_tensorrt_are_made_in_full(package, checkpoint, tmp_path):
    """The fused one too: rotations of a part of each head, and LayerNorms that stay."""
    made = export(
        checkpoint, tmp_path / "portable", dtype="float16", targets=("orin",), lowering="portable"
    )
    lowerings = {graph.lowering for graph in open_bundle(made).manifest.graphs}
    assert lowerings == {"onnxruntime", "portable"}
    fused = tmp_path / "fused"
    export(checkpoint, fused, dtype="float16", targets=("orin",), lowering="fused")
    kinds = [node.op_type for node in ir.load(fused / "decoder_model_merged_fused_fp16.onnx").graph]
    counts = (kinds.count("Attention"), kinds.count("RotaryEmbedding"), kinds.count("Softmax"))
    assert counts[0] > 0 and counts == (counts[0], 2 * counts[0], 0)
    assert kinds.count("LayerNormalization") and not kinds.count("RMSNormalization")


@pytest.mark.full
def test_random_weights_of_its_shape_need_no_checkpoint(package, tmp_path):
    options = ExportOptions(model=MODEL, random_weights=True, out=tmp_path / "bundle")
    export_model(options)
    with GroundingSession.open(options.out) as session:
        assert len(session.ground(questions(1)[0].image, "star").keep_indices) == 6


BROKEN = {
    "lost": ("lost = no_such_module:X", "ModuleNotFoundError"),
    "other": ("other = tests.outside_family:PHI_SIGLIP", "is not a family of that name"),
    "bare": ("bare = tests.outside_family:Path", "is not a family of that name"),
    "llava": ("llava = tests.outside_family:PHI_SIGLIP", "has a name that is taken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_family_that_cannot_be_used_stops_those_alone_who_ask_for_it(
    package, tmp_path, tiny_recipe, name
):
    entry, says = BROKEN[name]
    install(tmp_path / "site", entry, name="broken")
    OTHER_FAMILIES.forget()
    assert says in str(broken_families()[name])
    assert find_recipe(MODEL) and find_family(tiny_recipe).name == "llava"
    if name != "llava":
        with pytest.raises(GapExportError, match=says):
            find_family(tiny_recipe.model_copy(update={"family": name}))


def test_two_packages_with_one_familys_name_are_refused(package, tmp_path):
    install(tmp_path / "site", "phi_siglip = tests.outside_family:PHI_SIGLIP", name="twin")
    OTHER_FAMILIES.forget()
    assert "comes with several packages: phi-siglip, twin" in str(broken_families()["phi_siglip"])


def test_recipes_that_clash_or_are_not_valid_are_told_and_left_out(
    package, tmp_path, monkeypatch, capsys
):
    home = tmp_path / "recipes"
    source = Path(outside_family.__file__).parent / "recipes" / MODEL / "recipe.yaml"
    for name, text in (
        ("good", source.read_text()),
        ("taken", source.read_text().replace("name: tiny-phi", "name: demo")),
        ("wrong", "name: 7"),
    ):
        (home / name).mkdir(parents=True)
        (home / name / "recipe.yaml").write_text(text)
    mine = replace(outside_family.PHI_SIGLIP, recipes=home)
    monkeypatch.setattr(outside_family, "PHI_SIGLIP", mine)
    OTHER_FAMILIES.forget()
    assert [recipe.name for recipe, folder in list_recipes() if folder.parent == home] == [MODEL]
    taken, wrong = broken_recipes()
    assert "has a name that is taken" in str(taken) and "demo" in str(taken)
    assert "wrong/recipe.yaml" in str(wrong)
    main(["models"])
    printed = capsys.readouterr()
    assert "has a name that is taken" in printed.err and MODEL in printed.out

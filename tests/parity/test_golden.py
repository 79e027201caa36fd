"""Goldens hold what PyTorch gave, bit for bit, and are refused where they are of something else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from gap_export.bundle import open_bundle
from gap_export.errors import OutputError, UsageError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.parity.golden import (
    Golden,
    ReferenceFacts,
    check_golden_place,
    is_golden,
    open_golden,
    record_golden,
)
from gap_export.parity.golden.playback import agree, check_holds_together
from gap_export.parity.question import Question
from gap_export.parity.replay import Call, RecordingBackend
from gap_export.runtime.grounding import ScoredBox
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import QuantizationSpec
from gap_export.version import __version__
from tests.cli.conftest import *  # noqa: F403 - its fixtures
from tests.programs import run_program

FILES = {"golden.json", "golden.json.sha256", "golden.safetensors"}


@pytest.fixture(scope="module")
def recorded(tiny_bundle, tiny_graphs, tmp_path_factory):
    """A golden of two expressions on one image and one on a PNG file, and what went into it."""
    folder = tmp_path_factory.mktemp("golden")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(image[::-1]).save(folder / "own.png")
    questions = [
        Question(image=image, expression="the red circle", box=(1.0, 2.5, 30.0, 1 / 3 + 30)),
        Question(image=image, expression="the big blue square"),
        Question(image=folder / "own.png", expression="object"),
    ]
    recorder = RecordingBackend(TorchBackend(tiny_graphs.reference()))
    calls, answers = [], []
    manifest = open_bundle(tiny_bundle).manifest
    with GroundingSession(manifest, tiny_bundle, recorder) as session:
        for question in questions:
            recorder.calls.clear()
            answers.append(session.ground(question.image, question.expression))
            calls.append(list(recorder.calls))
    given = {
        "manifest": manifest,
        "reference": ReferenceFacts(name=recorder.name, dtype="float32", quantization=None),
        "questions": questions,
        "calls": calls,
        "answers": answers,
        "seed": 7,
    }
    return record_golden(folder / "golden", **given), given


@pytest.fixture
def copied(recorded, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(recorded[0], tmp_path / "golden")
    return tmp_path / "golden"


def rewrite(folder, change):
    """Change golden.json and vouch for it again, as somebody who means harm would."""
    plain = json.loads((folder / "golden.json").read_text())
    change(plain)
    raw = json.dumps(plain).encode()
    (folder / "golden.json").write_bytes(raw)
    line = f"{hashlib.sha256(raw).hexdigest()}  golden.json\n"
    (folder / "golden.json.sha256").write_text(line)


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bool(np.all(one == other))


def test_everything_comes_back_as_it_was_given(recorded):
    path, given = recorded
    golden = open_golden(path, given["manifest"])
    assert {file.name for file in path.iterdir()} == FILES
    assert is_golden(path) and not is_golden(path.parent)
    for mine, theirs in zip(golden.questions, given["questions"], strict=True):
        assert (mine.expression, mine.box) == (theirs.expression, theirs.box)
    assert same(golden.questions[1].image, given["questions"][1].image)
    assert same(golden.questions[2].image, given["questions"][0].image[::-1])
    assert len(golden.calls) == 3
    for mine, theirs in zip(golden.calls, given["calls"], strict=True):
        assert [call.component for call in mine] == [call.component for call in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.inputs.keys() == other.inputs.keys()
            assert one.outputs.keys() == other.outputs.keys()
            for name, array in (*other.inputs.items(), *other.outputs.items()):
                assert same((one.inputs | one.outputs)[name], array), name
    for answer, expected in zip(golden.answers, given["answers"], strict=True):
        assert answer == replace(expected, tokens=answer.tokens)
    assert (golden.spec.dtype, golden.spec.quantization, golden.spec.seed) == ("float32", None, 7)


def test_provenance_says_what_was_recorded_and_when(recorded):
    path, given = recorded
    spec = open_golden(path, given["manifest"]).spec
    when = datetime.strptime(spec.recorded, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - when).total_seconds()) < 3600
    assert spec.tools["gap-export"] == __version__
    assert {"numpy", "torch", "transformers", "python"} <= spec.tools.keys()
    pixels = given["questions"][0].image
    assert spec.questions[0].image_sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    # One image, two expressions: it is there once.
    assert spec.questions[0].image == spec.questions[1].image != spec.questions[2].image
    assert spec.source[0].commit is None
    name = open_golden(path, given["manifest"]).name
    assert name.startswith("golden of PyTorch 2.")
    assert name.endswith(f", recorded {when:%Y-%m-%d %H:%M} UTC")


def test_a_commit_is_known_of_files_from_a_hub_cache(recorded, tmp_path):
    _, given = recorded
    manifest = given["manifest"]
    (part,) = manifest.source.parts
    commit = "0123456789abcdef" * 2 + "01234567"
    moved = replace(part, location=f"/cache/models--a--b/snapshots/{commit}")
    manifest = replace(manifest, source=replace(manifest.source, parts=(moved,)))
    record_golden(tmp_path / "golden", **{**given, "manifest": manifest})
    # Where the files lay is no matter, what they are is.
    golden = open_golden(tmp_path / "golden", given["manifest"])
    assert golden.spec.source[0].commit == commit


def test_other_tools_read_its_arrays(recorded):
    path, given = recorded
    golden = open_golden(path, given["manifest"])
    arrays = load_file(path / "golden.safetensors")
    assert arrays.keys() == golden.spec.tensors.keys()
    assert same(arrays[golden.spec.questions[0].image], given["questions"][0].image)


def test_a_check_against_it_needs_no_package_that_makes_bundles(recorded, tiny_bundle, tmp_path):
    code = """
import sys
blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "polygraphy")
sys.modules.update(dict.fromkeys(blocked))
from gap_export.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = run_program(
        [
            *(sys.executable, "-c", code, "check", tiny_bundle, "--against", recorded[0]),
            *("--report-json", tmp_path / "report.json"),
        ]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reference"].startswith("golden of PyTorch")
    assert (report["passed"], report["questions"], report["seed"]) == (True, 3, 7)
    levels = {level["level"]: level for level in report["backends"][0]["levels"]}
    assert {name for name, level in levels.items() if level["status"] == "not_run"} == set()
    assert levels["token"]["figures"]["equal"] == 3
    assert {row["passed"] for row in levels["tensor"]["rows"]} == {True}


def other(part, **changes):
    """Changes one part of a manifest."""
    return lambda manifest: replace(manifest, **{part: replace(getattr(manifest, part), **changes)})


def other_file(manifest):
    (part,) = manifest.source.parts
    changed = replace(part.files[-1], sha256="0" * 64)
    parts = (replace(part, files=(*part.files[:-1], changed)),)
    return replace(manifest, source=replace(manifest.source, parts=parts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other("pruning", keep_ratio=0.5), r"pruning.keep_ratio: 0.3; allowed: 0.5, the bun"),
        (other("pruning", pruner="cls"), r"pruning.pruner: spatial; allowed: cls, the bun"),
        (other("pruning", positions="compact"), r"pruning.positions: gap; allowed: compact, the"),
        (other("pruning", order="score"), r"pruning.order: raster; allowed: score, the bun"),
        (other("pruning", extra_token="mean"), r"pruning.extra_token: none; allowed: mean, the"),
        (other("pruning", budget="adaptive"), r"pruning.budget: fixed; allowed: adaptive, the"),
        (other("pruning", num_kept_tokens=6), r"pruning.num_kept_tokens: 5; allowed: 6, the bun"),
        (other("model", name="large-llava"), r"model: tiny-llava; allowed: large-llava"),
        (other_file, r"source.main: \S+: SHA-256"),
        (other("source", parts=()), r"source: main; allowed: none"),
        (other("source", random_seed=3), r"random_seed: None; allowed: 3"),
    ],
)
def test_a_golden_of_another_pruning_or_model_is_refused(recorded, change, words):
    path, given = recorded
    with pytest.raises(UsageError, match=f"recorded with another {words}"):
        open_golden(path, change(given["manifest"]))


def test_a_golden_of_another_dtype_is_refused(recorded):
    path, given = recorded
    manifest = given["manifest"]
    half = replace(manifest, graphs=tuple(replace(g, dtype="float16") for g in manifest.graphs))
    with pytest.raises(UsageError, match=r"another dtype: float32; allowed: float16, the bundle's"):
        open_golden(path, half)
    golden = open_golden(path, manifest)
    golden.check_dtype("float32", None)
    with pytest.raises(UsageError, match=r"another dtype: float32; allowed: float16, in which"):
        golden.check_dtype("float16", None)
    int4 = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    with pytest.raises(UsageError, match=r"allowed: float32 with int4 weights \(rtn in blocks"):
        golden.check_dtype("float32", int4)


def test_a_golden_of_another_version_is_refused(recorded, copied):
    _, given = recorded
    rewrite(copied, lambda plain: plain["tools"].update({"gap-export": "9.8"}))
    with pytest.raises(UsageError, match=rf"version of gap-export: 9.8; allowed: {__version__}"):
        open_golden(copied, given["manifest"])
    rewrite(copied, lambda plain: plain.update(format_version=1))
    with pytest.raises(UsageError, match=r"format_version that is not supported: 1; allowed: 3"):
        open_golden(copied, given["manifest"])


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("spoil", ["cut", "flipped", "missing", "link", "empty"])
def test_a_damaged_golden_is_refused_in_one_message(recorded, copied, tmp_path, name, spoil):
    file = copied / name
    raw = file.read_bytes()
    middle = len(raw) // 2
    if spoil == "cut":
        file.write_bytes(raw[:middle])
    elif spoil == "flipped":
        file.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    elif spoil == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    if spoil == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"the golden is damaged or not complete") as raised:
        open_golden(copied, recorded[1]["manifest"])
    assert name in str(raised.value)


def first_call(plain, method):
    return next(call for call in plain["calls"][0] if call["method"] == method)


HOSTILE = {
    "a method of its own": lambda p: p["calls"][0][0].update(method="__exit__"),
    "a call without its input": lambda p: first_call(p, "decode")["inputs"].pop("attention_mask"),
    "an input too many": lambda p: first_call(p, "decode")["inputs"].update(cache="array_0"),
    "no array": lambda p: first_call(p, "decode")["inputs"].update(kept_positions=None),
    "an array there is not": lambda p: first_call(p, "decode")["outputs"].update(logits="../x"),
    "a batch size of many": lambda p: first_call(p, "new_cache")["inputs"].update(
        batch_size=p["questions"][0]["image"]
    ),
    "an array beyond the file": lambda p: p["tensors"]["array_0"].update(offset=1 << 70),
    "an array of all memory": lambda p: p["tensors"]["array_0"].update(shape=[1 << 40, 1 << 40]),
    "a negative shape": lambda p: p["tensors"]["array_0"].update(shape=[-1, -1]),
    "a negative offset": lambda p: p["tensors"]["array_0"].update(offset=-8),
    "an object array": lambda p: p["tensors"]["array_0"].update(dtype="object"),
    "an image that is none": lambda p: p["questions"][0].update(
        image=first_call(p, "encode_image")["inputs"]["pixel_values"]
    ),
    "a question without an answer": lambda p: p["answers"].pop(),
    "another size": lambda p: p.update(tensors_size=1),
    "an unknown key": lambda p: p.update(run="rm -rf"),
    "a wrong type": lambda p: p.update(seed="0"),
    "another format": lambda p: p.update(format="gap-export-bundle"),
    "a box that is text": lambda p: p["questions"][0].update(box=[0, 0, 1, 1]),
    "a box that is an image": lambda p: p["questions"][0].update(box=p["questions"][0]["image"]),
    "another image's hash": lambda p: p["questions"][0].update(image_sha256="0" * 64),
    "arrays that change places": lambda p: p["tensors"]["array_1"].update(
        offset=p["tensors"]["array_0"]["offset"]
    ),
    "other colors": lambda p: p["facts"]["image"].update(mean=[0.5, 0.5, 0.5]),
    "another tokenizer": lambda p: p["facts"]["tokenizers"].update({"tokenizer.json": "0"}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_golden_that_does_not_hold_together_is_refused(recorded, copied, change):
    rewrite(copied, change)
    with pytest.raises(UsageError):
        open_golden(copied, recorded[1]["manifest"])


def test_a_score_may_end_in_other_bits_and_a_box_may_not():
    """The exponential of float32 that numpy takes does, on aarch64 beside x86-64."""
    box = ScoredBox(box=(1.0, 2.0, 3.0, 4.0), score=0.0103140052, found=None)
    rounded = replace(box, score=box.score * (1 + 1e-7))
    assert agree("score", box.score, rounded.score) and agree("boxes", (box,), (rounded,))
    for other in (
        replace(box, score=box.score * (1 + 1e-4)),
        replace(box, score=None),
        replace(box, found=True),
        replace(box, box=(1.0, 2.0, 3.0, 4.0 + 1e-7)),
    ):
        assert not agree("boxes", (box,), (other,))
    assert not agree("boxes", (box,), ())
    assert not agree("score", None, box.score) and agree("score", None, None)
    assert not agree("token_ids", (1, 2), (1, 3))


def leaves(plain, path=()):
    """Path and value of everything that is no object and no list."""
    if not isinstance(plain, dict | list):
        yield path, plain
        return
    for key, inner in plain.items() if isinstance(plain, dict) else enumerate(plain):
        yield from leaves(inner, (*path, key))


def put(plain, path, value):
    for key in path[:-1]:
        plain = plain[key]
    plain[path[-1]] = value


def test_a_number_that_is_changed_is_refused_or_decides_nothing(recorded, copied, tiny_bundle):
    """One of each kind, such as the third token of an answer; hashes are made to fit."""
    _, given = recorded
    bundle, before = open_bundle(tiny_bundle), (copied / "golden.json").read_text()
    check_holds_together(open_golden(copied, given["manifest"]), bundle)
    kinds = {}
    for path, value in leaves(json.loads(before)):
        if isinstance(value, int | float) and not isinstance(value, bool):
            kind = ".".join(
                "*" if isinstance(key, int) else re.sub(r"\d+", "*", key) for key in path
            )
            kinds.setdefault(kind, []).append((path, value))
    accepted = set()
    for kind, found in kinds.items():
        path, value = found[len(found) // 2]
        (copied / "golden.json").write_text(before)
        rewrite(copied, lambda plain, at=path, new=value + 1: put(plain, at, new))
        try:
            check_holds_together(open_golden(copied, given["manifest"]), bundle)
        except UsageError:
            continue
        accepted.add(kind)
    assert {"answers.*.token_ids.*", "tensors.array_*.offset"} <= kinds.keys()
    assert {kind for kind in accepted if ".timings_ms." not in kind} == {
        "seed",
        "source.*.files.*.size",
    }


EDITED = {
    "a token": (
        lambda p: p["answers"][0]["token_ids"].__setitem__(0, 7), "token_ids of the answer"
    ),
    "a text": (lambda p: p["answers"][1].update(text="[0,0,1,1]"), "text of the answer"),
    "a box": (lambda p: p["answers"][2].update(box=[1.0, 2.0, 3.0, 4.0]), "box of the answer"),
    "a kept token": (
        lambda p: p["answers"][0]["keep_indices"].__setitem__(0, 1), "keep_indices of the answer"
    ),
    "another expression": (
        lambda p: p["questions"][0].update(expression="the big blue square"), "input_ids is not"
    ),
    "a warning": (lambda p: p["answers"][0].update(warnings=["x"]), "warnings of the answer"),
    "what was asked": (lambda p: p.update(reference="PyTorch 9"), "backend of the answer"),
    "a call less": (lambda p: p["calls"][0].pop(), "where a session asks for decode"),
    "a call more": (lambda p: p["calls"][0].append(p["calls"][0][-1]), "is one more"),
    "pixels of another image": (
        lambda p: first_call(p, "encode_image")["inputs"].update(
            pixel_values=p["calls"][2][0]["inputs"]["pixel_values"]
        ),
        "pixel_values is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), EDITED.values(), ids=EDITED)
def test_a_golden_that_contradicts_its_own_arrays_is_refused(
    recorded, copied, tiny_bundle, run_cli, change, words
):
    rewrite(copied, change)
    outcome = run_cli("check", tiny_bundle, "--against", copied, "--fail-under", "token=0.1")
    assert outcome.code == 2 and "the golden does not hold together" in outcome.err
    assert words in outcome.err


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b'{"a": NaN}', b"[" * 100_000, b"\xff"])
def test_what_is_not_a_golden_is_refused(recorded, copied, raw):
    (copied / "golden.json").write_bytes(raw)
    line = f"{hashlib.sha256(raw).hexdigest()}  golden.json\n"
    (copied / "golden.json.sha256").write_text(line)
    with pytest.raises(UsageError, match=r"golden\.json"):
        open_golden(copied, recorded[1]["manifest"])
    with pytest.raises(UsageError, match="no golden there"):
        open_golden(copied / "nowhere", recorded[1]["manifest"])


def test_a_place_is_taken_only_where_nothing_is_lost(recorded, copied, tmp_path):
    with pytest.raises(OutputError, match="holds a golden already"):
        check_golden_place(copied, force=False)
    check_golden_place(copied, force=True)
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds something else: .*notes\.txt"):
        check_golden_place(copied, force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="not a folder"):
        check_golden_place(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="does not exist"):
        check_golden_place(tmp_path / "no" / "golden", force=True)
    (tmp_path / "empty").mkdir()
    check_golden_place(tmp_path / "empty", force=False)


def test_recording_replaces_a_golden_only_when_asked_to(recorded, copied):
    _, given = recorded
    with pytest.raises(OutputError, match="--force"):
        record_golden(copied, **given)
    one = {**given, "questions": given["questions"][:1], "seed": 8}
    one |= {"calls": given["calls"][:1], "answers": given["answers"][:1]}
    record_golden(copied, **one, force=True)
    golden = open_golden(copied, given["manifest"])
    assert isinstance(golden, Golden)
    assert (len(golden.questions), golden.spec.seed) == (1, 8)
    assert [path.name for path in copied.parent.iterdir()] == ["golden"]


def test_recording_that_fails_leaves_nothing(recorded, tmp_path, monkeypatch):
    _, given = recorded
    full = OSError(28, "No space left on device")

    def fail(*args, **options):
        raise full

    monkeypatch.setattr("gap_export.parity.golden.recording.sync_tree", fail)
    with pytest.raises(OutputError, match="No space left on device; make room"):
        record_golden(tmp_path / "golden", **given)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="nothing to record: 0 questions"):
        record_golden(tmp_path / "golden", **{**given, "questions": []})


def test_numbers_and_empty_arrays_are_kept_with_their_shape(recorded, tmp_path):
    _, given = recorded
    call = Call(component="new_cache", inputs={"batch_size": np.array([1])}, outputs={})
    embed = Call(
        component="embed_tokens",
        inputs={"input_ids": np.zeros((1, 0), np.int64)},
        outputs={"inputs_embeds": np.arange(6.0, dtype=np.float16).reshape(3, 2).T},
    )
    one = {**given, "questions": given["questions"][:1], "answers": given["answers"][:1]}
    record_golden(tmp_path / "golden", **{**one, "calls": [[call, embed]]})
    (read,) = open_golden(tmp_path / "golden", given["manifest"]).calls
    assert read[0].inputs["batch_size"].tolist() == [1]
    assert read[1].inputs["input_ids"].shape == (1, 0)
    assert read[1].outputs["inputs_embeds"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_margins_of_a_choice_are_kept(recorded, tmp_path):
    _, given = recorded
    (seen, *others), *_ = given["calls"]
    close = replace(seen, margins=np.asarray([1e-7], np.float32))
    one = {**given, "questions": given["questions"][:1], "answers": given["answers"][:1]}
    record_golden(tmp_path / "golden", **{**one, "calls": [[close, *others]]})
    (read,) = open_golden(tmp_path / "golden", given["manifest"]).calls
    assert read[0].margins.tolist() == close.margins.tolist()
    assert all(call.margins is None for call in read[1:])
    for wrong in ("array_no", "array_0"):
        rewrite(tmp_path / "golden", lambda plain, w=wrong: plain["calls"][0][0].update(margins=w))
        with pytest.raises(UsageError, match=f"margins of encode_image are '{wrong}'"):
            open_golden(tmp_path / "golden", given["manifest"])

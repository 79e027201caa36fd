"""The manifest: what goes out comes back, and nothing else comes in."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gap_export.errors import BundleError
from gap_export.spec.manifest import (
    FORMAT_VERSION,
    FileSpec,
    Manifest,
    QuestionSpec,
    TensorPlace,
    TensorSpec,
    TextEncoderSpec,
    TilesSpec,
    check_member_path,
    from_plain,
    parse_manifest,
    to_plain,
)

Place = tuple[str | int, ...]

# The manifest is frozen, so that examples of one test may share it.
sharing = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

PATHS = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?(\.onnx)?", fullmatch=True)
LEAVES: Mapping[type, st.SearchStrategy[Any]] = {
    str: st.text(max_size=10),
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
}


def values_of(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Anything of a manifest field's type; fields that hold paths get safe ones."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {f.name: values_of(hints[f.name], f.name) for f in dataclasses.fields(hint)}
        return st.builds(hint, **fields)  # type: ignore[arg-type]
    if name in ("path", "file", "tokenizer_file"):
        return PATHS
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*[values_of(arg) for arg in args])
    if origin is not None:
        return st.dictionaries(LEAVES[str], values_of(args[1]), max_size=2)
    return LEAVES[hint]


def plain_of(manifest: Manifest) -> dict[str, Any]:
    found = json.loads(manifest.to_json())
    assert isinstance(found, dict)
    return found


def raw_of(plain: Any) -> bytes:
    return json.dumps(plain).encode()


def places_of(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place in JSON data, the root aside."""
    if place:
        yield place
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places_of(value[key], (*place, key))


def replaced(plain: Any, place: Place | str, value: Any) -> Any:
    """A copy with another value at one place, which may be written with dots."""
    if isinstance(place, str):
        place = tuple(int(key) if key.isdigit() else key for key in place.split("."))
    copy = json.loads(json.dumps(plain))
    node = copy
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return copy


@given(values_of(Manifest))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_typed_values_survive_json_and_back(manifest):
    plain = plain_of(manifest)
    fields = {key: plain[key] for key in plain if key not in ("format", "format_version")}
    found = from_plain(Manifest, fields, where="gap.json")
    assert found == manifest
    assert found.to_json() == manifest.to_json()


def test_manifest_survives_its_file_and_back(sample_manifest):
    raw = sample_manifest.to_json()
    assert parse_manifest(raw) == sample_manifest
    assert parse_manifest(raw).to_json() == raw


HUGE = 10**400
NONSENSE: list[tuple[str, Any]] = [
    ("dtype", "float64"),
    ("opset", 0),
    ("opset", 27),
    ("pruning.keep_ratio", 0),
    ("pruning.keep_ratio", 1.01),
    ("pruning.keep_ratio", HUGE),
    ("pruning.seed", -1),
    ("pruning.seed", 2**63),
    ("pruning.text_similarity_sign", 2),
    ("pruning.num_kept_tokens", 0),
    ("pruning.num_kept_tokens", 17),
    ("pruning.num_emitted_tokens", 4),
    ("pruning.num_emitted_tokens", 2**40),
    ("pruning.num_visual_tokens", 15),
    ("grid.rows", 0),
    ("grid.cols", -4),
    ("grid.cols", 65_537),
    ("grid", {"rows": 2000, "cols": 2000}),
    ("image.height", 0),
    ("image.width", 65_537),
    ("image.std.1", 0.0),
    ("image.std.2", -1.0),
    ("image.mean.0", HUGE),
    ("image.pad_color.0", -1),
    ("image.pad_color.2", 256),
    ("box.scale", 0),
    ("prompt.max_new_tokens", 0),
    ("prompt.max_new_tokens", 100_001),
    ("prompt.max_expression_tokens", 0),
    ("prompt.template", "USER: <image> ASSISTANT:"),
    ("prompt.template", "<image> {expression} {expression}"),
    ("text_encoder", {"template": "{expression}", "tokenizer_file": "t.json", "max_tokens": 0}),
    ("text_encoder", {"template": "", "tokenizer_file": "t.json", "max_tokens": 7}),
    ("decoder.num_layers", 0),
    ("decoder.num_layers", 10_001),
    ("decoder.num_key_value_heads", 0),
    ("decoder.head_dim", 0),
    ("decoder.hidden_size", -8),
    ("decoder.vocab_size", 0),
    ("decoder.max_position_embeddings", 0),
    ("decoder.eos_token_ids", []),
    ("decoder.eos_token_ids.0", -1),
    ("decoder.num_taps", -1),
    ("decoder.rope_axes", [0, 1, 2]),
    ("pruning.baked_positions", [[]]),
    ("pruning.baked_positions", [[0, 1], [0, 1]]),
    ("pruning.baked_positions", [[0, -1]]),
    ("graphs.0.dtype", "int4"),
    ("graphs.0.outputs.0.shape.2", -1),
    ("source.parts.0.files.0.size", -1),
    ("source.parts.0.files.0.path", "../model.safetensors"),
    ("source.parts", []),
    ("source.random_seed", 3),
    ("image.preparation", "anyres"),
    ("image.tiles", {"resolutions": [[32, 64]]}),
    ("newline", {"file": "w", "offset": 0, "dtype": "float32", "shape": [8]}),
    ("files", [{"path": "a", "size": -1, "sha256": "0" * 64, "held": "copied"}]),
    ("files", [{"path": "a", "size": 1, "sha256": "0" * 63, "held": "copied"}]),
    ("files", [{"path": "a", "size": 1, "sha256": "G" * 64, "held": "copied"}]),
]


@pytest.mark.parametrize(("where", "value"), NONSENSE)
def test_value_that_makes_no_sense_is_refused(sample_manifest, where, value):
    raw = raw_of(replaced(plain_of(sample_manifest), where, value))
    with pytest.raises(BundleError, match=r"not a sensible value|leaves its folder|not a finite"):
        parse_manifest(raw)


# Sizes that are too large, most of them sensible one by one.
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"image.height": 16_384, "image.width": 16_384}, "pixels of image.height x image.width"),
    ({"image.height": 1, "image.width": 16_385}, "image.width is not"),
    (
        {"grid": {"rows": 600, "cols": 600}, "pruning.num_visual_tokens": 360_000},
        "tokens of grid.rows x grid.cols",
    ),
    (
        {"decoder.num_layers": 2_000, "decoder.num_key_value_heads": 64, "decoder.head_dim": 128},
        "cache of a token",
    ),
    (
        {
            "prompt.max_new_tokens": 100_000,
            "decoder.num_layers": 100,
            "decoder.num_key_value_heads": 100,
            "decoder.head_dim": 128,
        },
        "cache of a prompt and its answer",
    ),
    (
        {"prompt.max_expression_tokens": 100_000, "decoder.hidden_size": 1 << 20},
        "slots of a prompt x width of embeddings",
    ),
    ({"decoder.num_layers": 10**6}, r"decoder\.num_layers .*: 1000000; allowed: 1\.\.10000"),
    ({"decoder.vocab_size": (1 << 24) + 1}, "decoder.vocab_size"),
    ({"decoder.max_position_embeddings": (1 << 24) + 1}, "decoder.max_position_embeddings"),
    ({"graphs.0.outputs.0.shape": [65_536, 65_536]}, "numbers of shape of"),
    ({"graphs.0.outputs.0.shape": [1] * 9}, "rank of shape of"),
]


@pytest.mark.parametrize(("changes", "message"), TOGETHER)
def test_sizes_that_no_machine_holds_together_are_refused(sample_manifest, changes, message):
    plain = plain_of(sample_manifest)
    for where, value in changes.items():
        plain = replaced(plain, where, value)
    with pytest.raises(BundleError, match=message):
        parse_manifest(raw_of(plain))


def test_tiles_and_engines_count_among_the_sizes(sample_manifest):
    plain = plain_of(sample_manifest)
    side = 2048
    plain["image"] |= {"height": side, "width": side, "preparation": "anyres"}
    plain["newline"] = {"file": "w", "offset": 0, "dtype": "float32", "shape": [8]}
    plain["image"]["tiles"] = {"resolutions": [[2 * side, 2 * side]]}
    with pytest.raises(BundleError, match=f"tiles .*: {5 * side * side}; allowed: 1..16777216"):
        parse_manifest(raw_of(plain))
    plain = plain_of(sample_manifest)
    plain["targets"] = [
        {"name": "rtx", "lowering": "portable", "dtype": "float32", "preflight": []}
    ]
    plain["graphs"] = []
    limits = {"max_prompt": 1000, "max_new_tokens": 100, "max_batch": 1, "max_images": 1}
    plain["decoder"] |= {"num_layers": 80, "num_key_value_heads": 64, "head_dim": 128}
    parse_manifest(raw_of({**plain, "engine_limits": limits}))
    for name in ("max_batch", "max_images"):
        changed = {**plain, "engine_limits": {**limits, name: 100_000}}
        if name == "max_images":
            changed["image"] = {**plain["image"], "height": 336, "width": 336}
        with pytest.raises(BundleError, match="engine_limits"):
            parse_manifest(raw_of(changed))


TILED_NONSENSE: list[tuple[str, Any]] = [
    ("newline", None),
    ("newline.shape", [9]),
    ("newline.dtype", "int8"),
    ("newline.offset", -1),
    ("newline.file", "../w"),
    ("image.tiles", None),
    ("image.tiles.resolutions", []),
    ("image.tiles.resolutions.0", [32, 65]),
    ("image.tiles.resolutions.0", [0, 32]),
    ("image.tiles.resolutions.0", [32 * 300, 32]),
]


@pytest.mark.parametrize(("where", "value"), [(None, None), *TILED_NONSENSE])
def test_tiles_and_newline_go_together_and_make_sense(sample_manifest, where, value):
    image = dataclasses.replace(
        sample_manifest.image,
        preparation="anyres",
        tiles=TilesSpec(resolutions=((32, 64), (64, 32))),
    )
    newline = TensorPlace(file="w", offset=0, dtype="float32", shape=(8,))
    tiled = dataclasses.replace(sample_manifest, image=image, newline=newline)
    if where is None:
        assert parse_manifest(tiled.to_json()) == tiled
        return
    with pytest.raises(BundleError, match=r"not a sensible value|leaves its folder"):
        parse_manifest(raw_of(replaced(plain_of(tiled), where, value)))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_number_that_is_not_finite_is_refused(sample_manifest, number):
    raw = sample_manifest.to_json()
    assert raw.count(b'"scale": 1.0') == 1
    with pytest.raises(BundleError, match=r"finite numbers"):
        parse_manifest(raw.replace(b'"scale": 1.0', b'"scale": ' + number))


@pytest.mark.parametrize("seen", [0, 1, 3, 4])
def test_decoder_graph_has_a_key_and_a_value_per_layer(sample_manifest, seen):
    past = tuple(
        TensorSpec(name=f"past_key_values.{i}.key", dtype="float32", shape=()) for i in range(seen)
    )
    graph = dataclasses.replace(
        sample_manifest.graphs[0], component="decoder_model_merged", inputs=past
    )
    manifest = dataclasses.replace(sample_manifest, graphs=(graph,))
    with pytest.raises(BundleError, match=f"past_key_values inputs .*: {seen}; allowed: 2, a key"):
        parse_manifest(manifest.to_json())


# Keys that older manifests do not have.
LATER = ("question", "pruner_text", "long_texts")


def test_a_manifest_from_before_there_was_a_choice_of_text_is_of_the_expression(sample_manifest):
    tower = TextEncoderSpec(template="{expression}", tokenizer_file="t.json", max_tokens=77)
    plain = plain_of(dataclasses.replace(sample_manifest, text_encoder=tower))
    for part, key in (("prompt", LATER[0]), ("pruning", LATER[1]), ("text_encoder", LATER[2])):
        del plain[part][key]
    found = parse_manifest(raw_of(plain))
    assert (found.prompt.question, found.pruning.pruner_text) == (None, "expression")
    assert found.text_encoder == tower and tower.long_texts == "cut"


def test_a_manifest_from_before_published_checkpoints_had_their_own_tiles_is_of_transformers(
    sample_manifest,
):
    tiles = TilesSpec(resolutions=((32, 64),))
    image = dataclasses.replace(sample_manifest.image, preparation="anyres", tiles=tiles)
    newline = TensorPlace(file="x", offset=0, dtype="float32", shape=(8,))
    plain = plain_of(dataclasses.replace(sample_manifest, image=image, newline=newline))
    del plain["image"]["tiles"]["follows"]
    assert parse_manifest(raw_of(plain)).image.tiles == tiles
    plain["image"]["tiles"]["follows"] = "nobody"
    with pytest.raises(BundleError, match="follows"):
        parse_manifest(raw_of(plain))


@pytest.mark.parametrize(
    ("marks", "template", "refused"),
    [
        (("USER:", "ASSISTANT:", "<image>"), "{expression}", False),
        # The declaration and what the tower reads must be one.
        (("USER:", "ASSISTANT:", "<image>"), "a photo of {expression}", True),
        (("HUMAN:", "ASSISTANT:", "<image>"), "{expression}", True),
        (None, "{expression}", True),
    ],
)
def test_a_manifest_that_says_question_holds_the_question(
    sample_manifest, marks, template, refused
):
    question = None
    if marks is not None:
        question = QuestionSpec(**dict(zip(("start", "end", "image"), marks, strict=True)))
    manifest = dataclasses.replace(
        sample_manifest,
        prompt=dataclasses.replace(sample_manifest.prompt, question=question),
        pruning=dataclasses.replace(sample_manifest.pruning, pruner_text="question"),
        text_encoder=TextEncoderSpec(template=template, tokenizer_file="t.json", max_tokens=77),
    )
    if not refused:
        assert parse_manifest(manifest.to_json()) == manifest
        return
    with pytest.raises(BundleError, match=r"pruning\.pruner_text.*question.*allowed: expression"):
        parse_manifest(manifest.to_json())


@pytest.mark.parametrize(
    ("template", "image", "question"),
    [
        ("USER: <image>\nWhere is {expression}? ASSISTANT:", "<image>", "Where is {expression}?"),
        ("A USER: <image> {expression} ASSISTANT: A ASSISTANT:", "<image>",
         "{expression} ASSISTANT: A"),
        ("USER: In the<i><image></i>find {expression} . ASSISTANT:", "<i><image></i>",
         "In the find {expression} ."),
        ("<image> {expression}", "<image>", None),
        ("USER: <image> {expression}", "<image>", None),
        ("{expression} USER: <image> what? ASSISTANT:", "<image>", None),
        ("USER: <image> {expression} ASSISTANT:", "<picture>", None),
    ],
)  # fmt: skip
def test_the_question_is_what_the_user_says_without_the_image(
    sample_manifest, template, image, question
):
    marks = QuestionSpec(start="USER:", end="ASSISTANT:", image=image)
    prompt = dataclasses.replace(sample_manifest.prompt, template=template, question=marks)
    assert prompt.question_template() == question
    assert dataclasses.replace(prompt, question=None).question_template() is None


@sharing
@given(st.data())
def test_missing_key_is_refused_by_name(sample_manifest, data):
    plain = plain_of(sample_manifest)
    named = [p for p in places_of(plain) if isinstance(p[-1], str) and p[0] != "tools"]
    must = [p for p in named if p[0] != "format" and p[-1] not in LATER]
    place = data.draw(st.sampled_from(must))
    node = plain
    for key in place[:-1]:
        node = node[key]  # type: ignore[index]
    del node[place[-1]]  # type: ignore[arg-type]
    expected = "version not supported" if place == ("format_version",) else str(place[-1])
    with pytest.raises(BundleError, match=expected):
        parse_manifest(raw_of(plain))


@sharing
@given(st.data(), st.text(min_size=1, max_size=8))
def test_unknown_key_is_refused_at_any_depth(sample_manifest, data, name):
    plain = plain_of(sample_manifest)
    objects: list[Place] = [()]
    for place in places_of(plain):
        node: Any = plain
        for key in place:
            node = node[key]
        if isinstance(node, dict) and place != ("tools",):
            objects.append(place)
    place = data.draw(st.sampled_from(objects))
    node = plain
    for key in place:
        node = node[key]
    if name in node:
        return
    with pytest.raises(BundleError, match=r"wrong keys.*unknown"):
        parse_manifest(raw_of(replaced(plain, (*place, name), 1)))


@sharing
@given(st.data())
def test_wrong_type_is_refused_at_any_place(sample_manifest, data):
    plain = plain_of(sample_manifest)
    places = [p for p in places_of(plain) if p[0] not in ("format", "format_version")]
    place = data.draw(st.sampled_from(places))
    # An object with an unknown key fits nowhere: not even in tools, whose values are texts.
    with pytest.raises(BundleError):
        parse_manifest(raw_of(replaced(plain, place, {"\0": 1})))


@sharing
@given(st.data())
def test_any_value_anywhere_is_refused_or_kept_as_it_is(sample_manifest, data):
    plain = plain_of(sample_manifest)
    place = data.draw(st.sampled_from(list(places_of(plain))))
    value = data.draw(st.sampled_from([None, True, 0, -1, 1.5, "", "x", [], [1], {}]))
    changed = replaced(plain, place, value)
    try:
        manifest = parse_manifest(raw_of(changed))
    except BundleError:
        return
    assert plain_of(manifest) == changed


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, 1.5, True, [1]])
def test_another_version_is_refused_before_anything_else_is_read(version):
    raw = raw_of({"format": "gap-export-bundle", "format_version": version, "future": 1})
    with pytest.raises(BundleError, match=r"manifest version not supported.*upgrade gap-export"):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'{"format": "other"}', b'"x"']
)
def test_what_is_not_a_manifest_is_refused(raw):
    with pytest.raises(BundleError, match=r"gap\.json is not"):
        parse_manifest(raw)


UNSAFE = ["", ".", "..", "/etc/passwd", "a/../b", "../a", "a//b", "./a", "a/", "a\\b", "C:a", "a\0"]


@pytest.mark.parametrize("path", UNSAFE)
def test_path_outside_the_folder_is_refused_wherever_the_manifest_holds_paths(
    sample_manifest, path
):
    with pytest.raises(BundleError, match="leaves its folder"):
        check_member_path(path)
    file = FileSpec(path=path, size=0, sha256="", held="written")
    graph = dataclasses.replace(sample_manifest.graphs[0], file=path)
    for manifest in (
        dataclasses.replace(sample_manifest, files=(file,)),
        dataclasses.replace(sample_manifest, graphs=(graph,)),
    ):
        with pytest.raises(BundleError, match="leaves its folder"):
            parse_manifest(manifest.to_json())


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "..a", "a..b/c", "über.onnx", "a b"])
def test_plain_relative_path_is_accepted(path):
    assert str(check_member_path(path)) == path


def test_graph_is_found_by_component_and_lowering(sample_manifest):
    assert sample_manifest.graph("embed_tokens") is sample_manifest.graphs[0]
    with pytest.raises(BundleError, match=r"no such graph: decoder .*embed_tokens onnxruntime"):
        sample_manifest.graph("decoder")
    with pytest.raises(BundleError, match=r"embed_tokens portable"):
        sample_manifest.graph("embed_tokens", lowering="portable")


def test_part_of_a_manifest_can_be_read_alone(sample_manifest):
    plain = json.loads(json.dumps(to_plain(sample_manifest.pruning)))
    part = from_plain(type(sample_manifest.pruning), plain, where="pruning")
    assert part == sample_manifest.pruning
    with pytest.raises(BundleError, match="pruning must be an object: list"):
        from_plain(type(sample_manifest.pruning), [], where="pruning")

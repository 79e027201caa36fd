"""Which files are taken, and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.patching.find_export import COMPONENTS, find_export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "export"


def put(folder: Path, *endings: str, components=COMPONENTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for component in components:
        for ending in endings:
            (folder / f"{component}{ending}.onnx").touch()


def names(folder: Path, **options) -> set[str]:
    found = find_export(folder, **options)
    assert found.folder == folder
    return {path.relative_to(folder).as_posix() for path in found.graphs.values()}


@pytest.mark.parametrize("ending", ["", "_fp32", "_fp16"])
@pytest.mark.parametrize("below", ["", "onnx/"])
def test_one_file_of_each_component_is_found(folder, ending, below):
    put(folder / below, ending)
    assert names(folder) == {f"{below}{component}{ending}.onnx" for component in COMPONENTS}


@pytest.mark.parametrize(("variant", "ending"), [("fp32", ""), ("fp16", "_fp16")])
def test_a_variant_that_is_named_is_taken(folder, variant, ending):
    put(folder, "", "_fp16", "_q4")
    wanted = {f"{component}{ending}.onnx" for component in COMPONENTS}
    assert names(folder, variant=variant) == wanted


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("export.json language_model.onnx lm_head.onnx decode.onnx", "transformers' own exporter"),
        ("genai_config.json vision.onnx embedding.onnx text.onnx", "onnxruntime-genai"),
        ("openvino_language_model.xml openvino_language_model.bin", "OpenVINO"),
        ("decoder_model.onnx decoder_with_past_model.onnx", "a decoder in two graphs"),
        ("onnx/model.onnx config.json", "one graph of the whole model"),
        ("config.json model.safetensors", "this is a checkpoint and no ONNX export"),
    ],
)
def test_the_maker_of_another_layout_is_named(folder, files, said):
    for name in files.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(UsageError, match=said):
        find_export(folder)


def test_two_candidates_are_refused_naming_both(folder):
    put(folder, "", "_fp16")
    with pytest.raises(UsageError) as caught:
        find_export(folder)
    message = str(caught.value)
    assert "several files of vision_encoder" in message
    assert "vision_encoder.onnx, vision_encoder_fp16.onnx" in message
    assert "--variant fp32 or --variant fp16" in message


def test_the_same_file_in_two_folders_is_refused(folder):
    put(folder, "")
    put(folder / "onnx", "", components=["decoder_model_merged"])
    with pytest.raises(UsageError) as caught:
        find_export(folder)
    message = str(caught.value)
    assert "decoder_model_merged.onnx, onnx/decoder_model_merged.onnx" in message
    assert message.endswith("move all but one away")


def test_quantized_files_alone_are_refused_naming_them(folder):
    put(folder, "_q4", "_int8")
    with pytest.raises(UsageError) as caught:
        find_export(folder)
    message = str(caught.value)
    assert "vision_encoder_int8.onnx, vision_encoder_q4.onnx" in message
    assert "quantized graphs are not handled" in message


def test_a_missing_component_is_named(folder):
    put(folder, "", components=["vision_encoder", "decoder_model_merged"])
    with pytest.raises(UsageError, match="no embed_tokens that can be patched: none in"):
        find_export(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "no folder of that name"), ("file", "this is a file"), ("nul\0", "cannot be")],
)
def test_what_is_no_folder_is_refused(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message):
        find_export(tmp_path / path)


def test_a_bundle_and_an_unknown_variant_are_refused(folder):
    put(folder, "")
    with pytest.raises(UsageError, match="no such variant: q4; allowed: fp32, fp16"):
        find_export(folder, variant="q4")
    (folder / "gap.json").touch()
    with pytest.raises(UsageError, match="this is a bundle"):
        find_export(folder)


def test_a_link_to_nothing_is_not_called_quantized(folder):
    put(folder, "", components=COMPONENTS[:2])
    (folder / f"{COMPONENTS[2]}.onnx").symlink_to("blobs/lost")
    with pytest.raises(UsageError, match="or a link to what is not there: get the export again"):
        find_export(folder)

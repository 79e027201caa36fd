#!/usr/bin/env python3
"""What is refused, with which exit code: what a change of the code's structure must not change.

    tools/refusals.py                      run all cases; exit code 3 where one ends differently
    tools/refusals.py --section check      only those of a section
    tools/refusals.py --table              print exit code, command and message of each, to compare
    tools/refusals.py --record             write the exit codes anew: only where one is meant

The cases are in tests/contract/refusals.txt, one a line: exit code, words of the message, command.
``{name}`` in a command is a file or folder of :class:`World`. Sections that end in ``full`` take
long.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from huggingface_hub import constants
from PIL import Image
from safetensors.numpy import load_file, save_file

from gap_export.cli import main as run_program
from gap_export.cli.optimum_command import run_export
from gap_export.exporting import ExportOptions, export_model
from gap_export.spec.recipe import models_dir
from gap_export.spec.requests import EnginesRequest, PruningRequest

TABLE = Path(__file__).resolve().parent.parent / "tests/contract/refusals.txt"
ROW = {"image": "a.png", "expression": "the red circle", "box": [1, 2, 20, 20]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that is refused.

    Attributes:
        section: Command, or what kind of file is bad.
        code: Exit code.
        words: What the message says among other things.
        command: Arguments, with names of the world in braces.
    """

    section: str
    code: int
    words: str
    command: str

    @property
    def is_slow(self) -> bool:
        """Whether what it needs takes long to make."""
        return self.section.endswith("full")


def read_cases(path: Path = TABLE) -> list[Case]:
    """All cases of the table."""
    cases, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            code, words, command = (part.strip() for part in line.split(" | ", 2))
            cases.append(Case(section=section, code=int(code), words=words, command=command))
    return cases


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind: its exit code, what it printed, and whether files."""

    code: int
    out: str
    err: str
    left: bool

    @property
    def message(self) -> str:
        """The line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.lower().startswith("error: ")]
        return lines[0] if lines else self.err.strip()


def run_case(case: Case, world: World) -> Outcome:
    """Run a case in this process."""
    words = [world.fill(word) for word in shlex.split(case.command)]
    place = world.root / "work"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with _no_hub(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_export(words[1:]) if words[0] == "optimum" else run_program(words)
    finally:
        os.chdir(before)
    left = any(place.iterdir())
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue(), left=left)


@contextlib.contextmanager
def _no_hub() -> Iterator[None]:
    """The cache of downloads is empty, on whatever machine this runs."""
    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, "/nowhere/hub"
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


class World(dict[str, str]):
    """Files and folders by name, each made when it is first asked for; ``bundle-x`` by ``_x``."""

    def __init__(self, root: Path, bundle: Path | None = None) -> None:
        """Start with nothing made.

        Args:
            root: An empty folder.
            bundle: Of refshapes-llava, spatial, keep 0.3; None: exported when it is needed.
        """
        super().__init__()
        self.root = root
        if bundle is not None:
            self["bundle"] = str(bundle)

    def fill(self, word: str) -> str:
        """A word of a command with paths in place of names."""
        return re.sub(r"\{([\w.-]+)\}", lambda found: self[found[1]], word)

    def __missing__(self, name: str) -> str:
        path = self.root / name
        make: Callable[[Path], object] = getattr(self, "_" + name.replace("-", "_").split(".")[0])
        make(path)
        self[name] = str(path)
        return self[name]

    def _folder(self, path: Path) -> None:
        path.mkdir()

    def _text(self, path: Path) -> None:
        path.write_text("mine\n")

    # Bundles.

    def _bundle(self, path: Path) -> None:
        export_model(
            ExportOptions(
                model="refshapes-llava", pruning=PruningRequest(pruner="spatial"), out=path
            )
        )

    def _bundle_flipped(self, path: Path) -> None:
        self._damaged(path, lambda: _flip(path / "embed_tokens.onnx"))

    def _bundle_short(self, path: Path) -> None:
        self._damaged(path, lambda: os.truncate(path / "decoder_model_merged.onnx", 9))

    def _bundle_missing(self, path: Path) -> None:
        self._damaged(path, (path / "tokenizer.json").unlink)

    def _bundle_unlisted(self, path: Path) -> None:
        self._damaged(path, (path / "notes.txt").touch)

    def _bundle_bare(self, path: Path) -> None:
        self._damaged(path, (path / "gap.json").unlink)

    def _bundle_unhashed(self, path: Path) -> None:
        self._damaged(path, (path / "gap.json.sha256").unlink)

    def _bundle_edited(self, path: Path) -> None:
        self._damaged(path, lambda: _flip(path / "gap.json"))

    def _bundle_link(self, path: Path) -> None:
        graph = path / "embed_tokens.onnx"
        self._damaged(
            path, lambda: (graph.rename(self.root / "moved"), graph.symlink_to(self.root / "moved"))
        )

    def _bundle_newer(self, path: Path) -> None:
        self._manifest(path, format_version=2)

    def _bundle_foreign(self, path: Path) -> None:
        self._manifest(path, surprise=1)

    def _bundle_outside(self, path: Path) -> None:
        self._manifest(path, files=[{"path": "../x", "size": 1, "sha256": "0", "held": "copied"}])

    def _bundle_engines(self, path: Path) -> None:
        self._damaged(path, lambda: (path / "engines/orin").mkdir(parents=True))

    def _damaged(self, path: Path, damage: Callable[[], object]) -> None:
        shutil.copytree(self["bundle"], path)
        damage()

    def _manifest(self, path: Path, **changes: Any) -> None:
        def write() -> None:
            plain = json.loads((path / "gap.json").read_bytes())
            raw = json.dumps({**plain, **changes}).encode()
            (path / "gap.json").write_bytes(raw)
            digest = hashlib.sha256(raw).hexdigest()
            (path / "gap.json.sha256").write_text(f"{digest}  gap.json\n")

        self._damaged(path, write)

    def _bundle_rtx(self, path: Path) -> None:
        export_model(
            ExportOptions(
                model="refshapes-llava",
                engines=EnginesRequest(targets=("orin", "rtx:sm89")),
                out=path,
            )
        )

    def _golden(self, path: Path) -> None:
        arguments = ["check", self["bundle"], "--record", str(path), "--samples", "1", "-q"]
        assert run_program(arguments) == 0

    def _golden_bare(self, path: Path) -> None:
        shutil.copytree(self["golden"], path)
        (path / "golden.json").unlink()

    def _golden_edited(self, path: Path) -> None:
        shutil.copytree(self["golden"], path)
        _flip(path / "golden.json")

    # Checkpoints.

    def _checkpoint(self, path: Path) -> None:
        shutil.copytree(models_dir() / "refshapes-llava", path)

    def _without(self, path: Path, name: str) -> None:
        self._checkpoint(path)
        (path / name).unlink()

    def _checkpoint_norecipe(self, path: Path) -> None:
        self._without(path, "recipe.yaml")

    def _checkpoint_noconfig(self, path: Path) -> None:
        self._without(path, "config.json")

    def _checkpoint_noweights(self, path: Path) -> None:
        self._without(path, "model.safetensors")

    def _checkpoint_notokenizer(self, path: Path) -> None:
        self._without(path, "tokenizer.json")

    def _checkpoint_cut(self, path: Path) -> None:
        self._checkpoint(path)
        os.truncate(path / "model.safetensors", 5000)

    def _checkpoint_lfs(self, path: Path) -> None:
        self._checkpoint(path)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
        (path / "model.safetensors").write_text(pointer)

    def _checkpoint_nan(self, path: Path) -> None:
        self._tensors(path, lambda name, tensor: tensor * np.nan if "up_proj" in name else tensor)

    def _checkpoint_renamed(self, path: Path) -> None:
        self._tensors(path, lambda name, tensor: None if "up_proj" in name else tensor)

    def _checkpoint_shapes(self, path: Path) -> None:
        self._tensors(path, lambda name, tensor: tensor[:-1] if "up_proj" in name else tensor)

    def _checkpoint_float64(self, path: Path) -> None:
        self._tensors(path, lambda _, tensor: tensor.astype(np.float64))

    def _tensors(self, path: Path, change: Callable[[str, Any], Any]) -> None:
        self._checkpoint(path)
        tensors = load_file(path / "model.safetensors")
        changed = {name: change(name, tensor) for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, path / "model.safetensors")

    def _config(self, path: Path, *keys: str, value: Any) -> None:
        self._checkpoint(path)
        plain = place = json.loads((path / "config.json").read_bytes())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (path / "config.json").write_text(json.dumps(plain))

    def _checkpoint_damaged(self, path: Path) -> None:
        self._checkpoint(path)
        (path / "config.json").write_text("{")

    def _checkpoint_qwen(self, path: Path) -> None:
        self._config(path, "text_config", "model_type", value="qwen2")

    def _checkpoint_other(self, path: Path) -> None:
        self._config(path, "model_type", value="llama")

    def _checkpoint_layer(self, path: Path) -> None:
        self._config(path, "vision_feature_layer", value=-1)

    def _checkpoint_quantized(self, path: Path) -> None:
        self._config(path, "quantization_config", value={"quant_method": "awq", "bits": 4})

    def _checkpoint_windows(self, path: Path) -> None:
        self._config(path, "text_config", "model_type", value="gemma3_text")

    def _checkpoint_rope(self, path: Path) -> None:
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
        self._config(path, "text_config", "rope_parameters", value=rope)

    def _gguf(self, path: Path) -> None:
        path.mkdir()
        (path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")

    # Recipes, in a checkpoint's folder.

    def _recipe(self, path: Path, old: str, new: str) -> None:
        self._checkpoint(path)
        text = (path / "recipe.yaml").read_text()
        assert old in text, old
        (path / "recipe.yaml").write_text(text.replace(old, new, 1))

    def _recipe_empty(self, path: Path) -> None:
        self._checkpoint(path)
        (path / "recipe.yaml").write_text("")

    def _recipe_broken(self, path: Path) -> None:
        self._recipe(path, "name:", "name: [")

    def _recipe_unknown_key(self, path: Path) -> None:
        self._recipe(path, "name:", "surprise: 1\nname:")

    def _recipe_twice(self, path: Path) -> None:
        self._recipe(path, "name:", "select_layer: -1\nname:")

    def _recipe_family(self, path: Path) -> None:
        self._recipe(path, "family: llava", "family: lava")

    def _recipe_name(self, path: Path) -> None:
        self._recipe(path, "name: refshapes-llava", "name: ../up")

    def _recipe_pruner(self, path: Path) -> None:
        self._recipe(path, "pruner: ", "pruner: no-")

    def _recipe_prompt(self, path: Path) -> None:
        self._recipe(path, "{expression}", "{sentence}")

    def _recipe_huge(self, path: Path) -> None:
        self._recipe(path, "name:", "#" * 70_000 + "\nname:")

    def _recipe_alias(self, path: Path) -> None:
        self._recipe(path, "name:", "a: &a [x]\nb: *a\nname:")

    # Images.

    def _image(self, path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="JPEG" if path.suffix == ".jpg" else "PNG")

    def _image_other(self, path: Path) -> None:
        self._image(path)

    def _image_empty(self, path: Path) -> None:
        path.touch()

    def _image_cut(self, path: Path) -> None:
        self._image(path)
        os.truncate(path, path.stat().st_size // 2)

    def _image_float(self, path: Path) -> None:
        Image.new("F", (2, 2)).save(path, format="TIFF")

    def _image_wide(self, path: Path) -> None:
        Image.fromarray(np.asarray([[0, 65_536]], dtype=np.int32)).save(path, format="TIFF")

    def _pipe(self, path: Path) -> None:
        os.mkfifo(path)

    # Data sets.

    def _data(self, path: Path, *rows: Any, text: str = "") -> None:
        path.mkdir()
        self._image(path / "a.png")
        lines = [json.dumps(row) for row in rows]
        (path / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines) + text)

    def _data_good(self, path: Path) -> None:
        self._data(path, ROW)

    def _data_empty(self, path: Path) -> None:
        self._data(path)

    def _data_text(self, path: Path) -> None:
        self._data(path, ROW, text="{'image': 3}\n")

    def _data_up(self, path: Path) -> None:
        self._data(path, {**ROW, "image": "../secret.png"})

    def _data_box(self, path: Path) -> None:
        self._data(path, {**ROW, "box": [1, 2, 3]})

    def _data_null(self, path: Path) -> None:
        self._data(path, {**ROW, "expression": None})

    def _data_twice(self, path: Path) -> None:
        self._data(path, {**ROW, "id": "0"}, {**ROW, "id": "0"})

    def _data_splits(self, path: Path) -> None:
        self._data(path, {**ROW, "split": "day"}, {**ROW, "split": "night"})

    def _data_outside(self, path: Path) -> None:
        self._data(path, {**ROW, "box": [10, 10, 700, 20]})

    def _data_gone(self, path: Path) -> None:
        self._data(path, {**ROW, "image": "gone.png"})

    # Exports that somebody else made.

    def _foreign(self, path: Path, *names: str) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).touch()

    def _foreign_genai(self, path: Path) -> None:
        self._foreign(path, "genai_config.json", "vision.onnx", "text.onnx")

    def _foreign_openvino(self, path: Path) -> None:
        self._foreign(path, "openvino_language_model.xml")

    def _foreign_whole(self, path: Path) -> None:
        self._foreign(path, "onnx/model.onnx", "config.json")

    def _foreign_checkpoint(self, path: Path) -> None:
        self._foreign(path, "config.json", "model.safetensors")

    def _foreign_quantized(self, path: Path) -> None:
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self._foreign(path, *(f"{name}_q4.onnx" for name in names))

    def _foreign_state(self, path: Path) -> None:
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self._foreign(path, *(f"{name}.onnx" for name in names))
        (path / "config.json").write_text('{"model_type": "qwen3_5"}')

    def _foreign_two(self, path: Path) -> None:
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self._foreign(path, *(f"{name}{end}.onnx" for name in names for end in ("", "_fp16")))

    def _foreign_part(self, path: Path) -> None:
        self._foreign(path, "vision_encoder.onnx", "decoder_model_merged.onnx")

    def _foreign_empty(self, path: Path) -> None:
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self._foreign(path, *(f"{name}.onnx" for name in names))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def main(
    section: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    table: Annotated[bool, typer.Option(help="Print code, command and message.")] = False,
    record: Annotated[bool, typer.Option(help="Write the exit codes anew.")] = False,
) -> None:
    """Run the cases; exit code 3 where one does not end as the table says."""
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        codes: list[int] = []
        for case in read_cases():
            if section and case.section not in section:
                codes.append(case.code)
                continue
            found = run_case(case, world)
            codes.append(found.code)
            message = found.message.replace(folder, "")
            if table:
                typer.echo(f"{found.code} | {case.command} | {message[:200]}")
            if found.code != case.code or world.fill(case.words) not in found.err or found.left:
                different += 1
                left = " (and left something behind)" if found.left else ""
                typer.echo(
                    f"exit code {found.code}, expected {case.code}{left}: {case.command}\n"
                    f"  expected: {case.words}\n  said: {message}",
                    err=True,
                )
    if record:
        lines = TABLE.read_text(encoding="utf-8").splitlines()
        places = [n for n, line in enumerate(lines) if line[:1].isdigit()]
        for place, code in zip(places, codes, strict=True):
            lines[place] = f"{code}{lines[place][1:]}"
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif different:
        sys.exit(3)


if __name__ == "__main__":
    typer.run(main)

"""Files of a checkpoint's folders that look like weights and were not read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG
from gap_export.checkpoint.weights.files import some
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.lora import ADAPTER_FILES

_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz", ".gguf", ".ggml",
    ".pkl", ".pickle",
})  # fmt: skip
# What training writes beside the weights.
_NO_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*\.(bin|pt|pth|pkl)"
)


def look_for_unread(files: Iterable[tuple[str, Path]]) -> tuple[str, ...]:
    """See that no adapter was passed over, and list what else was.

    Folders within those folders are not looked into: no loader does so by itself.

    Args:
        files: Every file of the checkpoint that was read, with its part.

    Returns:
        A sentence for each folder in which something was not read.

    Raises:
        CheckpointError: an adapter that was not applied.
    """
    read = {path for _, path in files}
    notes = []
    for folder in sorted({path.parent for path in read}):
        names = _names(folder)
        unread = [name for name in names if folder / name not in read]
        _refuse_adapter(folder, unread, applied=folder / ADAPTER_CONFIG in read)
        looks = [
            name
            for name in unread
            if Path(name).suffix in _SUFFIXES and not _NO_WEIGHTS.fullmatch(name)
        ]
        # What lies beside a file that stands alone has nothing to do with it.
        if looks and any(folder / name in read for name in names if name.endswith(".json")):
            notes.append(f"in {folder} these look like weights and were not read: {some(looks)}")
    return tuple(notes)


def _refuse_adapter(folder: Path, unread: list[str], *, applied: bool) -> None:
    found = [name for name in unread if name in {ADAPTER_CONFIG, *ADAPTER_FILES}]
    if not found or applied:
        return
    if ADAPTER_CONFIG not in found:
        what, fix = f"an adapter lies beside the weights without its {ADAPTER_CONFIG}", "get it"
    else:
        what = "an adapter lies beside weights of a layout that adapters are not applied to"
        fix = "merge it with peft's merge_and_unload and export what that saves"
    raise CheckpointError(
        what,
        seen=", ".join(str(folder / name) for name in found),
        fix=f"{fix}; or move the adapter away where it is not to be applied",
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as err:
        raise CheckpointError(
            "the checkpoint's folder cannot be listed", seen=f"{folder}: {err.strerror}"
        ) from err

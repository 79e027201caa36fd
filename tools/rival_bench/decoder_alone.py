"""The decoder of a LLaVA as a model by itself, for runtimes that have no tower."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

_PREFIX = "language_model."
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_decoder(checkpoint: Path, folder: Path) -> None:
    """Write it as transformers' LlamaForCausalLM; what is there already stays.

    Args:
        checkpoint: Of a LLaVA in one file.
        folder: Where it goes.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(_PREFIX)]  # noqa: SIM118
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in _BESIDE:
        shutil.copy(checkpoint / name, folder / name)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    config = {**text, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    config |= {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0}
    # Last, so that its presence says the rest is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    write_decoder(Path(sys.argv[1]), Path(sys.argv[2]))

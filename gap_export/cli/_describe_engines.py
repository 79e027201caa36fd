"""What a bundle has for TensorRT: its targets with their verdicts, and the engines built so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gap_export.cli._terminal import format_size

if TYPE_CHECKING:
    from gap_export.bundle import Bundle
    from gap_export.spec.manifest import Manifest


def find_engines(bundle: Bundle) -> list[dict[str, Any]]:
    """Each folder of engines as JSON data; ``problem`` says why one cannot be used."""
    from gap_export.engines.folder import engine_folders, read_engine_folder
    from gap_export.errors import BundleError

    found: list[dict[str, Any]] = []
    for name in engine_folders(bundle):
        try:
            plan = read_engine_folder(bundle, name).plan
        except BundleError as err:
            found.append({"folder": name, "problem": str(err)})
            continue
        found.append(
            {
                "folder": name,
                "problem": None,
                "library": f"{plan.library} {plan.library_version}",
                "compute_capability": plan.compute_capability,
                "engines": [
                    {
                        "component": engine.component,
                        "size_bytes": engine.size,
                        "lowering": engine.lowering,
                        "dtype": engine.dtype,
                        "quantization": engine.quantization and engine.quantization.dtype,
                        "weights": engine.weights,
                        "profiles": [profile.name for profile in engine.profiles],
                    }
                    for engine in plan.engines
                ],
            }
        )
    return found


def describe_targets(manifest: Manifest) -> list[str]:
    """A section on what the bundle was made for; none where it is nothing."""
    limits = manifest.engine_limits
    if limits is None:
        return []
    lines = [
        f"engines    for prompts of up to {limits.max_prompt} tokens, answers of up to "
        f"{limits.max_new_tokens}, {limits.max_batch} at a time"
    ]
    for target in manifest.targets:
        lines.append(f"target {target.name} ({target.lowering}, {target.dtype})")
        for verdict in target.preflight:
            operators = f" ({', '.join(verdict.operators)})" if verdict.operators else ""
            lines.append(f"  {verdict.component}: {verdict.verdict}{operators}")
            lines += [f"    {reason}" for reason in verdict.reasons]
    return ["\n".join(lines)]


def describe_engines(folders: list[dict[str, Any]]) -> list[str]:
    """A section on the engines; none where there are none."""
    lines: list[str] = []
    for folder in folders:
        if folder["problem"] is not None:
            lines.append(f"engines/{folder['folder']}: cannot be used: {folder['problem']}")
            continue
        lines.append(f"engines/{folder['folder']}: {folder['library']}")
        for engine in folder["engines"]:
            form = ", ".join(
                filter(None, (engine["lowering"], engine["dtype"], engine["quantization"]))
            )
            lines.append(
                f"  {engine['component']}: {format_size(engine['size_bytes'])}, {form}, weights "
                f"{engine['weights']}, profiles {' and '.join(engine['profiles'])}"
            )
    return ["\n".join(lines)] if lines else []

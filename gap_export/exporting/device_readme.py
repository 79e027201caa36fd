"""README.md of a bundle whose engines are built elsewhere: what to type on the device, exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.engines.memory import MemoryEstimate, estimate_memory
from gap_export.engines.plan import ProfileSpec
from gap_export.engines.profiles import make_profiles
from gap_export.engines.targets import Platform, TargetChoice
from gap_export.spec.manifest import GraphSpec, Manifest, PreflightVerdict, TargetSpec
from gap_export.spec.tolerances import TOLERANCES
from gap_export.version import SOURCE, __version__

# For whoever takes the bundle to the device it is for.
README_NAME = "README.md"
# Where the Debian packages of TensorRT put it.
_TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
# The output whose tolerance stands for those of the others.
_LIKE = "image_features"


def device_readme(
    manifest: Manifest, choices: Sequence[TargetChoice], *, folder: Path, wheel: str | None = None
) -> str:
    """The text for the targets that are built on the device they are for.

    Args:
        manifest: Of the bundle, with graphs, targets and engine limits.
        choices: What the bundle was made for; those that any machine builds are left out.
        folder: Where the graphs lie; their weights are not read.
        wheel: File of gap-export itself in that folder; None where it is not there.

    Returns:
        Markdown; empty where no target needs a device.

    Raises:
        BundleError: a graph is no ONNX file, or has a dimension nothing is known of.
    """
    chosen = [choice for choice in choices if choice.target.built_on == "device"]
    if not chosen:
        return ""
    bundle = Bundle(path=folder, manifest=manifest)
    source = SOURCE if wheel is None else f"./{wheel}"
    sections = [_head(manifest), _contents(manifest, wheel), _own_source(wheel)]
    sections += [_target_section(bundle, choice, source) for choice in chosen]
    sections.append(_compare(manifest, chosen[0]))
    return "\n\n".join(sections) + "\n"


def trtexec_line(manifest: Manifest, graph: GraphSpec, choice: TargetChoice) -> str:
    """What builds one engine by NVIDIA's own program, from the bundle's folder; one shell command.

    Raises:
        BundleError: the graph has a dimension that nothing is known of.
    """
    assert manifest.engine_limits is not None
    profiles = make_profiles(manifest, graph, manifest.engine_limits)
    fixed = {t.name for t in graph.inputs if all(isinstance(dim, int) for dim in t.shape)}
    # TensorRT 11 has strong typing alone and ignores the flag; 10.3 to 10.16 need it.
    parts = [f"{_TRTEXEC} --onnx={graph.file} --stronglyTyped --skipInference"]
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            parts.append(f"--profile={index}")
        parts += [
            f"--{which}Shapes={_shapes(profile, which, fixed)}" for which in ("min", "opt", "max")
        ]
    parts.append(f"--saveEngine=engines/{choice.folder}/{graph.component}.engine")
    return " \\\n  ".join(parts)


def compare_line(manifest: Manifest, graph: GraphSpec) -> str:
    """What runs one graph in ONNX Runtime and in TensorRT and compares, by Polygraphy.

    Raises:
        BundleError: the graph has a dimension that nothing is known of.
    """
    assert manifest.engine_limits is not None
    profile = make_profiles(manifest, graph, manifest.engine_limits)[0]
    shapes = " ".join(
        f"{name}:[{','.join(map(str, three.opt))}]" for name, three in profile.shapes.items()
    )
    # Polygraphy knows no share of the largest value; here values are about 1.
    allowed = TOLERANCES.get(graph.dtype, {}).get(_LIKE)
    flags = "" if allowed is None else f" --atol {allowed.atol + allowed.largest_fraction:.2g}"
    return (
        f"polygraphy run {graph.file} --onnxrt --trt --strongly-typed{flags} \\\n"
        f"  --input-shapes {shapes}"
    )


def _shapes(profile: ProfileSpec, which: str, fixed: Collection[str]) -> str:
    # Of an input that holds a size, trtexec takes that size for its shape.
    ranges = {**profile.shapes, **profile.values}
    return ",".join(
        f"{name}:{'x'.join(map(str, getattr(three, which)))}"
        for name, three in ranges.items()
        if name in profile.values or name not in fixed
    )


def _head(manifest: Manifest) -> str:
    pruning = manifest.pruning
    least = "1 to " if pruning.budget == "adaptive" else ""
    return (
        f"# {manifest.model.name}, pruned to {least}{pruning.num_kept_tokens} of "
        f"{pruning.num_visual_tokens} visual tokens\n\n"
        f"Made by gap-export {__version__}. TensorRT engines fit the device they were built on and "
        "no other, so they are built there, from what is in this folder. Nothing below was run on "
        "your device: the commands follow from the graphs, the verdicts from a look at them."
    )


def _own_source(wheel: str | None) -> str:
    """Where gap-export itself comes from: from no index, where its name is anybody's to take."""
    if wheel is not None:
        return (
            f"gap-export itself is here, as `{wheel}`. What it needs besides comes from pip's "
            "index; gap-export is on none, so never install it by its bare name."
        )
    return (
        f"`{SOURCE}` below is a wheel file or a checkout of gap-export {__version__}, brought "
        "along beside this folder: on the host, `pip wheel --no-deps CHECKOUT` makes a wheel file "
        "of a checkout, and `gap-export export --wheel` puts one into the bundle. It is on no "
        "package index, so never install it by its bare name."
    )


def _contents(manifest: Manifest, wheel: str | None) -> str:
    limits = manifest.engine_limits
    assert limits is not None
    rows = []
    for graph in manifest.graphs:
        what, quantization = (
            f"{graph.component}, {graph.lowering}, {graph.dtype}",
            graph.quantization,
        )
        if quantization is not None:
            what += f", weights {quantization.dtype} in blocks of {quantization.block_size}"
        rows.append((f"`{graph.file}`", what))
    rows += [
        ("`*.safetensors` and the like", "weights; the graphs point into them by offset"),
        ("`tokenizer.json` and the like", "what turns text into token ids"),
        ("`gap.json`", "what all of it is, with a hash of every file"),
        *([(f"`{wheel}`", "gap-export itself, for pip")] if wheel is not None else []),
        ("`engines/`", "engines, once they are built; nothing else here may change"),
    ]
    return (
        f"## What is in here\n\n{_table(('file', 'what'), rows)}\n\n"
        f"Engines are built for prompts of up to {limits.max_prompt} tokens after pruning, answers "
        f"of up to {limits.max_new_tokens}, {limits.max_batch} at a time, of up to "
        f"{limits.max_images} pictures or tiles."
    )


def _target_section(bundle: Bundle, choice: TargetChoice, source: str) -> str:
    manifest, target = bundle.manifest, choice.target
    made = manifest.target(target.name)
    graphs = _graphs_of(manifest, made)
    assert manifest.engine_limits is not None
    estimate = estimate_memory(bundle, graphs, manifest.engine_limits)
    platforms = [p for p in target.platforms if made.lowering in p.lowerings]
    parts = [
        f"## {target.summary}: `{target.name}`",
        "Copy this folder to the device (`rsync -a`), and work in it.",
        *(_platform_section(platform, choice, source) for platform in platforms),
        _memory(estimate),
        _preflight(made.preflight),
        _trtexec(manifest, graphs, choice),
    ]
    return "\n\n".join(parts)


def _graphs_of(manifest: Manifest, made: TargetSpec) -> tuple[GraphSpec, ...]:
    return tuple(g for g in manifest.graphs if (g.lowering, g.dtype) == (made.lowering, made.dtype))


def _platform_section(platform: Platform, choice: TargetChoice, source: str) -> str:
    low, high = (".".join(map(str, v)) for v in (platform.min_version, platform.max_version))
    versions = low if low == high else f"{low} to {high}"
    known = [f"TensorRT {versions}"]
    known += [f"Python {platform.python}"] if platform.python else []
    known += [f"CUDA {platform.cuda}"] if platform.cuda else []
    target = choice.target.name
    lines = [
        *_install_lines(platform, environment=f"~/gap-{target}"),
        f'python3 -c "import tensorrt; print(tensorrt.__version__)"   # {versions}',
        f"python3 -m pip install --no-deps {source}",
        f"python3 -m gap_export.engines build . --target {target}",
    ]
    cuda = platform.cuda
    toolkit = "cuda-python" if cuda is None else f"cuda-python=={cuda.partition('.')[0]}.*"
    run = [
        f'python3 -m pip install {source} "{toolkit}"',
        "gap-export doctor   # what is there, and which engines can be built and run",
        'gap-export ground . PICTURE "the red cup on the left" --backend trt',
    ]
    return (
        f"### {platform.name} ({', '.join(known)})\n\n"
        "Build; this needs no more than numpy and TensorRT. `--only COMPONENT` builds one engine "
        f"at a time, which helps where memory is short:\n\n{_code(lines)}\n\n"
        f"Run:\n\n{_code(run)}"
    )


def _install_lines(platform: Platform, *, environment: str) -> list[str]:
    """How TensorRT gets there: with the system where that has its own, else from pip."""
    activate = f". {environment}/bin/activate"
    if platform.python is None:
        low = ".".join(map(str, platform.min_version))
        major, minor = platform.max_version
        return [
            f"python3 -m venv {environment} && {activate}",
            f'python3 -m pip install "tensorrt>={low},<{major}.{minor + 1}" "numpy>=1.26"',
        ]
    return [
        "sudo apt-get install -y nvidia-jetpack python3-venv   # brings TensorRT",
        f"python3 -m venv --system-site-packages {environment} && {activate}",
        'python3 -m pip install "numpy>=1.26"',
    ]


def _memory(estimate: MemoryEstimate) -> str:
    rows = [
        ("weights of all engines", _size(estimate.weights)),
        ("KV cache", _size(estimate.kv_cache)),
        ("activations, roughly", _size(estimate.activations)),
        ("**running, together**", _size(estimate.running)),
        ("**building the largest engine, roughly**", _size(estimate.building)),
    ]
    return f"### Memory, as estimated\n\n{_table(('what', 'size'), rows)}"


def _preflight(verdicts: Sequence[PreflightVerdict]) -> str:
    rows = [(v.component, v.verdict, ", ".join(v.operators) or "-") for v in verdicts]
    lines = [f"- {v.component}: {reason}" for v in verdicts for reason in v.reasons]
    legend = (
        "*fine*: all of it is documented for the oldest TensorRT above; *unverified*: the "
        "operators named are not documented for it as the graph uses them; *blocked*: it will not "
        "build there."
    )
    parts = ["### Pre-flight", _table(("component", "verdict", "operators"), rows), legend]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _trtexec(manifest: Manifest, graphs: Sequence[GraphSpec], choice: TargetChoice) -> str:
    lines = [trtexec_line(manifest, graph, choice) for graph in graphs]
    return (
        "### The same by `trtexec`\n\n"
        "For measuring, or for a runtime of your own. Such engines have no `engine.json`, which "
        "says what they were built from and for, so gap-export does not run them; its own build "
        f"replaces the folder.\n\n{_code([f'mkdir -p engines/{choice.folder}', *lines])}"
    )


def _compare(manifest: Manifest, choice: TargetChoice) -> str:
    graphs = _graphs_of(manifest, manifest.target(choice.target.name))
    smallest = min(graphs, key=lambda graph: len(graph.inputs))
    return (
        "## Compare a component with ONNX Runtime\n\n"
        "By [Polygraphy](https://github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy) "
        "(`pip install polygraphy onnx onnxruntime`), on inputs it draws at random:\n\n"
        f"{_code([compare_line(manifest, smallest)])}"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(lines: Iterable[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def _size(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"

"""Real graphs in ONNX Runtime: cache, batches, refusals, and no torch anywhere."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backends import onnxruntime_backend
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.backends.onnxruntime_options import session_options
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import Activations, GraphSpec, Manifest, QuantizationSpec
from gap_export.spec.tolerances import TOLERANCES, tolerances_of
from tests.parity.mutants import rewrite
from tests.programs import run_program
from tests.shared import SharedExports

EXPRESSIONS = [
    "the star",
    "the small red circle above the big blue square",
    "green object",
    "the left-most star",
]
Rebuild = Callable[..., Path]
DECODER = "decoder_model_merged"


@pytest.fixture
def backend(tiny_bundle: Path) -> Iterator[OnnxRuntimeBackend]:
    with OnnxRuntimeBackend(open_bundle(tiny_bundle)) as opened:
        yield opened


@pytest.fixture
def rebuild(tiny_bundle: Path, tmp_path: Path) -> Rebuild:
    """A copy of the bundle with some files' bytes or manifest entries changed, hashes right."""

    def build(contents: dict[str, bytes] | None = None, **changes: Any) -> Path:
        def edit_folder(folder: Path) -> None:
            for name, content in (contents or {}).items():
                (folder / name).write_bytes(content)

        return rewrite(
            tiny_bundle,
            tmp_path / "rebuilt",
            edit_folder=edit_folder,
            edit_manifest=lambda manifest: dataclasses.replace(manifest, **changes),
        )

    return build


def random_prompt(manifest: Manifest, length: int, rows: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    hidden = manifest.decoder.hidden_size
    return {
        "inputs_embeds": rng.normal(size=(rows, length, hidden)).astype(np.float32),
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None].repeat(rows, axis=0),
        "kept_positions": np.sort(rng.permutation(40)[:6]).astype(np.int64)[None].repeat(rows, 0),
    }


def test_cache_grown_step_by_step_equals_one_prefill(backend, tiny_bundle):
    given = random_prompt(open_bundle(tiny_bundle).manifest, 9)
    at_once = backend.decode(given, backend.new_cache(1, 9))
    cache = backend.new_cache(1, 9)
    start = 0
    for end in (4, 5, 7, 9):
        step = {
            "inputs_embeds": given["inputs_embeds"][:, start:end],
            "attention_mask": given["attention_mask"][:, :end],
            "position_ids": given["position_ids"][:, start:end],
            "kept_positions": given["kept_positions"],
        }
        logits = backend.decode(step, cache)
        start = end
        assert cache.length == end
    np.testing.assert_allclose(logits, at_once, atol=1e-4)
    compact = given | {"kept_positions": np.arange(6, dtype=np.int64)[None]}
    other = backend.decode(compact, backend.new_cache(1, 9))
    assert np.abs(other - at_once).max() > 1e-2


@pytest.mark.parametrize("num_rows", [1, 3])
def test_forked_caches_go_on_from_one_row_that_stays_as_it_is(backend, tiny_bundle, num_rows):
    given = random_prompt(open_bundle(tiny_bundle).manifest, 9, rows=num_rows)
    first = {name: values[:1] for name, values in given.items()}
    first["inputs_embeds"] = given["inputs_embeds"][:1, :5]
    first["attention_mask"], first["position_ids"] = np.ones((1, 5), np.int64), np.arange(5)[None]
    cache = backend.new_cache(1, 5)
    backend.decode(first, cache)
    # The rows share their first tokens alone.
    shared = given["inputs_embeds"].copy()
    shared[:, :5] = shared[:1, :5]
    at_once = backend.decode(given | {"inputs_embeds": shared}, backend.new_cache(num_rows, 9))
    rest = given | {
        "inputs_embeds": shared[:, 5:],
        "position_ids": given["position_ids"][:, 5:],
    }
    for _ in range(2):
        fork = backend.fork_cache(cache, num_rows, 9)
        assert (fork.batch_size, fork.length) == (num_rows, 5)
        np.testing.assert_allclose(backend.decode(rest, fork), at_once, atol=1e-4)
        assert (fork.length, cache.length) == (9, 5)


def test_cache_is_held_by_onnx_runtime_not_by_numpy(tiny_bundle):
    opened = open_bundle(tiny_bundle)
    manifest = opened.manifest
    with OnnxRuntimeBackend(opened, form="base") as backend:
        cache = backend.new_cache(2, 9)
        backend.decode(random_prompt(manifest, 5, rows=2), cache)
    spec = manifest.decoder
    assert len(cache.values) == 2 * spec.num_layers
    for name, value in cache.values.items():
        assert name.startswith("past_key_values.")
        assert isinstance(value, ort.OrtValue)
        assert value.shape() == [2, spec.num_key_value_heads, 5, spec.head_dim]


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_text_bundle"])
def test_rows_of_different_length_equal_the_rows_alone(request, image, fixture):
    with GroundingSession.open(request.getfixturevalue(fixture)) as session:
        alone = [session.ground(image, expression) for expression in EXPRESSIONS]
        together = session.ground_batch(image, EXPRESSIONS)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.keep_indices == other.keep_indices
        assert one.box == other.box


def test_compact_positions_give_other_answers(tiny_bundle, image):
    answers = []
    for positions in ("gap", "compact"):
        with GroundingSession.open(tiny_bundle, positions=positions) as session:  # type: ignore[arg-type]
            found = session.ground_batch(image, EXPRESSIONS)
            answers.append([answer.token_ids for answer in found])
    assert answers[0] != answers[1]


@pytest.mark.parametrize("form", ["base", "ort"])
def test_a_closed_backend_holds_no_graph(tiny_bundle, form):
    backend = OnnxRuntimeBackend(open_bundle(tiny_bundle), form=form)
    graph = weakref.ref(backend._sessions[DECODER])
    backend.close()
    gc.collect()
    assert graph() is None


def test_name_says_what_runs(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    for form, word in (("base", ""), ("ort", ", form ort"), (None, ", form ort")):
        with OnnxRuntimeBackend(bundle, ["CPUExecutionProvider"], 1, form=form) as backend:
            assert backend.name == f"ONNX Runtime {ort.__version__} (CPUExecutionProvider{word})"
    one_form = tuple(g for g in bundle.manifest.graphs if g.lowering == "onnxruntime")
    old = dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, graphs=one_form)
    )
    with OnnxRuntimeBackend(old) as backend:
        assert set(backend.forms.values()) == {"onnxruntime"}
    with pytest.raises(UsageError, match="no such form: ort; allowed: base; export it again"):
        OnnxRuntimeBackend(old, form="ort")


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_form_that_does_not_run_here_gives_way_to_the_base_form(rebuild, content, caplog, image):
    """As where this ONNX Runtime has not got one of its operators."""
    bundle = rebuild(contents={f"{DECODER}_ort_fp32.onnx": content})
    with GroundingSession.open(bundle) as session:
        assert "form" not in session.ground(image, "the star").backend
    assert f"ONNX Runtime {ort.__version__} refuses {DECODER}_ort_fp32.onnx" in caplog.text
    with pytest.raises(UsageError, match=f"form ort of {DECODER} does not run here"):
        GroundingSession.open(bundle, form="ort")


def test_a_runtime_that_cannot_continue_a_prompt_runs_the_base_form(
    tiny_bundle, caplog, image, monkeypatch
):
    """GroupQueryAttention of ONNX Runtime 1.19 forgets what was fed before several tokens."""
    monkeypatch.setattr(ort, "__version__", "1.19.2")
    with GroundingSession.open(tiny_bundle) as session:
        assert "form" not in session.ground(image, "the star").backend
    assert "cannot continue a prompt: onnxruntime 1.19.2" in caplog.text
    with pytest.raises(UsageError, match=r"does not run here.*onnxruntime 1\.19\.2"):
        GroundingSession.open(tiny_bundle, form="ort")
    monkeypatch.setattr(ort, "__version__", "1.20.0")
    with GroundingSession.open(tiny_bundle, form="ort") as session:
        assert "form ort" in session.backend.name


@pytest.mark.parametrize("providers", [["NoSuchProvider"], []])
def test_execution_provider_that_is_not_there_is_refused(tiny_bundle, providers):
    with pytest.raises(UsageError, match=r"not supported.*allowed: .*CPUExecutionProvider"):
        GroundingSession.open(tiny_bundle, execution_providers=providers)


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def cuda_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime names CUDA, and then runs on the CPU, as where its libraries are missing."""
    if CUDA[0] in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(ort, "get_available_providers", lambda: CUDA)


@pytest.mark.usefixtures("cuda_that_does_not_load")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("providers", [CUDA, CUDA[:1]])
def test_asked_for_provider_that_does_not_load_is_refused(tiny_bundle, providers):
    with pytest.raises(
        UsageError, match=r"could not be loaded: CUDA.*cuDNN.*uninstall -y onnxrunt"
    ):
        GroundingSession.open(tiny_bundle, execution_providers=providers)


@pytest.mark.usefixtures("cuda_that_does_not_load")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_default_falls_back_to_the_cpu(tiny_bundle, image):
    with GroundingSession.open(tiny_bundle) as session:
        answer = session.ground(image, "the star")
    assert answer.backend == f"ONNX Runtime {ort.__version__} (CPUExecutionProvider)"


def fail_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ort.InferenceSession

    def start(path: str, options: Any, *, providers: list[str], **given: Any) -> Any:
        if CUDA[0] in providers:
            raise RuntimeError("no CUDA-capable device is detected\nmore")
        return real(path, options, providers=providers, **given)

    monkeypatch.setattr(ort, "InferenceSession", start)


@pytest.mark.usefixtures("cuda_that_does_not_load")
def test_failing_gpu_is_not_blamed_on_the_bundle(tiny_bundle, monkeypatch):
    fail_on_cuda(monkeypatch)
    with pytest.raises(UsageError, match=r"could not be loaded: .*no CUDA-capable device is det"):
        GroundingSession.open(tiny_bundle, execution_providers=CUDA)
    with GroundingSession.open(tiny_bundle) as session:
        assert "CPUExecutionProvider" in session.backend.name


OPEN_AND_WAIT = (
    "import sys, time; from gap_export import GroundingSession\n"
    "with GroundingSession.open(sys.argv[1]): time.sleep(float(sys.argv[2]))\n"
)


def without_switch(**variables: str) -> dict[str, str]:
    """The environment of a user who has never heard of ONNX Runtime's telemetry."""
    inherited = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    return {**inherited, "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", **variables}


@pytest.mark.parametrize("home", ["empty", "missing"])
def test_session_stores_no_device_id_and_says_nothing(tiny_bundle, tmp_path, home):
    folder = tmp_path / "home"
    if home == "empty":
        folder.mkdir()
    done = run_program(
        [sys.executable, "-c", OPEN_AND_WAIT, str(tiny_bundle), "0"],
        env=without_switch(HOME=str(folder)),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in left if "gap-export" not in path.parts] == []


def _can_trace() -> bool:
    tool = shutil.which("strace")
    return tool is not None and run_program([tool, "-qq", "true"]).returncode == 0


@pytest.mark.full  # It waits for 12 seconds.
def test_session_that_stays_open_looks_up_no_host(tiny_bundle, tmp_path):
    if not _can_trace():
        pytest.skip("strace, which shows name look-ups, is not installed or not permitted here")
    trace = tmp_path / "trace"
    tracing = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmmsg", "-o", str(trace)]
    # Without the switch ONNX Runtime 1.32 asks DNS after 9.4 s.
    waiting = [sys.executable, "-c", OPEN_AND_WAIT, str(tiny_bundle), "10.5"]
    done = run_program([*tracing, *waiting], env=without_switch(HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    calls = trace.read_text(encoding="utf-8", errors="replace").splitlines()
    assert [line for line in calls if "AF_UNIX" not in line and "exited with" not in line] == []


@pytest.mark.parametrize("value", ["0", "1"])
def test_switch_that_the_user_has_set_is_left_alone(value):
    code = (
        "import os; from gap_export.runtime.backends.quiet_onnxruntime import TELEMETRY_SWITCH\n"
        "print(os.environ[TELEMETRY_SWITCH])"
    )
    done = run_program(
        [sys.executable, "-c", code],
        env=without_switch(ORT_DISABLE_TELEMETRY=value, HOME="/nonexistent"),
    )
    assert done.stdout.strip() == value


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(),
    reason="this ONNX Runtime has CUDA, so asking for it is fine",
)
def test_missing_cuda_says_what_to_install(tiny_bundle):
    with pytest.raises(UsageError, match=r"CUDAExecutionProvider.*pip install onnxruntime-gpu"):
        GroundingSession.open(tiny_bundle, execution_providers=["CUDAExecutionProvider"])


@pytest.mark.parametrize("num_threads", [0, -1, 100_000])
def test_number_of_threads_out_of_range_is_refused(tiny_bundle, num_threads):
    with pytest.raises(UsageError, match=f"number of threads out of range: {num_threads}"):
        GroundingSession.open(tiny_bundle, num_threads=num_threads)


def moved(location: str) -> Callable[[Path], dict[str, Any]]:
    """Word embeddings whose weights are said to lie elsewhere."""

    def change(bundle: Path) -> dict[str, Any]:
        model = onnx.load(bundle / "embed_tokens.onnx", load_external_data=False)
        entries = [e for tensor in model.graph.initializer for e in tensor.external_data]
        places = [entry for entry in entries if entry.key == "location"]
        assert places
        for entry in places:
            entry.value = location
        return {"contents": {"embed_tokens.onnx": model.SerializeToString()}}

    return change


def renamed(name: bytes) -> Callable[[Path], dict[str, Any]]:
    """A vision encoder one of whose names is not UTF-8."""

    def change(bundle: Path) -> dict[str, Any]:
        content = (bundle / "vision_encoder.onnx").read_bytes()
        spoilt = content.replace(name, name[:-1] + b"\xff")
        assert spoilt != content
        return {"contents": {"vision_encoder.onnx": spoilt}}

    return change


def other_decoder(change: Callable[[GraphSpec], list[GraphSpec]]) -> Any:
    def change_all(bundle: Path) -> dict[str, Any]:
        graphs = open_bundle(bundle).manifest.graphs
        kept = (change(g) if g.component == DECODER else [g] for g in graphs)
        return {"graphs": tuple(graph for each in kept for graph in each)}

    return change_all


def holding(content: bytes) -> Any:
    return lambda bundle: {"contents": {f"{DECODER}.onnx": content}}


REFUSED = [
    (holding(b""), r"refuses decoder_model_merged\.onnx"),
    (holding(b"not a graph"), r"refuses decoder_model_merged\.onnx"),
    *((renamed(n), r"refuses vision_encoder\.onnx") for n in (b"pixel_values", b"keep_indices")),
    (renamed(b"image_features"), r"refuses vision_encoder\.onnx"),
    (moved("../outside.safetensors"), r"refuses embed_tokens\.onnx"),
    (moved("/etc/hostname"), r"refuses embed_tokens\.onnx"),
    (
        other_decoder(lambda graph: [dataclasses.replace(graph, inputs=graph.inputs[1:])]),
        r"inputs of decoder_model_merged\.onnx are not",
    ),
    (other_decoder(lambda graph: []), "no such graph: decoder_model_merged"),
    (lambda bundle: {"dtype": "bfloat16"}, "cannot run the bundle's dtype: bfloat16"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_a_bundle_that_cannot_be_run_is_refused(rebuild, tiny_bundle, tmp_path, change, words):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((tiny_bundle / "model.safetensors").read_bytes())
    with pytest.raises(BundleError, match=words):
        GroundingSession.open(rebuild(**change(tiny_bundle)), form="base")


def test_folder_whose_name_is_no_text_is_refused(tiny_bundle, tmp_path):
    bundle = tmp_path / os.fsdecode(b"n\xff")
    shutil.copytree(tiny_bundle, bundle)
    with pytest.raises(UsageError, match=r"whose name is not UTF-8: .*n\\udcff/"):
        GroundingSession.open(bundle)


def test_failure_while_computing_is_one_clear_error(backend, tiny_bundle, capfd):
    given = random_prompt(open_bundle(tiny_bundle).manifest, 5)
    given["attention_mask"] = np.ones((1, 3), np.int64)
    with pytest.raises(UsageError, match="attention mask of another size"):
        backend.decode(given, backend.new_cache(1, 9))
    with (
        OnnxRuntimeBackend(open_bundle(tiny_bundle), form="base") as base,
        pytest.raises(GapExportError, match="ONNX Runtime failed while computing"),
    ):
        base.decode(given, base.new_cache(1, 9))
    with pytest.raises(GapExportError, match="ONNX Runtime failed while computing"):
        backend.run("embed_tokens", {"input_ids": np.asarray([[10**6]])})
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def quantized_bundle(tiny_checkpoint: Path, exports: SharedExports) -> Path:
    spec = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
    return exports.bundle(model=str(tiny_checkpoint), keep_ratio=0.3, quantization=spec)


def decode_with(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    declared: Activations = "float",
    change: Any = lambda options: None,
) -> Any:
    """Logits of a random prompt; what the manifest declares, and the session's options, changed."""

    def options(num_threads: int | None, **others: Any) -> ort.SessionOptions:
        made = session_options(num_threads, **others)
        change(made)
        return made

    monkeypatch.setattr(onnxruntime_backend, "session_options", options)
    opened = open_bundle(bundle)
    manifest = opened.manifest
    graphs = [
        dataclasses.replace(graph, activations=declared if graph.quantization else "float")
        for graph in manifest.graphs
    ]
    opened = dataclasses.replace(
        opened, manifest=dataclasses.replace(manifest, graphs=tuple(graphs))
    )
    with OnnxRuntimeBackend(opened, ["CPUExecutionProvider"], 1) as backend:
        assert backend.quantization == manifest.graph("decoder_model_merged").quantization
        assert backend.activations == declared
        return backend.decode(random_prompt(opened.manifest, 9), backend.new_cache(1, 9))


def test_quantized_decoder_computes_with_the_activations_its_bundle_declares(
    quantized_bundle, monkeypatch
):
    def as_the_graph_says(options: ort.SessionOptions) -> None:
        # Weights are dequantized, and multiplied as floats.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

    wanted = decode_with(quantized_bundle, monkeypatch, change=as_the_graph_says)
    logits = decode_with(quantized_bundle, monkeypatch)
    tolerance = TOLERANCES["float32"]["logits"]
    np.testing.assert_allclose(logits, wanted, atol=tolerance.atol, rtol=tolerance.rtol)
    off = np.abs(decode_with(quantized_bundle, monkeypatch, declared="int8") - wanted).max()
    largest = float(np.abs(wanted).max())
    assert 10 * tolerance.atol < off
    assert off <= tolerances_of("float32", "int8")["logits"].absolute(largest)


@pytest.mark.parametrize("component", ["text_encoder", "token_pruner", "newline", "tower"])
def test_a_component_that_the_model_has_not_got_is_refused(backend, component):
    with pytest.raises(UsageError, match=rf"no such component: {component}; allowed: vision_enc"):
        backend.run(component, {})


BARE_SESSION = """
import sys
import weakref
from pathlib import Path

class Refuse:
    names = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("the hook does not work")

import numpy as np
from gap_export import GroundingSession
from gap_export.runtime.drawing import draw_grounding, save_drawing

image = np.full((24, 40, 3), 90, np.uint8)
with GroundingSession.open(sys.argv[1]) as session:
    answers = session.ground_batch(image, ["the star", "the small red circle"])
save_drawing(draw_grounding(image, answers[0]), Path(sys.argv[2]) / "x.png")
print([list(answer.token_ids) for answer in answers])
"""


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_text_bundle"])
def test_session_runs_where_the_export_packages_cannot_be_imported(request, tmp_path, fixture):
    bundle: Path = request.getfixturevalue(fixture)
    done = run_program(
        [sys.executable, "-W", "error", "-c", BARE_SESSION, str(bundle), str(tmp_path)]
    )
    assert done.returncode == 0, done.stderr
    with GroundingSession.open(bundle) as session:
        image = np.full((24, 40, 3), 90, np.uint8)
        found = session.ground_batch(image, ["the star", "the small red circle"])
    assert done.stdout.strip() == str([list(answer.token_ids) for answer in found])
    assert (tmp_path / "x.png").stat().st_size > 0


def test_open_checks_the_bundle_first(rebuild):
    bundle = open_bundle(rebuild())
    weights = bundle.file("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.safetensors is not what it was"):
        GroundingSession.open(bundle.path)

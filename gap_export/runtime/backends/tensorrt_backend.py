"""Runs a bundle's TensorRT engines on the GPU at hand.

The KV cache stays on the GPU: with the ``concat`` contract two sets of buffers take turns as past
and present, with ``in_place`` one set is both. What crosses the bus in a decode step is one token's
embedding, in and out, and the logits of the last position: some 100 kB for a 7B model.
"""

from __future__ import annotations

from contextlib import ExitStack

from gap_export.bundle import Bundle, Verify
from gap_export.bundle.tensors import read_place
from gap_export.engines.plan import EngineSpec
from gap_export.errors import UsageError
from gap_export.runtime.backends.backend import (
    DECODER,
    NEWLINE,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
    graph_components,
    lacks_component,
)
from gap_export.runtime.backends.device import DeviceMemory
from gap_export.runtime.backends.tensorrt_cache import (
    CONTRACTS,
    PAST,
    PRESENT,
    KVBuffers,
    TensorRTCache,
    kv_layout,
)
from gap_export.runtime.backends.tensorrt_engine import EngineRunner
from gap_export.runtime.backends.tensorrt_loading import (
    TITLES,
    ChosenEngines,
    EngineLoader,
    choose_engines,
)
from gap_export.spec.positions import continue_table


class TensorRTBackend(Backend):
    """The engines of one folder of a bundle.

    One cache is in use at a time: :meth:`new_cache` takes the buffers from the one before. Engines
    are built for prompts that are read at once, so none is continued.

    Args:
        bundle: An opened, that is checked, bundle.
        chosen: Which engines, and what runs them; from :func:`choose_engines`.
        cuda_graphs: Launch each decode step as one recorded graph.

    Raises:
        BundleError: an engine is missing, or is not the one that ``engine.json`` describes.
        UsageError: CUDA graphs are asked for where they cannot serve.
        GapExportError: TensorRT cannot load an engine, or the GPU has no room for it.
    """

    def __init__(self, bundle: Bundle, chosen: ChosenEngines, *, cuda_graphs: bool = False) -> None:
        self._manifest = bundle.manifest
        self._folder = chosen.folder
        plan = chosen.folder.plan
        decoder = chosen.folder.engine(DECODER)
        if cuda_graphs and decoder.kv_contract != "in_place":
            raise UsageError(
                "CUDA graphs cannot serve these engines: the joined cache has another shape and "
                "another address in each step, so that no recorded step fits a second one",
                seen=f"KV cache {decoder.kv_contract}, lowering {decoder.lowering}",
                allowed="engines of the fused lowering, whose cache is in_place",
            )
        self._limits = plan.limits
        self.name = (
            f"{TITLES[plan.library]} {plan.library_version} "
            f"({chosen.device.name}, {chosen.folder.path.name}, {decoder.dtype})"
        )
        self.dtype = decoder.dtype
        self.quantization = decoder.quantization
        self._newline: FloatArray | None = None
        if self._manifest.newline is not None:
            newline = read_place(bundle.path, self._manifest.newline)
            self._newline = newline.astype("float16" if self.dtype == "float16" else "float32")
        with ExitStack() as stack:
            self._memory = DeviceMemory(chosen.device)
            stack.callback(self._memory.close)
            self._runners: dict[str, EngineRunner] = {}
            # Called first: what TensorRT holds must go before the stream it works on.
            stack.callback(self._runners.clear)
            stack.callback(self._memory.settle)
            loader = EngineLoader(bundle, chosen, self._memory)
            for component in graph_components(self._manifest):
                self._runners[component] = self._load(bundle, loader, component, cuda_graphs)
            self._kv_layout = kv_layout(decoder, self._runners[DECODER])
            self._kv_buffers: KVBuffers | None = None
            self._cache: TensorRTCache | None = None
            self._stack = stack.pop_all()

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        engines: str | None = None,
        cuda_graphs: bool = False,
        verify: Verify = "stamp",
    ) -> TensorRTBackend:
        """Choose the engines that fit the GPU and the TensorRT at hand, and load them.

        Args:
            bundle: An opened bundle.
            engines: A folder below ``engines/``; by default the first one that fits.
            cuda_graphs: See the class.
            verify: Whether every byte of the engines is hashed.

        Raises:
            GapExportError: see :func:`choose_engines` and the class.
        """
        chosen = choose_engines(bundle, engines=engines, verify=verify)
        return cls(bundle, chosen, cuda_graphs=cuda_graphs)

    @property
    def max_batch(self) -> int:
        """Most expressions at a time."""
        return self._limits.max_batch

    @property
    def engines(self) -> tuple[EngineSpec, ...]:
        """What ``engine.json`` says of those loaded."""
        return tuple(runner.spec for runner in self._runners.values())

    @property
    def num_device_bytes(self) -> int:
        """Held in buffers on the GPU, beside what TensorRT itself holds."""
        return self._memory.num_bytes

    def close(self) -> None:
        """Free the engines and the GPU's memory."""
        self._stack.close()

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == NEWLINE and self._newline is not None:
            return {"image_newline": self._newline}
        runner = self._runners.get(component)
        if runner is None:
            raise lacks_component(component, self._manifest)
        names = [tensor.name for tensor in runner.spec.outputs]
        return dict(zip(names, runner.run("only", feed, names), strict=True))

    def new_cache(self, batch_size: int, num_slots: int) -> TensorRTCache:
        """See Backend; the cache before it cannot be used any more.

        The buffers have room for as much as the engines take, which :meth:`decode` sees to.

        Raises:
            UsageError: more rows than the engines were built for.
            GapExportError: the GPU has no room.
        """
        del num_slots
        if not 1 <= batch_size <= self._limits.max_batch:
            raise UsageError(
                "more expressions at a time than the engines were built for",
                seen=batch_size,
                allowed=f"1..{self._limits.max_batch}",
                fix="ask fewer at a time, or build the engines with another --batch",
            )
        if self._kv_buffers is not None and self._kv_buffers.max_batch < batch_size:
            self._kv_buffers.release()
            self._kv_buffers = None
        if self._kv_buffers is None:
            contract = CONTRACTS[self._runners[DECODER].spec.kv_contract]
            self._kv_buffers = contract(self._memory, self._kv_layout, batch_size)
        self._kv_buffers.reset()
        self._cache = TensorRTCache(batch_size)
        return self._cache

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend.

        Raises:
            UsageError: a prompt or an answer longer than the engines were built for, or a cache
                whose buffers were given to a newer one.
            GapExportError: TensorRT or the GPU fails.
        """
        assert isinstance(cache, TensorRTCache), "a cache belongs to the backend that made it"
        assert self._kv_buffers is not None, "a cache comes with its buffers"
        if cache is not self._cache:
            raise UsageError("this cache's memory went to a newer one", fix="use one at a time")
        num_tokens = feed["inputs_embeds"].shape[1]
        profile = "prefill" if cache.length == 0 else "decode"
        if cache.length and num_tokens != 1:
            raise UsageError(
                "engines read the whole prompt at once and then one token at a time",
                seen=f"{num_tokens} tokens after {cache.length}",
            )
        self._check_length(cache.length + num_tokens, num_tokens)
        runner = self._runners[DECODER]
        if cache.length:
            # One length for all prompts leaves the attention mask alone to change from step to
            # step, so that kernels, and graphs, made for one shape serve many.
            length = runner.largest("kept_positions", profile)[-1]
            feed = {**feed, "kept_positions": continue_table(feed["kept_positions"], length)}
        (logits,) = runner.run(
            profile,
            feed,
            ["logits"],
            bound_inputs=self._kv_buffers.past(cache),
            bound_outputs=self._kv_buffers.present(),
        )
        self._kv_buffers.advance()
        cache.length += num_tokens
        last: FloatArray = logits[:, -1]
        return last

    def _load(
        self, bundle: Bundle, loader: EngineLoader, component: str, cuda_graphs: bool
    ) -> EngineRunner:
        spec = self._folder.engine(component)
        engine = loader.load(spec)
        executions = loader.executions(engine, spec)
        if cuda_graphs and component == DECODER:
            executions["decode"] = loader.captured(engine, spec, "decode")
        (graph,) = [graph for graph in bundle.manifest.graphs if graph.file == spec.graph]
        names = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
        cached = frozenset(name for name in names if name.startswith((PAST, PRESENT)))
        return EngineRunner(engine, spec, graph, self._memory, executions=executions, bound=cached)

    def _check_length(self, total: int, num_tokens: int) -> None:
        limits = self._limits
        for what, seen, largest, flag in (
            ("prompt", num_tokens, limits.max_prompt, "--max-prompt"),
            ("prompt and answer", total, self._kv_layout.capacity, "--max-new-tokens"),
        ):
            if seen > largest:
                raise UsageError(
                    f"{what} longer than the engines were built for",
                    seen=f"{seen} tokens",
                    allowed=f"at most {largest}",
                    fix=f"build the engines with another {flag}: gap-export build BUNDLE",
                )

"""The public face of a bundle: an image and an expression in, a box out.

with GroundingSession.open("refshapes-llava-spatial-0.3") as session:
    print(session.ground("scene.png", "the small red circle").box)

Without ``with``, :meth:`GroundingSession.close` ends it. Threads may share a session that runs in
ONNX Runtime.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gap_export.bundle import Verify, open_bundle
from gap_export.bundle.calibration import Calibration, read_calibration
from gap_export.errors import GapExportError, UsageError
from gap_export.runtime.answering import Answering, EditRow
from gap_export.runtime.backends.backend import Backend
from gap_export.runtime.clock import StageClock
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.image_view import ImageView, PreparedImage
from gap_export.runtime.images.image import ColorOrder, ImageFrame, ImageInput
from gap_export.spec.manifest import FormName, Manifest
from gap_export.spec.positions import PositionRule
from gap_export.spec.requests import DEFAULT_OPENVINO, GrammarName, OpenVinoOptions

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BackendName", "Grounding", "GroundingSession", "ImageView"]

BackendName = Literal["onnxruntime", "tensorrt", "openvino"]
# A 7B model of 32 heads keeps 0.1 GB of an image at keep 0.3 in float16.
KEPT_BYTES = 512 * 2**20


class GroundingSession(Answering):
    """Grounds expressions in images with one model.

    Attributes:
        manifest: What the model is.
        backend: What runs it.
        positions: ``gap``, or the name of a naive baseline, see ``spec.positions``.

    Example:
        >>> import numpy as np
        >>> from gap_export import GroundingSession
        >>> image = np.zeros((96, 96, 3), np.uint8)
        >>> with GroundingSession.open("demo") as session:
        ...     answer = session.ground(image, "the red circle")
        >>> len(answer.keep_indices), answer.num_visual_tokens
        (43, 144)
    """

    def __init__(
        self,
        manifest: Manifest,
        assets_folder: str | Path,
        backend: Backend,
        *,
        positions: PositionRule | None = None,
        edit_row: EditRow | None = None,
        kept_bytes: int = KEPT_BYTES,
        grammar: GrammarName | None = None,
        calibration: Calibration | None = None,
        max_boxes: int = 1,
    ) -> None:
        """Join a model's facts, its tokenizers and a backend.

        Args:
            manifest: Describes the model.
            assets_folder: Where its tokenizers are; a bundle's folder.
            backend: Runs its components; closed with the session.
            positions: Position ids of what pruning leaves; by default the manifest's.
            edit_row: Changes each row of the prompt before it is fed: for experiments on the model.
            kept_bytes: The most that is kept of images between expressions, see :meth:`look`; of
                several images, what was not used for longest goes first. 0 keeps nothing.
            grammar: ``box`` constrains answers: none ends before it holds a box, and what is begun
                of a box is finished in the model's syntax. None leaves the model its own answer.
            calibration: Gives ``Grounding.found``; None: there is no verdict.
            max_boxes: How many boxes of an answer are read into ``Grounding.boxes``. Models whose
                answers are lists give several: Qwen-VL, InternVL and MiniGPT-v2.

        Raises:
            UsageError: ``kept_bytes`` is no size, there is no such grammar, or ``max_boxes`` is
                below 1 or above 100.
            BundleError: a tokenizer cannot be used, or the manifest's numbers contradict.
        """
        super().__init__(
            manifest,
            assets_folder,
            backend,
            positions=positions,
            edit_row=edit_row,
            kept_bytes=kept_bytes,
            grammar=grammar,
            calibration=calibration,
            max_boxes=max_boxes,
        )
        self._closed = False
        self._num_running = 0
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        backend: BackendName = "onnxruntime",
        engines: str | None = None,
        cuda_graphs: bool = False,
        execution_providers: Sequence[str] | None = None,
        num_threads: int | None = None,
        openvino: OpenVinoOptions = DEFAULT_OPENVINO,
        form: FormName | None = None,
        verify: Verify = "stamp",
        positions: PositionRule | None = None,
        kept_bytes: int = KEPT_BYTES,
        kept_graph_bytes: int | None = None,
        grammar: GrammarName | None = None,
        max_boxes: int = 1,
    ) -> GroundingSession:
        """Open a bundle in ONNX Runtime, in OpenVINO, or with its TensorRT engines.

        Args:
            bundle: Its folder.
            backend: ``tensorrt`` runs the engines below ``engines/`` on this machine's GPU;
                ``openvino`` takes the package of that name.
            engines: With TensorRT: which of them; by default the first ones that fit.
            cuda_graphs: With TensorRT and engines of the fused lowering: launch each decode step as
                one recorded graph.
            execution_providers: ONNX Runtime's names; by default CUDA where present, then CPU.
            num_threads: With ONNX Runtime or OpenVINO: threads on a CPU; by default they decide.
            openvino: With OpenVINO: how it runs.
            form: With ONNX Runtime: ``ort`` runs graphs of its own operators where the bundle has
                them, ``base`` the portable ones; by default the fastest that runs.
            verify: ``full`` hashes every byte again, ``stamp`` only what changed since last time.
            positions: ``compact`` or ``text-shifted`` run a naive baseline; by default the
                bundle's own.
            kept_bytes: The most that is kept of images between expressions, see :meth:`look`.
            kept_graph_bytes: With ONNX Runtime: the most that optimized graphs, of all bundles
                together, may take of the user's cache; 0 keeps none and uses none; by default what
                ``GAP_EXPORT_OPTIMIZED_GB`` says, or 20 * 10^9.
            grammar: ``box`` constrains answers to hold a well-formed box; by default they are free.
            max_boxes: How many boxes of an answer are read.

        Raises:
            BundleError: damaged, incomplete, unsafe, or too new; no engines, or damaged ones.
            MissingDependencyError: OpenVINO, or what runs engines, is not installed.
            UsageError: an execution provider or a device that is not available or cannot be loaded;
                no GPU, or engines for another one; an argument of another backend.
        """
        _refuse_arguments(
            backend,
            {
                "engines": (engines, "tensorrt"),
                "CUDA graphs": (cuda_graphs or None, "tensorrt"),
                "execution providers": (execution_providers, "onnxruntime"),
                "threads": (num_threads, "onnxruntime", "openvino"),
                "form": (form, "onnxruntime"),
                "kept graphs": (kept_graph_bytes, "onnxruntime"),
                "options of OpenVINO": (
                    None if openvino == DEFAULT_OPENVINO else openvino,
                    "openvino",
                ),
            },
        )
        opened = open_bundle(bundle, verify=verify)
        calibration = read_calibration(opened)
        runs: Backend
        # Not at the top: a session with one backend needs nothing of the others.
        if backend == "tensorrt":
            from gap_export.runtime.backends.tensorrt_backend import TensorRTBackend

            runs = TensorRTBackend.open(
                opened, engines=engines, cuda_graphs=cuda_graphs, verify=verify
            )
        elif backend == "openvino":
            from gap_export.runtime.backends.openvino_backend import OpenVinoBackend

            runs = OpenVinoBackend(opened, openvino, num_threads=num_threads)
        else:
            from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

            runs = OnnxRuntimeBackend(
                opened,
                execution_providers,
                num_threads,
                form=form,
                verify=verify,
                kept_graph_bytes=kept_graph_bytes,
            )
        return cls(
            opened.manifest,
            opened.path,
            runs,
            positions=positions,
            kept_bytes=kept_bytes,
            grammar=grammar,
            calibration=calibration,
            max_boxes=max_boxes,
        )

    def __enter__(self) -> Self:
        """Return itself.

        Raises:
            GapExportError: the session is closed.
        """
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Free what runs the model; a second time nothing happens.

        It does not wait: calls that run in other threads finish, and the last of them frees it. A
        call that comes later is refused.
        """
        with self._lock:
            is_last = not self._closed and not self._num_running
            self._closed = True
        if is_last:
            self._free()

    def ground(
        self,
        image: ImageInput | PreparedImage,
        expression: str,
        *,
        frame: ImageFrame = "upright",
        allow_damaged: bool = False,
        color: ColorOrder = "rgb",
    ) -> Grounding:
        """Find one object.

        Args:
            image: A file, a Pillow image, or a uint8 array [H, W, 3] in the order ``color``; or
                what ``PreparedImage.of`` made of one for this model, which the other options do
                not change any more.
            expression: What to look for.
            frame: ``upright``: the image is turned as EXIF says, and the box is of what is
                displayed; ``raw``: both are of the image as stored.
            allow_damaged: Use what can be decoded of a damaged image; ``Grounding.warnings`` says
                so. By default it is refused.
            color: Order of an array's channels: ``rgb``, or ``bgr`` as OpenCV has it.

        Raises:
            ImageError: the image cannot be used.
            UsageError: no such ``frame`` or ``color``.
            ExpressionError: the expression cannot be used.
            GapExportError: the session is closed.
        """
        return self.ground_batch(
            image, [expression], frame=frame, allow_damaged=allow_damaged, color=color
        )[0]

    def ground_batch(
        self,
        image: ImageInput | PreparedImage,
        expressions: Sequence[str],
        *,
        frame: ImageFrame = "upright",
        allow_damaged: bool = False,
        color: ColorOrder = "rgb",
    ) -> list[Grounding]:
        """Find several objects in one image; the vision encoder sees the image once.

        Only where the image is cut into tiles and the pruner reads the text does it see it once
        for each expression. What the prompts begin with, up to the image or its end, is computed
        once as well where the backend allows; see :meth:`look`.

        Args:
            image: As for :meth:`ground`, and likewise the rest.
            expressions: What to look for; each answer is the same as if asked alone.
            frame: See :meth:`ground`.
            allow_damaged: See :meth:`ground`.
            color: See :meth:`ground`.

        Raises:
            ImageError: the image cannot be used.
            ExpressionError: there are no expressions, or one cannot be used.
            GapExportError: the session is closed.
        """
        with self._kept_open():
            clock = StageClock()
            with clock.stage("preprocess"):
                encoded = self._encode(expressions)
                seen = self._prepare(image, frame, color, allow_damaged=allow_damaged)
            return self._ask(seen, encoded, clock)

    def look(
        self,
        image: ImageInput | PreparedImage,
        *,
        frame: ImageFrame = "upright",
        allow_damaged: bool = False,
        color: ColorOrder = "rgb",
    ) -> ImageView:
        """Prepare an image that several expressions, one after the other, will be about.

        What the first of them had computed of the image is kept, up to ``kept_bytes`` of the
        session, and the answers are the same as those of :meth:`ground`.

        Args:
            image: As for :meth:`ground`, and likewise the rest.
            frame: See :meth:`ground`.
            allow_damaged: See :meth:`ground`.
            color: See :meth:`ground`.

        Raises:
            ImageError: the image cannot be used.
            UsageError: no such ``frame`` or ``color``.
            GapExportError: the session is closed.
        """
        with self._kept_open():
            seen = self._prepare(image, frame, color, allow_damaged=allow_damaged)

        def ask(expressions: Sequence[str]) -> list[Grounding]:
            with self._kept_open():
                clock = StageClock()
                with clock.stage("preprocess"):
                    encoded = self._encode(expressions)
                return self._ask(seen, encoded, clock, keeps=True)

        return ImageView(ask)

    @contextmanager
    def _kept_open(self) -> Iterator[None]:
        """A call, which a closed session refuses; the backend is kept while it runs."""
        with self._lock:
            self._check_open()
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                is_last = self._closed and not self._num_running
            if is_last:
                self._free()

    def _free(self) -> None:
        self._store.clear()
        self.backend.close()

    def _check_open(self) -> None:
        if self._closed:
            raise GapExportError("the session is closed", fix="open the bundle again")


def _refuse_arguments(backend: BackendName, arguments: Mapping[str, tuple[object, ...]]) -> None:
    """An argument that would be ignored is an error.

    Args:
        backend: What will run the bundle.
        arguments: By what they are: their value, None where none is given, and whose they are.

    Raises:
        UsageError: one was given that is not the backend's.
    """
    given = [
        name
        for name, (value, *owners) in arguments.items()
        if value is not None and backend not in owners
    ]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be used with {backend}")

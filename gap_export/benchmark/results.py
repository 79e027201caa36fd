"""What a benchmark found, as plain data that reports are written from.

Times are milliseconds, memory is bytes, energy is joules, shares are 0..1 (a share of a rate may be
above it). The names of the fields are the keys of the JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gap_export.parity.results import plain_values
from gap_export.version import __version__

SCHEMA = "gap-export-bench"
SCHEMA_VERSION = 1
# What a session calls its stages, and the words for people, in the order in which they come.
STAGES: Mapping[str, str] = {
    "preprocess": "image",
    "text_encoder": "text",
    "vision_encoder": "tower",
    "embed_tokens": "words",
    "prefill": "prefill",
    "decode": "decode",
}
TOTAL, PER_TOKEN, MANY, CPU = "total", "decode_token", "all_expressions", "cpu"
PREFIX, NEXT = "prefix", "next_question"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Some samples of one number.

    Attributes:
        median: Of those that count.
        low: Their first quartile.
        high: Their third.
        n: How many count.
    """

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a process holds that does nothing but run one bundle, Python and imports included.

    Attributes:
        peak: Most at once, mapped files that were touched included.
        steady: After the last answer, likewise.
        own: Of that, what no file stands behind: what the system cannot drop and read again.
    """

    peak: int
    steady: int
    own: int


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One bundle in one backend.

    Attributes:
        name: Unique in a report.
        bundle: Its folder.
        backend: As ``--backend`` has it, e.g. ``ort`` or ``ort:base``.
        runs: What ran it, with its version.
        dtype: Of its floats; with its quantization where it has one.
        keep_ratio: 1.0 where nothing is dropped.
        prompt_tokens: Tokens of a prompt, visual ones included; the mean.
        answer_tokens: Tokens of an answer; the mean.
        stages: Milliseconds by stage, ``total`` (one expression about a new image),
            ``decode_token`` (one token after the first), ``cpu`` (processor time of an answer, of
            all threads) and, where more than one expression is asked, ``all_expressions`` (in one
            call), ``next_question`` (through :meth:`GroundingSession.look`) and ``prefix`` (of
            prefill, what the next question does not wait for).
        open_ms: Opening it for the first time, and once more in a new process.
        first_call_ms: The first answer after that.
        num_busy: Samples that were set aside because other processes ran.
        memory: Of its process.
        gemm_share: Of this machine's rate of float32 products, at prefill.
        bandwidth_share: Of this machine's memory bandwidth, at decode.
        speedup: By stage, how many times as fast as the unpruned bundle in the same backend.
        ideal: Tokens of the unpruned prompt by tokens of this one: of prefill, to be expected.
        energy_j: Of an answer, of all that the board's meter sees.
    """

    name: str
    bundle: str
    backend: str
    runs: str
    dtype: str
    keep_ratio: float
    prompt_tokens: float
    answer_tokens: float
    stages: Mapping[str, Spread]
    open_ms: tuple[float, float]
    first_call_ms: float
    num_busy: int
    memory: Memory
    gemm_share: float | None = None
    bandwidth_share: float | None = None
    speedup: Mapping[str, Spread] = field(default_factory=dict)
    ideal: float | None = None
    energy_j: Spread | None = None


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """Where it was measured.

    Attributes:
        processor: Its name, as far as the system says.
        num_cpus: Processors that the benchmark may use.
        gemm_gflops: Best rate of a float32 matrix product by numpy, seen in this run.
        bandwidth_gb_s: Best rate of reading memory, likewise.
        others_share: CPU time that other processes took while samples were measured; the median.
        energy: What energy was read from, or why it was not measured.
    """

    processor: str
    num_cpus: int
    gemm_gflops: float
    bandwidth_gb_s: float
    others_share: float
    energy: str


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What was measured in one run, interleaved.

    Attributes:
        model: Name of the model.
        rounds: Samples of each row; each is of another image.
        expressions: Expressions about an image.
        machine: Where.
        warnings: What makes the figures doubtful.
        rows: Bundles in backends, as they were named.
        recommended: By bundle, the backend that answers soonest, where several were measured.
        bars: What was asked for, see ``BenchSettings``.
        failures: Bars that were not reached, in words.
    """

    model: str
    rounds: int
    expressions: int
    machine: MachineFacts
    warnings: tuple[str, ...]
    rows: tuple[BenchRow, ...]
    recommended: Mapping[str, str]
    bars: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """The report as JSON data."""
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "gap_export": __version__}
        plain: dict[str, Any] = plain_values({**head, **asdict(self)})
        return plain

"""The table of devices, a user's own, and this CPU, whose rates are measured."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gap_export.benchmark import machine
from gap_export.benchmark.process import WorkerProcess
from gap_export.errors import RecipeError, UsageError
from gap_export.spec.strict_yaml import read_yaml

THIS_CPU = "this-cpu"
TABLE = Path(__file__).with_name("devices.yaml")

_MAX_SHOWN = 150
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reached(_Strict):
    """Which share of its peaks a device reaches: least, likely, most.

    Attributes:
        compute: Of products.
        bandwidth: Of memory.
        source: What that rests on.
    """

    compute: tuple[_Share, _Share, _Share]
    bandwidth: tuple[_Share, _Share, _Share]
    source: str

    @model_validator(mode="after")
    def _ascending(self) -> Reached:
        for name in ("compute", "bandwidth"):
            shares = getattr(self, name)
            if list(shares) != sorted(shares):
                raise ValueError(f"reached.{name} must ascend: least, likely, most")
        return self


class Fit(_Strict):
    """What a benchmark on the device says of one stage in one dtype.

    Attributes:
        share: Of the roofline that is reached; above 1 where the rate is of another dtype.
        step_us: Microseconds that a run of the stage takes beside it.
        num_rows: Bundles that it was fitted to.
    """

    share: _Positive
    step_us: _Size
    num_rows: int


class Device(_Strict):
    """What a device can do.

    Attributes:
        name: In the table.
        title: For people.
        memory_gb: 1e9 bytes, of the module or the card.
        bandwidth_gb_s: 1e9 bytes a second.
        tera_operations: 1e12 a second by dtype of the products, dense; two for a multiply-add.
        reached: What of that programs reach.
        system_gb: Memory that the system takes: least and most.
        system_source: What that rests on.
        runtime_gb: Memory that the runtime and its libraries take, likewise.
        runtime_source: What that rests on.
        software: What runs there.
        target: What ``--trt`` takes for it; None for a CPU.
        source: Of its figures.
        fits: By ``<stage> <dtype>``, what a benchmark there has shown.
    """

    name: str
    title: str
    memory_gb: _Positive
    bandwidth_gb_s: _Positive
    tera_operations: Mapping[Literal["float32", "float16", "int8"], _Positive] = Field(min_length=1)
    reached: Reached
    system_gb: tuple[_Size, _Size]
    system_source: str
    runtime_gb: tuple[_Size, _Size]
    runtime_source: str
    software: str
    target: Literal["orin", "thor", "desktop", "rtx"] | None = None
    source: str
    fits: Mapping[str, Fit] = Field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of weights that are worth exporting for it."""
        return ("float32", "int4") if self.target is None else ("float16", "int4")

    def rate(self, dtype: str) -> float:
        """Operations a second of products in this dtype, of floats where it has no own."""
        rates = {str(name): rate for name, rate in self.tera_operations.items()}
        floats = rates.get("float16" if dtype != "float32" else dtype) or max(rates.values())
        return 1e12 * rates.get(dtype, floats)


def list_devices(own: Path | None = None) -> dict[str, Device]:
    """Devices by name: those of the table, and a user's own, which go before.

    Args:
        own: A file of the form of the table; it may use the table's groups.

    Raises:
        UsageError: it cannot be read, or is not of that form.
    """
    table = read_yaml(TABLE)
    found = _read_devices(table, table["groups"], TABLE)
    if own is not None:
        try:
            plain = read_yaml(own)
        except RecipeError as err:
            raise UsageError(
                "the file of devices cannot be read", seen=err.seen, allowed=err.allowed
            ) from err
        if not isinstance(plain, dict) or not isinstance(plain.get("devices"), dict):
            raise UsageError(
                "a file of devices has a mapping 'devices' of names to what they can do",
                seen=str(own),
                fix=f"write it as the entries of {TABLE.name} are: see the page on planning",
            )
        groups = plain.get("groups") or {}
        found |= _read_devices(plain, {**table["groups"], **groups}, own)
    return found


def find_device(name: str, own: Path | None = None) -> Device:
    """A device by name; ``this-cpu`` is measured now.

    Raises:
        UsageError: there is none of that name, with the nearest; or as :func:`list_devices`.
    """
    known = list_devices(own)
    if name in known:
        return known[name]
    if name == THIS_CPU:
        return measure_this_cpu()
    near = difflib.get_close_matches(name[:_MAX_SHOWN].lower(), [*known, THIS_CPU], n=3, cutoff=0.4)
    raise UsageError(
        "no device of that name",
        seen=name[:_MAX_SHOWN],
        allowed=", ".join((*known, THIS_CPU)),
        fix=(f"did you mean {' or '.join(near)}? " if near else "")
        + "a device of your own: --device-file",
    )


def measure_this_cpu(num_threads: int | None = None) -> Device:
    """This machine's processor, by the rates that ``bench`` reports.

    Args:
        num_threads: Threads of one operator; None: as many as the libraries like.
    """
    with WorkerProcess(num_threads) as worker:
        rates: dict[str, float] = worker.do("rates")
    return cpu_of(rates["gemm"], rates["bandwidth"], num_threads)


def cpu_of(gemm_gflops: float, bandwidth_gb_s: float, num_threads: int | None = None) -> Device:
    """A processor of these rates."""
    threads = num_threads or len(os.sched_getaffinity(0))
    return Device(
        name=THIS_CPU,
        title=f"{machine.processor()}, {threads} thread{'s' if threads > 1 else ''}",
        memory_gb=machine.available_memory()[1] / 1e9,
        bandwidth_gb_s=bandwidth_gb_s,
        tera_operations={"float32": gemm_gflops / 1e3},
        reached=Reached(
            compute=(0.5, 0.8, 1.0),
            bandwidth=(0.2, 0.4, 0.8),
            source="ONNX Runtime on the machine of docs/results/speed.md, in float32 and INT4",
        ),
        system_gb=(0.3, 1.5),
        system_source="assumed",
        runtime_gb=(0.15, 0.4),
        runtime_source="Python, numpy and ONNX Runtime, as bench measures the demo models",
        software="ONNX Runtime",
        source="measured now: a float32 product of 1024 x 1024, and reading a matrix of 256 MB",
    )


def _read_devices(
    plain: Mapping[str, Any], groups: Mapping[str, Any], file: Path
) -> dict[str, Device]:
    found = {}
    for name, entry in plain["devices"].items():
        try:
            own = dict(entry)
            merged: dict[str, Any] = {}
            for group in own.pop("groups", ()):
                merged |= groups[group]
            found[str(name)] = Device.model_validate({**merged, **own, "name": str(name)})
        except (ValidationError, KeyError, TypeError, ValueError) as err:
            said = f"no group {err}" if isinstance(err, KeyError) else str(err)
            if isinstance(err, ValidationError):
                first = err.errors()[0]
                said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise UsageError(
                f"device {str(name)[:_MAX_SHOWN]} of {file} is not valid", seen=said[:_MAX_SHOWN]
            ) from err
    return found

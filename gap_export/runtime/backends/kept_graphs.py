"""Graphs as ONNX Runtime made them ready for this CPU, kept in the user's cache.

Each time a graph is opened, ONNX Runtime optimizes it and packs its weights for the CPU's kernels:
seconds of work, whose result lies in memory beside the weights it was made of. Kept in files, the
result is mapped: it is there at once, and once, for all processes together.

What is kept is good for the very graph and weights, runtime, CPU and options it was made with, all
of which its folder is named by. It is hashed like a bundle's files, and made anew where anything
differs. A bundle itself is never written to, so that one that is read-only is served as well.

Together they take no more than :func:`kept_graph_bytes` says; those not used for longest go first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.bundle.files import sha256_of, walk_files
from gap_export.bundle.stamps import Verify, cache_folder, file_stamp, is_settled, verify_hashes
from gap_export.bundle.stamps import write_stamps as remember
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backends.onnxruntime_options import ORT_ERRORS, start_session
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import GraphSpec

logger = logging.getLogger(__name__)

_CPU = "CPUExecutionProvider"
# Below it a bundle opens in a moment anyway.
MIN_BUNDLE_BYTES = 64 << 20
_GRAPH, _WEIGHTS, _FACTS = "graph.onnx", "weights.bin", "kept.json"
# Smaller constants stay in the graph's own file.
_MIN_EXTERNAL_BYTES = "1024"
# ONNX Runtime writes weights as they were and as they are packed, of the graph and the bundle.
_ROOM = 2.5
_PARTS_OLDER_THAN_S = 3600.0
# Of one graph: a home may be shared by machines whose CPUs differ.
_MAX_KEPT = 3
# The most that all take, in the environment, in units of 10^9 bytes, and where nothing says so.
LIMIT_VARIABLE, DEFAULT_LIMIT_GB = "GAP_EXPORT_OPTIMIZED_GB", 20.0
_CANNOT_KEEP: tuple[type[Exception], ...] = (OSError, ValueError, GapExportError, *ORT_ERRORS)
_Options = Callable[[], ort.SessionOptions]


@dataclass(frozen=True, kw_only=True)
class KeptGraph:
    """Where one graph of a bundle is kept, and what it is good for.

    Attributes:
        root: Folder of all that is kept of that graph.
        facts: What has to be the same, by name.
    """

    root: Path
    facts: Mapping[str, str]

    @classmethod
    def of(cls, bundle: Bundle, spec: GraphSpec) -> KeptGraph | None:
        """The place of a graph; None where there is no cache or the CPU is not known."""
        cache, cpu = cache_folder(), describe_cpu()
        if cache is None or not cpu:
            return None
        files = sorted((file.path, file.sha256) for file in bundle.manifest.files)
        facts = {
            "graph": dict(files)[spec.file],
            "files": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            "runtime": f"{ort.__version__} {ort.get_build_info()}",
            "provider": _CPU,
            "CPU": cpu,
            "activations": spec.activations,
        }
        name = hashlib.sha256(os.fsencode(bundle.path / spec.file)).hexdigest()[:32]
        return cls(root=cache / "optimized" / name, facts=facts)

    @cached_property
    def folder(self) -> Path:
        """Where it is, or would be."""
        key = hashlib.sha256(json.dumps(dict(self.facts)).encode()).hexdigest()
        return self.root / key[:32]

    def check(self, verify: Verify = "stamp") -> bool:
        """Whether it is there and every byte is as it was written; what is not is removed."""
        if not self.folder.is_dir():
            return False
        try:
            self._verify(verify)
        except (OSError, ValueError, LookupError, TypeError, BundleError) as err:
            logger.warning("the kept graph %s is not usable and made anew: %s", self.folder, err)
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        return True

    def _verify(self, verify: Verify) -> None:
        raw = (self.folder / _FACTS).read_bytes()
        held = json.loads(raw)
        hashes = {name: str(held["files"][name]) for name in (_GRAPH, _WEIGHTS)}
        statuses = dict(walk_files(self.folder))
        if set(statuses) != {*hashes, _FACTS} or held["facts"] != dict(self.facts):
            raise BundleError("not what was kept", seen=", ".join(statuses))
        verify_hashes(
            self.folder,
            hashes,
            statuses,
            verify=verify,
            owner_sha256=hashlib.sha256(raw).hexdigest(),
            refusal=lambda path, seen: BundleError(f"{path} is damaged", seen=seen),
        )

    def start(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session of what is kept; raises what ONNX Runtime raises."""
        # When it was last used, by which the oldest is told.
        os.utime(self.folder)
        # All of it was optimized before.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return start_session(self.folder / _GRAPH, options, [_CPU])

    def make(self, graph: Path, options: ort.SessionOptions) -> None:
        """Optimize a graph and keep it; of two processes that do so at a time, one is enough.

        Raises:
            OSError: the cache cannot be written.
            RuntimeError: or another of what ONNX Runtime raises.
        """
        logger.info("optimizing %s once for this CPU; kept in %s", graph, self.folder)
        part = self.root / f".{os.getpid()}-{time.time_ns()}.part"
        part.mkdir(parents=True)
        try:
            options.optimized_model_filepath = str(part / _GRAPH)
            for name, value in (
                ("optimized_model_external_initializers_file_name", _WEIGHTS),
                ("optimized_model_external_initializers_min_size_in_bytes", _MIN_EXTERNAL_BYTES),
                ("save_external_prepacked_constant_initializers", "1"),
            ):
                options.add_session_config_entry(f"session.{name}", value)
            start_session(graph, options, [_CPU])
            # A graph without large weights leaves none.
            (part / _WEIGHTS).touch()
            hashes = {name: sha256_of(part / name) for name in (_GRAPH, _WEIGHTS)}
            raw = json.dumps({"facts": dict(self.facts), "files": hashes}, indent=2).encode()
            (part / _FACTS).write_bytes(raw)
            try:
                part.rename(self.folder)
            except OSError:
                if not self.folder.is_dir():
                    raise
            else:
                self._remember(hashes, hashlib.sha256(raw).hexdigest())
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def tidy(self) -> None:
        """Say what differs from what was kept before; remove the oldest, and what was left over."""
        others = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            age = time.time() - path.stat().st_mtime
            if path.name.startswith("."):
                if age > _PARTS_OLDER_THAN_S:
                    shutil.rmtree(path, ignore_errors=True)
            elif path != self.folder:
                others.append((age, path))
        for number, (_, path) in enumerate(sorted(others)):
            if not number:
                differs = self._differing(path)
                logger.warning("what was kept of a graph is of another %s: making it anew", differs)
            if number + 2 > _MAX_KEPT:
                shutil.rmtree(path, ignore_errors=True)

    def trim(self, max_bytes: int) -> None:
        """Remove what of all graphs was not used for longest, but this one, as far as it must."""
        stats = {path: path.stat() for path in self.root.parent.glob("*/[!.]*")}
        sizes = {path: sum(s.st_size for _, s in walk_files(path)) for path in stats}
        for path in sorted(stats.keys() - {self.folder}, key=lambda path: stats[path].st_mtime):
            if sum(sizes.values()) <= max_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]

    def _differing(self, other: Path) -> str:
        try:
            held = json.loads((other / _FACTS).read_bytes())["facts"]
            names = [name for name, value in self.facts.items() if held.get(name) != value]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            names = []
        return " and ".join(names) or "version"

    def _remember(self, hashes: Mapping[str, str], owner_sha256: str) -> None:
        statuses = {name: os.lstat(self.folder / name) for name in hashes}
        if all(map(is_settled, statuses.values())):
            stamps = {name: file_stamp(status) for name, status in statuses.items()}
            remember(self.folder, stamps, manifest_sha256=owner_sha256)


def start_kept(
    bundle: Bundle,
    spec: GraphSpec,
    options: _Options,
    *,
    verify: Verify = "stamp",
    max_bytes: int | None = None,
) -> ort.InferenceSession | None:
    """A session of a graph as it is kept, which is made where it is not there.

    Args:
        bundle: An opened, that is checked, bundle.
        spec: One of its graphs, to be run on the CPU.
        options: Makes the options of a session.
        verify: ``full`` hashes what is kept again.
        max_bytes: The most that all kept graphs may take; None: as the environment says.

    Returns:
        The session; None where it is not worth it, not wanted, or cannot be kept.

    Raises:
        UsageError: see :func:`kept_graph_bytes`.
    """
    # What is wrong with the options is no matter of what is kept.
    options()
    limit = kept_graph_bytes(max_bytes)
    size = sum(file.size for file in bundle.manifest.files)
    kept = KeptGraph.of(bundle, spec) if limit and size >= MIN_BUNDLE_BYTES else None
    if kept is None:
        return None
    try:
        if not kept.check(verify):
            kept.tidy()
            if not _has_room(kept.root, size, limit):
                return None
            kept.make(bundle.file(spec.file), options())
            kept.trim(limit)
            if not kept.check():
                return None
        return kept.start(options())
    except _CANNOT_KEEP as err:
        logger.warning("%s cannot be kept in %s: %s", spec.file, kept.root, err)
        return None


def kept_graph_bytes(asked: int | None = None) -> int:
    """The most that all kept graphs may take, in bytes; 0: none is kept, and none used.

    Args:
        asked: By the caller; None: the environment says, in :data:`LIMIT_VARIABLE`, or the default.

    Raises:
        UsageError: it is no size.
    """
    if asked is None:
        text = os.environ.get(LIMIT_VARIABLE, "")
        try:
            limit = 1e9 * float(text or DEFAULT_LIMIT_GB)
        except ValueError:
            limit = -1.0
    else:
        text, limit = str(asked), float(asked)
    if not 0 <= limit < float("inf"):
        raise UsageError(
            "no size that optimized graphs may take of the cache",
            seen=f"{LIMIT_VARIABLE}={text}" if asked is None else text,
            allowed=f"{LIMIT_VARIABLE}: 10^9 bytes, 0 or more; 0 keeps none",
        )
    return int(limit)


def _has_room(folder: Path, size: int, limit: int) -> bool:
    if limit < _ROOM * size:
        logger.info("optimized graphs of a bundle of %d bytes may not be kept: %d", size, limit)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _ROOM * size:
        logger.warning("no room to keep optimized graphs: %s has %d bytes free", folder, free)
        return False
    return True


@lru_cache(maxsize=1)
def describe_cpu() -> str:
    """What tells CPUs apart that need other kernels; empty where that is not known."""
    name, flags = platform.processor(), ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "CPU part"):
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
            if not line.strip():
                break
    except OSError as err:
        logger.debug("no /proc/cpuinfo: %s", err)
    known = [part for part in (name, flags) if part]
    return " ".join([platform.system(), platform.machine(), *known]) if known else ""

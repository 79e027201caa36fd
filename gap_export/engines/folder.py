"""A folder of engines: read and checked before any of it is used.

Its hashes are its own; the bundle's manifest, which is never changed, knows nothing of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gap_export.bundle import Bundle, Verify, open_bundle
from gap_export.bundle.drafts import find_standing
from gap_export.bundle.files import ENGINES_FOLDER, walk_files
from gap_export.bundle.stamps import verify_hashes
from gap_export.engines.graph_hash import hash_weights, listed_file
from gap_export.engines.plan import PLAN_NAME, EnginePlan, EngineSpec, parse_plan
from gap_export.errors import BundleError, UsageError

# Far above any real one; keeps a hostile one from filling the memory.
_MAX_PLAN_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class EngineFolder:
    """Engines whose files were found to be what ``engine.json`` says, for this bundle's graphs.

    Attributes:
        path: Absolute.
        plan: What is in it.
    """

    path: Path
    plan: EnginePlan

    def engine(self, component: str) -> EngineSpec:
        """The engine of a component.

        Raises:
            BundleError: it was not built.
        """
        for engine in self.plan.engines:
            if engine.component == component:
                return engine
        raise BundleError(
            "no engine of this component was built",
            seen=component,
            allowed=", ".join(engine.component for engine in self.plan.engines) or "none",
            fix=_build_again(self.plan),
        )

    def file(self, component: str) -> Path:
        """Where a component's engine lies.

        Raises:
            BundleError: it was not built.
        """
        return self.path / self.engine(component).file


def engine_folders(bundle: Bundle) -> tuple[str, ...]:
    """Names of the folders below ``engines/``, for :func:`read_engine_folder`; drafts left out."""
    parent = bundle.path / ENGINES_FOLDER
    if not parent.is_dir():
        return ()
    return tuple(sorted(p.name for p in parent.iterdir() if not p.name.startswith(".")))


def open_whole(path: str | Path) -> Bundle:
    """Check every byte of a bundle, and of all engines in it, whether they can run here or not.

    Args:
        path: The bundle's folder.

    Raises:
        BundleError: as of :func:`gap_export.bundle.open_bundle` and :func:`read_engine_folder`, or
            a plain file among the folders of engines.
    """
    bundle = open_bundle(path, verify="full")
    for name in engine_folders(bundle):
        if not (bundle.path / ENGINES_FOLDER / name).is_dir():
            raise BundleError(
                f"{ENGINES_FOLDER}/ holds something that is no folder of engines",
                seen=name,
                allowed="what gap-export build made",
                fix="move it out of the bundle",
            )
        read_engine_folder(bundle, name, verify="full")
    return bundle


def read_plan(bundle: Bundle, folder: str) -> EnginePlan:
    """What a folder of engines says of itself; nothing is hashed, so nothing may be run by it.

    Args:
        bundle: The bundle, opened and so checked.
        folder: Name below ``engines/``.

    Raises:
        BundleError: not there, or no ``engine.json`` that can be read.
    """
    path = _locate(bundle, folder)
    try:
        return parse_plan(_read_plan_bytes(path))
    except OSError as err:
        raise BundleError(
            "the engines cannot be read", seen=err, fix="build them again: gap-export build"
        ) from err


def read_engine_folder(bundle: Bundle, folder: str, *, verify: Verify = "stamp") -> EngineFolder:
    """Check a folder of engines and read its ``engine.json``.

    Args:
        bundle: The bundle, opened and so checked.
        folder: Name below ``engines/``, e.g. ``rtx-sm89``.
        verify: ``full`` hashes every byte; ``stamp`` trusts files that were hashed before and have
            not changed since.

    Raises:
        BundleError: not there, damaged, incomplete, with files that are not listed, with links, or
            built from a graph or weights that the bundle does not have.
    """
    path = _locate(bundle, folder)
    try:
        raw = _read_plan_bytes(path)
        plan = parse_plan(raw)
        _check_presence(path, plan)
        for engine in plan.engines:
            _check_graph(bundle, plan, engine)
        hashes = {engine.file: engine.sha256 for engine in plan.engines}
        verify_hashes(
            path,
            hashes,
            {name: os.lstat(path / name) for name in hashes},
            verify=verify,
            owner_sha256=hashlib.sha256(raw).hexdigest(),
            refusal=lambda name, seen: BundleError(
                f"engine {name} is not what was built",
                seen=f"SHA-256 {seen}",
                allowed=hashes[name],
                fix=_build_again(plan),
            ),
        )
    except OSError as err:
        raise BundleError(
            "the engines cannot be read", seen=err, fix="build them again: gap-export build"
        ) from err
    return EngineFolder(path=path, plan=plan)


def check_runs_here(
    folder: EngineFolder, *, library: str, library_version: str, compute_capability: int | None
) -> None:
    """Refuse engines that were built for another TensorRT or another GPU.

    TensorRT promises neither across its versions nor across GPU generations that an engine runs,
    and where it does not, what it says names no cause.

    Args:
        folder: The engines.
        library: The package at hand, ``tensorrt`` or ``tensorrt_rtx``.
        library_version: Its full version.
        compute_capability: SM number of the GPU at hand; None where it is not known.

    Raises:
        UsageError: built by another library, by another version of it, or for another GPU.
    """
    plan = folder.plan
    again = _build_again(plan)
    if plan.library != library:
        raise UsageError(
            f"the engines in {folder.path.name} are of another library",
            seen=library,
            allowed=f"{plan.library} {plan.library_version}, which built them",
            fix=f"install {plan.library}, or choose a target of {library}",
        )
    if plan.library_version != library_version:
        raise UsageError(
            f"the engines in {folder.path.name} were built by another version of {library}",
            seen=f"{library} {library_version} here",
            allowed=plan.library_version,
            fix=f"{again}, or install {library}=={plan.library_version}",
        )
    known = plan.compute_capability is not None and compute_capability is not None
    if known and plan.compute_capability != compute_capability:
        raise UsageError(
            f"the engines in {folder.path.name} were built for another GPU generation",
            seen=f"SM {compute_capability} here",
            allowed=f"SM {plan.compute_capability}",
            fix=f"build them for the GPU here: gap-export build BUNDLE --target {plan.target}"
            f":sm{compute_capability}",
        )


def _build_again(plan: EnginePlan) -> str:
    generation = f":sm{plan.compute_capability}" if plan.compute_capability else ""
    return f"build them again: gap-export build BUNDLE --target {plan.target}{generation}"


def _locate(bundle: Bundle, folder: str) -> Path:
    parent = bundle.path / ENGINES_FOLDER
    plain = folder not in ("", ".", "..") and not set(folder) & set("/\\:\0")
    if not plain or parent.is_symlink() or (parent / folder).is_symlink():
        raise BundleError(
            "not the name of a folder of engines",
            seen=repr(folder),
            allowed=f"a plain folder of the bundle's {ENGINES_FOLDER}/, no link",
        )
    path = find_standing(parent / folder)
    if not path.is_dir():
        raise BundleError(
            "the bundle has no such engines",
            seen=folder,
            allowed=", ".join(engine_folders(bundle)) or "none built yet",
            fix="build them: gap-export build BUNDLE --target TARGET",
        )
    return path


def _read_plan_bytes(path: Path) -> bytes:
    plan = path / PLAN_NAME
    if not os.path.lexists(plan):
        raise BundleError(
            f"no engines that gap-export built: {PLAN_NAME} is missing",
            seen=path,
            fix="build them again: gap-export build",
        )
    status = os.lstat(plan)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_PLAN_BYTES:
        raise BundleError(
            f"{PLAN_NAME} is not a plain file of sensible size",
            seen=f"{plan}, {status.st_size} bytes",
            allowed=f"a plain file of at most {_MAX_PLAN_BYTES} bytes, no link",
        )
    return plan.read_bytes()


def _check_presence(path: Path, plan: EnginePlan) -> None:
    present: Mapping[str, os.stat_result] = dict(walk_files(path))
    listed = {engine.file: engine for engine in plan.engines}
    missing = sorted(set(listed) - set(present))
    if missing:
        raise BundleError(
            "the folder of engines is not complete, missing",
            seen=", ".join(missing),
            fix=_build_again(plan),
        )
    unlisted = sorted(set(present) - set(listed) - {PLAN_NAME})
    if unlisted:
        raise BundleError(
            f"{path.name} holds files that {PLAN_NAME} does not list",
            seen=", ".join(unlisted[:5]) + (", ..." if len(unlisted) > 5 else ""),
            allowed=", ".join([PLAN_NAME, *listed]),
            fix="move them out of the bundle",
        )
    for name, engine in listed.items():
        if present[name].st_size != engine.size:
            raise BundleError(
                f"engine {name} is cut short or was changed",
                seen=f"{present[name].st_size} bytes",
                allowed=f"{engine.size} bytes",
                fix=_build_again(plan),
            )


def _check_graph(bundle: Bundle, plan: EnginePlan, engine: EngineSpec) -> None:
    """The engine was built from what the bundle holds now."""
    graph = listed_file(bundle, engine.graph)
    if graph.sha256 != engine.graph_sha256:
        raise BundleError(
            f"engine {engine.file} was built from another graph",
            seen=f"{engine.graph}: SHA-256 {graph.sha256}",
            allowed=engine.graph_sha256,
            fix=_build_again(plan),
        )
    weights = hash_weights(bundle, engine.graph)
    if weights != engine.weights_sha256:
        raise BundleError(
            f"engine {engine.file} was built from other weights",
            seen=f"weights of {engine.graph}: SHA-256 {weights}",
            allowed=engine.weights_sha256,
            fix=_build_again(plan),
        )
    forms = [
        (spec.component, spec.lowering, spec.quantization, spec.kv_contract)
        for spec in bundle.manifest.graphs
        if spec.file == engine.graph
    ]
    form = (engine.component, engine.lowering, engine.quantization, engine.kv_contract)
    if form not in forms:
        raise BundleError(
            f"{PLAN_NAME} does not say of engine {engine.file} what the bundle says of its graph",
            seen=f"{engine.graph}: {_form_words(form)}",
            allowed=" or ".join(map(_form_words, forms)) or "a graph of the bundle",
            fix=_build_again(plan),
        )


def _form_words(form: tuple[object, ...]) -> str:
    return ", ".join(str(part) for part in form if part is not None)

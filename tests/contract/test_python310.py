"""What a device needs runs on Python 3.10, without the packages that make bundles."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gap_export
from tests.programs import run_program

ROOT = Path(gap_export.__file__).parent
# On the device: building needs the first line, running the second as well.
BUILDING = (
    "bundle",
    "engines",
    "errors",
    "progress",
    "spec/manifest",
    "spec/positions",
    "stop_signals",
)
RUNNING = (*BUILDING, "runtime", "streaming")
# Beside a golden, where there is no PyTorch; its page of HTML takes an extra.
CHECKING = (
    *("parity/check", "parity/golden", "parity/levels", "parity/question", "parity/replay"),
    *("parity/inside/taps", "parity/inside/positions_seen", "parity/results", "parity/truth"),
    *("report/check", "report/document", "report/writing", "report/junit", "report/markdown"),
)
# Speed is measured where a model is to run.
MEASURING = ("benchmark", "api/bench", "report/bench", "report/figures/times")
BLOCKED = ("onnx", "onnx_ir", "onnxscript", "pydantic", "safetensors", "torch", "transformers")
# Python 3.11 and later: modules, what is imported from a module, and attributes of modules.
NEW_MODULES = {"tomllib", "annotationlib", "compression", "concurrent.interpreters"}
NEW_NAMES = {
    "asyncio": {"Barrier", "Runner", "TaskGroup", "timeout", "timeout_at"},
    "collections.abc": {"Buffer"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"EnumCheck", "ReprEnum", "StrEnum", "member", "nonmember", "verify", "global_enum"},
    "hashlib": {"file_digest"},
    "inspect": {"getmembers_static", "markcoroutinefunction"},
    "itertools": {"batched"},
    "logging": {"getHandlerByName", "getLevelNamesMapping"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "operator": {"call"},
    "os": {"process_cpu_count", "listdrives"},
    "re": {"NOFLAG"},
    "string": {"templatelib"},
    "types": {"get_original_bases", "CapsuleType"},
    "typing": {
        "LiteralString", "Never", "NotRequired", "ReadOnly", "Required", "Self", "TypeAliasType",
        "TypeIs", "TypeVarTuple", "Unpack", "assert_never", "assert_type", "clear_overloads",
        "dataclass_transform", "get_overloads", "get_protocol_members", "is_protocol", "override",
        "reveal_type",
    },
    "warnings": {"deprecated"},
}  # fmt: skip
NEW_BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}
# Of objects whose class is not seen here; none of these names means anything else in the package.
NEW_METHODS = {"add_note", "is_junction", "full_match", "from_uri", "copy_into", "move_into"}
# Keyword arguments that came later, by the function's name.
NEW_KEYWORDS = {"rmtree": {"onexc"}, "glob": {"case_sensitive"}, "rglob": {"case_sensitive"}}


def files_of(names: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        path = ROOT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return found


def newer_apis(tree: ast.AST) -> Iterator[str]:
    """What of a module is not in Python 3.10."""
    modules = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NEW_MODULES)
        elif isinstance(node, ast.ImportFrom):
            new = NEW_NAMES.get(node.module or "", set())
            yield from (alias.name for alias in node.names if alias.name in new)
            if node.module in NEW_MODULES:
                yield node.module
        elif isinstance(node, ast.Attribute):
            owner = modules.get(node.value.id) if isinstance(node.value, ast.Name) else None
            if node.attr in NEW_METHODS or node.attr in NEW_NAMES.get(owner or "", set()):
                yield node.attr
        elif isinstance(node, ast.Name) and node.id in NEW_BUILTINS:
            yield node.id
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            yield from ({k.arg for k in node.keywords} & NEW_KEYWORDS.get(called, set()))


@pytest.mark.parametrize(
    "path",
    files_of((*RUNNING, *MEASURING, "parity", "report")),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_module_has_the_syntax_and_the_apis_of_python_310(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    assert list(newer_apis(tree)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import tomllib",
        "from datetime import UTC",
        "import enum\nclass E(enum.StrEnum): ...",
        "from typing import Self",
        "import hashlib as h\nh.file_digest",
        "raise ExceptionGroup('x', [])",
        "err.add_note('x')",
        "import shutil\nshutil.rmtree(p, onexc=f)",
    ],
)
def test_newer_api_is_found(source):
    assert list(newer_apis(ast.parse(source)))


def test_newer_syntax_is_found():
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* ValueError: ...", feature_version=(3, 10))


# Runs under any interpreter. Third-party packages that it has not got are stood in for: only what
# modules do with them while they are imported has to work.
_IMPORT = """
import importlib, importlib.abc, importlib.machinery, importlib.util, sys, types

names, blocked, may_stand_in = {names!r}, {blocked!r}, {may_stand_in!r}

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn
    def __getitem__(cls, item):
        return StandIn
    def __or__(cls, other):
        return cls
    __ror__ = __or__

class StandIn(metaclass=Anything):
    def __init__(self, *args, **options):
        pass

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in blocked:
            raise ModuleNotFoundError(f"{{name}} is not on a device", name=name)
        if top in may_stand_in and top in missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(StandIn, name)
        return module
    def exec_module(self, module):
        pass

missing = {{name for name in may_stand_in if importlib.util.find_spec(name) is None}}
sys.meta_path.insert(0, Finder())
for name in names:
    importlib.import_module(name)
left = [name for name in blocked if name in sys.modules]
assert not left, left
print(len(names), sys.version_info[:2])
"""


def module_names(parts: tuple[str, ...]) -> list[str]:
    names = []
    for path in files_of(parts):
        dotted = ".".join(("gap_export", *path.relative_to(ROOT).with_suffix("").parts))
        names.append(dotted.removesuffix(".__init__"))
    return names


def import_under(interpreter: Path | str, *, parts, blocked, may_stand_in) -> str:
    code = _IMPORT.format(
        names=module_names(parts), blocked=tuple(blocked), may_stand_in=tuple(may_stand_in)
    )
    done = run_program([interpreter, "-W", "error", "-c", code], cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_builds_imports_with_everything_but_numpy_blocked():
    others = ("PIL", "onnxruntime", "rich", "tokenizers", "typer", "yaml", "huggingface_hub")
    import_under(sys.executable, parts=BUILDING, blocked=(*BLOCKED, *others), may_stand_in=())


def test_what_runs_imports_without_the_export_packages():
    import_under(sys.executable, parts=RUNNING, blocked=BLOCKED, may_stand_in=())


def test_what_checks_against_a_golden_imports_without_the_export_packages():
    # Recipes are of pydantic, which the base install has.
    blocked = [name for name in BLOCKED if name != "pydantic"]
    import_under(sys.executable, parts=CHECKING, blocked=blocked, may_stand_in=())


def test_what_measures_speed_imports_without_the_export_packages():
    blocked = [name for name in BLOCKED if name != "pydantic"]
    import_under(sys.executable, parts=MEASURING, blocked=blocked, may_stand_in=())


def test_import_of_a_blocked_package_is_an_error():
    with pytest.raises(AssertionError, match="onnx_ir is not on a device"):
        import_under(sys.executable, parts=("graph",), blocked=BLOCKED, may_stand_in=())


def python310() -> str:
    """A Python 3.10, or a skip."""
    folders = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python"))
    candidates = [shutil.which("python3.10"), *map(str, folders)]
    for candidate in filter(None, candidates):
        # A version manager's shim may be there for a version that is not.
        asked = run_program([candidate, "-c", "import sys; print(sys.version_info[:2])"])
        if asked.stdout.strip() == "(3, 10)":
            return candidate
    pytest.skip("no Python 3.10 on this machine, which is what JetPack 6 has")


@pytest.mark.parametrize("parts", [BUILDING, RUNNING], ids=["building", "running"])
def test_every_module_imports_under_a_real_python_310(parts):
    third_party = ("av", "rosbags", "numpy", "PIL", "onnxruntime", "simplejpeg", "tokenizers")
    said = import_under(python310(), parts=parts, blocked=BLOCKED, may_stand_in=third_party)
    assert "(3, 10)" in said

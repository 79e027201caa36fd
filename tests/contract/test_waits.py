"""Nothing that tests and tools wait for is waited for without end."""

from __future__ import annotations

import ast
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import run_program, start_program

ROOT = Path(__file__).resolve().parents[2]
# Where tests start programs; a tool that looks at its program five times a second; one that ends
# the server that it started; one that looks ten times a second and ends what takes too long.
WITH_LIMITS = {
    ROOT / "tests" / "programs.py",
    ROOT / "tools" / "engine_bench" / "watch.py",
    ROOT / "tools" / "gpu_session.py",
    ROOT / "tools" / "serve_load" / "server.py",
}
STARTS = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput"},
    "os": {"system", "popen", "fork", "waitpid", "wait", "spawnv", "posix_spawn"},
}
# Without an argument they wait as long as it takes.
WAITS = {"join", "wait", "communicate", "get"}


def endless(path: Path) -> Iterator[str]:
    """Lines of a Python file that start a program or wait for something without a time limit."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        module = owner.id if isinstance(owner, ast.Name) else ""
        limited = any(keyword.arg == "timeout" for keyword in node.keywords)
        starts = name in STARTS.get(module, ())
        waits = (name in WAITS and not node.args) or (module == "ray" and name in {"get", "wait"})
        if (starts or waits) and not limited:
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}"


def test_every_wait_of_tests_and_tools_has_a_time_limit():
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/**/*.py")]
    assert set(files) > WITH_LIMITS
    found = [line for path in files if path not in WITH_LIMITS for line in endless(path)]
    assert found == [], "tests start programs with tests/programs.py"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("subprocess.run(['x'], check=True)", 1),
        ("subprocess.run(['x'], timeout=5)", 0),
        ("subprocess.Popen(['x'])", 1),
        ("os.system('x')", 1),
        ("thread.join()", 1),
        ("thread.join(5)", 0),
        ("', '.join(words)", 0),
        ("ray.get(reply)", 1),
        ("ray.get(reply, timeout=5)", 0),
        ("event.wait()", 1),
    ],
)
def test_a_wait_without_a_limit_is_found(tmp_path, line, count):
    (tmp_path / "x.py").write_text(line)
    assert len(list(endless(tmp_path / "x.py"))) == count


# pytest with what is tested here alone.
PYTEST = [sys.executable, *"-m pytest -q -p tests.limits -p xdist -p timeout".split()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
HANGS = """
import ctypes, sys, time, pytest

@pytest.mark.timeout(1)
def test_python():
    while True:
        time.sleep(0.1)

@pytest.mark.timeout(1)
def test_native_code_that_holds_the_interpreter(request):
    def lock_twice():
        library, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
        library.pthread_mutex_lock(lock), library.pthread_mutex_lock(lock)
    # In teardown, after a failure: that ends pytest-timeout's limit.
    request.addfinalizer(lock_twice)
    raise AssertionError

def test_program():
    from tests.programs import run_program
    run_program([sys.executable, "-c", "import time; time.sleep(1000)"], seconds=0.5)

def test_fine():
    pass
"""


def test_a_test_that_hangs_fails_and_the_others_run(tmp_path):
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed")
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run_program([*PYTEST, "-n", "2", tmp_path], env=ENVIRONMENT)
    summary = done.stdout.splitlines()[-1]
    assert "4 failed, 1 passed" in summary, done.stdout
    assert "Timeout (>1.0s) from pytest-timeout" in done.stdout
    assert "crashed while running" in done.stdout
    assert "killed, still running after 0.5 s" in done.stdout


def test_a_program_is_killed_with_all_that_it_started():
    def wait_for_a_child() -> None:
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
        # The shell waits for its child, which holds the shell's stdout as well.
        command = ["sh", "-c", f"{sys.executable} -c '{code}'; true"]
        with start_program(command, seconds=1) as process:
            assert process.stdout is not None
            children.append(process.stdout.readline())
            process.stdout.read()

    children: list[str] = []
    with pytest.raises(AssertionError, match="killed, still running after 1 s"):
        wait_for_a_child()
    # Gone, or dead and not yet fetched by init.
    command = Path(f"/proc/{int(children[0])}/cmdline")
    assert not command.exists() or command.read_bytes() == b""


IGNORED = """
import os, signal, sys
for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
    signal.signal(signum, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM])
os.close(0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_tests_do_not_depend_on_what_the_run_was_started_by(tmp_path):
    """As background jobs of scripts and of job runners are started, and worse."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_signals.py").write_text(
        "import os, signal, subprocess, sys, pytest\n"
        "def test_signals():\n"
        "    with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGINT)\n"
        "    command = [sys.executable, '-c', 'import os; os.kill(os.getpid(), %d)']\n"
        "    for n in (2, 15):\n"
        "        command[2] = f'import os, time; os.kill(os.getpid(), {n}); time.sleep(5)'\n"
        "        assert subprocess.run(command, timeout=9).returncode == -n\n"
    )
    command = [sys.executable, "-c", IGNORED, *PYTEST[1:], "-n", "1", tmp_path]
    done = run_program(command, env=ENVIRONMENT)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

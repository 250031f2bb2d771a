"""Children are forked from a process that has imported everything; they end as processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zeropoint.core.errors import RuntimeFailure
from zeropoint.runtime import fork_server
from zeropoint.runtime.child import run_main
from zeropoint.runtime.fork_server import ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux")
ROOT = Path(__file__).resolve().parents[2]
CHILDREN = """
import os, sys, time
from zeropoint.core.errors import SpecError
def main(what, *rest):
    print(*rest)
    if what == "refuse":
        raise SpecError("not that", where="child")
    if what == "raise":
        raise ValueError("a bug")
    if what == "die":
        os.kill(os.getpid(), 6)
    if what == "sleep":
        with open(rest[0], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "forked_children.py").write_text(CHILDREN)
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def called(server: ForkServer, environment: dict[str, str], *arguments: str, timeout: float = 60.0):
    return server.run("forked_children", arguments, timeout, environment)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def pid_in(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(path.read_text())


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [("return", 0, ""), ("refuse", 1, "child: not that"), ("raise", 1, "ValueError: a bug"), ("die", -6, "")],
)
def test_status_and_words_are_the_childs(server, environment, what, code, words):
    done = called(server, environment, what, "a", "b")
    assert done.returncode == code
    assert words in done.stderr
    assert what == "die" or done.stdout == "a b\n"
    assert ("Traceback" in done.stderr) == (what == "raise")


def test_the_server_is_one_process_for_all_calls(server, environment):
    called(server, environment, "return")
    first = server._started.process.pid
    start = time.perf_counter()
    for _ in range(5):
        called(server, environment, "return")
    assert server._started.process.pid == first
    assert time.perf_counter() - start < 5  # A new process would import torch for longer than a second, each time.


def test_threads_share_it(server, environment):
    found: dict[int, str] = {}

    def call(i: int) -> None:
        found[i] = called(server, environment, "return", str(i)).stdout

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(8)}


def test_a_child_out_of_time_is_ended(server, environment, tmp_path):
    called(server, environment, "return")
    with pytest.raises(subprocess.TimeoutExpired):
        called(server, environment, "sleep", str(tmp_path / "pid"), timeout=1.0)
    assert ends(pid_in(tmp_path / "pid"))
    assert called(server, environment, "return", "a").stdout == "a\n"


def test_an_interruption_ends_the_child(server, environment, tmp_path):
    def interrupt() -> None:
        pid_in(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            called(server, environment, "sleep", str(tmp_path / "pid"))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert ends(pid_in(tmp_path / "pid"))


def test_a_server_that_was_killed_is_started_again(server, environment):
    called(server, environment, "return")
    first = server._started.process
    first.kill()
    first.wait()
    assert called(server, environment, "return", "a").stdout == "a\n"
    assert server._started.process is not first


def test_a_server_that_nobody_asks_ends(environment, monkeypatch):
    monkeypatch.setattr(
        fork_server, "SERVE", "import zeropoint.runtime.fork_server as f; f.IDLE_S = 0.2; f.serve({number})"
    )
    server = ForkServer()
    assert called(server, environment, "return").returncode == 0
    server._started.process.wait(30)
    assert called(server, environment, "return").returncode == 0
    server._started.process.wait(30)
    ended = server._started
    server.start(environment)
    assert server._started is not ended
    assert called(server, environment, "return").returncode == 0
    server.close()


def test_a_server_that_does_not_start_says_why(environment, monkeypatch):
    monkeypatch.setattr(fork_server, "SERVE", "raise SystemExit('no such thing as {number}')")
    server = ForkServer()
    done = called(server, environment, "return")
    server.close()
    assert done.returncode == 1
    assert "no such thing as" in done.stderr


def test_the_server_ends_with_its_caller(environment):
    code = """
import os
from zeropoint.runtime.fork_server import ForkServer
server = ForkServer()
server.run("forked_children", ["return"], 60, dict(os.environ))
print(server._started.process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ends(int(done.stdout))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_caller_has_a_server_of_its_own(server, environment):
    called(server, environment, "return")
    reading, writing = os.pipe()
    caller = os.fork()
    if caller == 0:
        first = server._started.process.pid
        text = called(server, environment, "return", "a").stdout + str(server._started.process.pid == first)
        server.close()
        os.write(writing, text.encode())
        os._exit(0)
    os.waitpid(caller, 0)
    assert os.read(reading, 100) == b"a\nFalse"
    os.close(reading)
    os.close(writing)
    assert called(server, environment, "return", "b").stdout == "b\n"


def test_a_server_is_started_once(environment):
    server = ForkServer()
    server.start(environment)
    first = server._started
    server.start(environment)
    assert server._started is first
    assert called(server, environment, "return", "a").stdout == "a\n"
    assert server._started is first
    server.close()


def test_a_child_ends_with_its_caller(environment, tmp_path):
    code = """
import os, sys
from zeropoint.runtime.fork_server import ForkServer
ForkServer().run("forked_children", ["sleep", sys.argv[1]], 600, dict(os.environ))
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], env=environment) as caller:
        pid = pid_in(tmp_path / "pid")
        caller.kill()
    assert ends(pid)


def test_a_child_that_nobody_watches_is_ended_and_not_run_again(server, environment, tmp_path):
    path = tmp_path / "pid"

    def kill_the_watcher() -> None:
        os.kill(os.getpgid(pid_in(path)), signal.SIGKILL)

    thread = threading.Thread(target=kill_the_watcher)
    thread.start()
    assert called(server, environment, "sleep", str(path)).returncode == -signal.SIGKILL
    thread.join()
    assert ends(pid_in(path))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_asks_can_ask(environment):
    server = ForkServer()
    with server._lock:
        caller = os.fork()
        if caller == 0:
            code = called(server, environment, "return").returncode
            server.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(caller, 0)[1]) == 0


def test_a_child_that_is_no_module():
    with pytest.raises(RuntimeFailure, match=r"No module named 'zeropoint\.nothing'"):
        run_main("zeropoint.nothing", [], 60)

"""A process that has imported what children need, and forks one for each call.

Importing torch and the runtime takes seconds, a fork hundredths of one. The server ends with the process that started
it, or when nobody asked for a while; the next call starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from typing import IO, NoReturn

from zeropoint.core.errors import ZeropointError
from zeropoint.core.extras import import_extra

IDLE_S = 120.0
"""After so many seconds without a call the server ends: it holds some 400 MB."""
EXTRAS = ("executorch.runtime", "executorch.kernels.quantized")
MESSAGE_BYTES = 1 << 16
NUMBER = struct.Struct("i")
"""How the two numbers of an answer are sent: the process group of the child, and its exit status."""
SERVE = "from zeropoint.runtime.fork_server import serve; serve({number})"


class ForkServer:
    """The caller's end. Threads may share it; a forked process starts a server of its own."""

    def __init__(self) -> None:
        self._started: _Started | None = None
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)  # Another thread may hold it while this process is forked.
        atexit.register(self.close)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def run(
        self, module: str, arguments: Sequence[str], timeout: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Runs the function ``main`` of a module in a child, and returns its exit status and what it wrote.

        Args:
            module: its full name.
            arguments: of ``main``.
            timeout: seconds after which the child is ended.
            environment: of the server, when one is started; its children have that one, and its processors.

        Raises:
            subprocess.TimeoutExpired: the child took longer.
        """
        deadline = time.monotonic() + timeout
        request = json.dumps([module, list(arguments)]).encode()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = None
            for _ in range(2):  # The server may just have ended because nobody asked.
                if code is None:
                    with self._send(request, out, err, environment) as answer:
                        code = _answered(answer, deadline, timeout)
            words = self._last_words() if code is None else _content(err)
            return subprocess.CompletedProcess([module, *arguments], 1 if code is None else code, _content(out), words)

    def start(self, environment: dict[str, str]) -> None:
        """Starts the server, if none runs: it imports while the caller goes on."""
        with self._lock:
            if self._started is not None and not self._started.is_running():
                self.close()
            if self._started is None:
                self._started = _Started(environment)

    def close(self) -> None:
        """Ends the server, if there is one."""
        if self._started is not None:
            self._started.close()
        self._started = None

    def _send(self, request: bytes, out: IO[str], err: IO[str], environment: dict[str, str]) -> socket.socket:
        """Hands a call to the server, and returns where it will answer."""
        ours, theirs = socket.socketpair()
        files = [theirs.fileno(), out.fileno(), err.fileno()]
        with theirs, self._lock:
            if self._started is not None and not self._started.takes(request, files):
                self.close()
            if self._started is None:
                self._started = _Started(environment)
                self._started.takes(request, files)
        return ours

    def _last_words(self) -> str:
        with self._lock:
            return "" if self._started is None else _content(self._started.words)


class _Started:
    """A server that runs, or did."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.owner, self.words = os.getpid(), tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE.format(number=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.words,
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # A process of one thread is safe to fork.
                start_new_session=True,  # An interruption from the keyboard is the caller's to handle.
            )

    def is_running(self) -> bool:
        """True where it runs, and is this process's."""
        return self.owner == os.getpid() and self.process.poll() is None

    def takes(self, request: bytes, files: Sequence[int]) -> bool:
        """Hands it a call with open files; False where it ended, or is the server of the process that forked this."""
        if self.owner != os.getpid():
            return False
        try:
            return socket.send_fds(self.channel, [request], files) > 0
        except ConnectionError:
            return False

    def close(self) -> None:
        """Ends it, unless it is another process's."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # Not ours to wait for.
        self.channel.close()
        self.words.close()


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _answered(answer: socket.socket, deadline: float, timeout: float) -> int | None:
    """Returns a child's exit status, negative: the signal that ended it; None where the server ended before it."""
    group = _number(answer, deadline, timeout)
    if group is None:
        return None
    try:
        code = _number(answer, deadline, timeout)
    except BaseException:
        _kill(group)
        raise
    if code is None:  # Who watches it was killed.
        _kill(group)
    return -signal.SIGKILL if code is None else code


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _number(answer: socket.socket, deadline: float, timeout: float) -> int | None:
    answer.settimeout(max(1e-3, deadline - time.monotonic()))  # 0 would mean not to wait at all.
    try:
        data = answer.recv(NUMBER.size)
    except TimeoutError as error:
        raise subprocess.TimeoutExpired("child", timeout) from error
    return NUMBER.unpack(data)[0] if len(data) == NUMBER.size else None


# -- the server ------------------------------------------------------------------------------------------------------


def serve(number: int) -> None:
    """The server: forks a child for each call that comes, until the caller ends or nobody asked for a while."""
    channel = socket.socket(fileno=number)
    with contextlib.suppress(ZeropointError):  # The child says what is missing.
        for module in EXTRAS:
            import_extra(module, "executorch")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for those that are forked here.
    channel.settimeout(IDLE_S)
    while True:
        try:
            request, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
        except TimeoutError:
            return
        if not request:
            return
        if os.fork() == 0:
            channel.close()
            _watch(*json.loads(request), *files)
        for file in files:
            os.close(file)


def _watch(module: str, arguments: list[str], answer: int, out: int, err: int) -> NoReturn:
    """Tells the group that it and the child are, forks that, and tells how it ended; ends it where the caller does."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.write(answer, NUMBER.pack(os.getpid()))
    ended, lives = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        os.dup2(out, 1)
        os.dup2(err, 2)
        work(module, arguments)
    os.close(lives)  # Of the child alone, from now on.
    poller = select.poll()
    poller.register(ended, 0)
    poller.register(answer, 0)  # What is asked for is only whether the other ends are there.
    if ended not in dict(poller.poll()):
        os.killpg(0, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.write(answer, NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def work(module: str, arguments: Sequence[str]) -> NoReturn:
    """The child: runs a module's ``main`` and ends the process; an error of ours is written without a traceback."""
    code = 1
    try:
        importlib.import_module(module).main(*arguments)
        code = 0
    except ZeropointError as error:
        print(error, file=sys.stderr)
    except BaseException:  # a process ends here, and says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

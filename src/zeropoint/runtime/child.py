"""Run a ``.pte`` file in a child process: a kernel's failed assertion kills the process that it is in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from zeropoint.core.errors import RuntimeFailure
from zeropoint.runtime.fork_server import ForkServer

CHILD = "import sys; from zeropoint.runtime.fork_server import work; work(sys.argv[1], sys.argv[2:])"
NOISE = "[cpuinfo_utils"
"""How lines begin that the runtime prints whenever it starts."""
SERVER = ForkServer()
FORKS = sys.platform == "linux"
"""Elsewhere a process may hold what does not survive a fork."""
Batches = Sequence[tuple[Any, ...]]


def run_in_child(pte: bytes, batches: Batches, *, timeout: float = 600.0) -> list[tuple[Any, ...]]:
    """Returns the outputs of a program for each tuple of inputs, computed in a child process.

    Outputs are flat: tensors, numbers and None in the order of the model's.

    Args:
        pte: the bytes of the file.
        batches: positional inputs of each call: tensors, numbers and None, in tuples, lists and dictionaries.
        timeout: seconds after which the child is ended.

    Raises:
        RuntimeFailure: the child died, ran out of time, or the runtime refused the file; gives its last words.
    """
    with tempfile.TemporaryDirectory(prefix="zeropoint-") as folder:
        Path(folder, "model.pte").write_bytes(pte)
        for i, inputs in enumerate(batches):
            save_values(Path(folder, f"in{i}.npz"), pytree.tree_leaves(inputs))
        run_main(__name__, [folder, str(len(batches))], timeout)
        return [tuple(load_values(Path(folder, f"out{i}.npz"))) for i in range(len(batches))]


def expect_children() -> None:
    """Says that children will be asked for soon: what they import is imported meanwhile, where they are forked."""
    if FORKS:
        SERVER.start(_environment())


def run_main(module: str, arguments: Sequence[str], timeout: float, *, forked: bool = True) -> str:
    """Runs the function ``main`` of one of our modules in a child process, and returns what it printed.

    Args:
        module: its full name.
        arguments: of ``main``.
        timeout: seconds after which the child is ended.
        forked: from a process that imported everything, where processes are forked. One that is new takes seconds to
            import, and is what time and memory are measured in: a fork copies memory while it is used.

    Raises:
        RuntimeFailure: the child died, ran out of time, or raised; gives its last words.
    """
    try:
        done = _run(module, arguments, timeout, forked=forked and FORKS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure(f"the runtime did not answer in {timeout:g} s", where="child process") from error
    if done.returncode == 0:
        return done.stdout
    words = [line for line in done.stderr.strip().splitlines() if line.strip() and not line.startswith(NOISE)][-5:]
    cause = f"died of {_signal(-done.returncode)}" if done.returncode < 0 else "failed"
    raise RuntimeFailure(f"the runtime {cause}: " + " | ".join(words), where="child process")


def _run(module: str, arguments: Sequence[str], timeout: float, *, forked: bool) -> subprocess.CompletedProcess[str]:
    if forked:
        return SERVER.run(module, arguments, timeout, _environment())
    command = [sys.executable, "-c", CHILD, module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=_environment())


def _signal(number: int) -> str:
    names = {each.value: each.name for each in signal.Signals}
    return f"signal {number} ({names.get(number, 'unknown')})"


def _environment() -> dict[str, str]:
    """Returns this process's environment, in which the child finds the modules that this process found."""
    places = dict.fromkeys([str(Path(__file__).resolve().parents[2]), *(str(Path(p).resolve()) for p in sys.path)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def save_values(path: Path, values: Sequence[Any]) -> None:
    """Writes tensors as arrays of one file, and beside it the dtype of each, numbers and None, in their order."""
    tensors = [value.detach().cpu().contiguous() for value in values if isinstance(value, torch.Tensor)]
    np.savez(path, *[(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for t in tensors])
    described = [
        {"dtype": str(value.dtype)} if isinstance(value, torch.Tensor) else {"value": value} for value in values
    ]
    path.with_suffix(".json").write_text(json.dumps(described))


def load_values(path: Path) -> list[Any]:
    """Returns what ``save_values`` wrote, each as what it was, tensors with their dtype; nothing is unpickled."""
    described: list[dict[str, Any]] = json.loads(path.with_suffix(".json").read_text())
    with np.load(path, allow_pickle=False) as arrays:
        tensors = iter([torch.from_numpy(arrays[f"arr_{i}"]) for i in range(len(arrays.files))])
    return [each["value"] if "value" in each else _typed(next(tensors), each["dtype"]) for each in described]


def _typed(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Returns a tensor as written: numpy has no bfloat16, whose bits are kept as int16."""
    return tensor.view(torch.bfloat16) if dtype == str(torch.bfloat16) else tensor


def main(folder: str, count: str) -> None:
    """The child: runs the program in the folder on each input file and writes the outputs."""
    from zeropoint.runtime.executorch import Program

    program = Program.load(Path(folder, "model.pte"))
    for i in range(int(count)):
        outputs = program(*load_values(Path(folder, f"in{i}.npz")))
        save_values(Path(folder, f"out{i}.npz"), outputs)

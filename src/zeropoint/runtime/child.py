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

from zeropoint.core.errors import RuntimeFailure, ZeropointError

CHILD = "import sys; from zeropoint.runtime.child import main; main(*sys.argv[1:])"
NOISE = "[cpuinfo_utils"
"""How lines begin that the runtime prints whenever it starts."""
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
        _run(folder, len(batches), timeout)
        return [tuple(load_values(Path(folder, f"out{i}.npz"))) for i in range(len(batches))]


def _run(folder: str, count: int, timeout: float) -> None:
    command = [sys.executable, "-c", CHILD, folder, str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=_environment())
    except subprocess.TimeoutExpired as error:
        raise RuntimeFailure(f"the runtime did not answer in {timeout:g} s", where="child process") from error
    if done.returncode == 0:
        return
    words = [line for line in done.stderr.strip().splitlines() if line.strip() and not line.startswith(NOISE)][-5:]
    cause = f"died of {_signal(-done.returncode)}" if done.returncode < 0 else "failed"
    raise RuntimeFailure(f"the runtime {cause}: " + " | ".join(words), where="child process")


def _signal(number: int) -> str:
    names = {each.value: each.name for each in signal.Signals}
    return f"signal {number} ({names.get(number, 'unknown')})"


def _environment() -> dict[str, str]:
    """Returns this process's environment, in which the child finds the modules that this process found."""
    places = dict.fromkeys([str(Path(__file__).resolve().parents[2]), *(str(Path(p).resolve()) for p in sys.path)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def save_values(path: Path, values: Sequence[Any]) -> None:
    """Writes tensors as arrays of one file, bfloat16 as float32, and beside it numbers, None and where each stands."""
    tensors = [value.detach().cpu() for value in values if isinstance(value, torch.Tensor)]
    plain = [t.float() if t.dtype == torch.bfloat16 else t for t in tensors]
    np.savez(path, *[t.contiguous().numpy() for t in plain])
    others = [[] if isinstance(value, torch.Tensor) else [value] for value in values]
    path.with_suffix(".json").write_text(json.dumps(others))


def load_values(path: Path) -> list[Any]:
    """Returns what ``save_values`` wrote, each as what it was; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as arrays:
        tensors = iter([torch.from_numpy(arrays[f"arr_{i}"]) for i in range(len(arrays.files))])
    others: list[list[Any]] = json.loads(path.with_suffix(".json").read_text())
    return [other[0] if other else next(tensors) for other in others]


def main(folder: str, count: str) -> None:
    """The child: runs the program in the folder on each input file and writes the outputs, or an error."""
    from zeropoint.runtime.executorch import Program

    try:
        program = Program.load(Path(folder, "model.pte"))
        for i in range(int(count)):
            outputs = program(*load_values(Path(folder, f"in{i}.npz")))
            save_values(Path(folder, f"out{i}.npz"), outputs)
    except ZeropointError as error:
        sys.exit(str(error))

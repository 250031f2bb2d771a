"""Time and memory that ``.pte`` files take, measured in child processes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from zeropoint.core.errors import RuntimeFailure
from zeropoint.runtime.child import load_values, run_main, save_values

MEMORY_RUNS = 3
"""Runs while memory is watched: the first ones reserve it."""
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""Written to clear_refs, it sets the peak of resident memory to what is resident (Linux 4.0, proc(5))."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What files take, by the names that they were given.

    Args:
        seconds: of each run of each file; runs of the same number followed each other.
        peak_bytes: by how much the peak of resident memory of a process grew while it read the file (bytes of the file
            included), loaded it and ran it; None where the system does not tell.
        threads: of the runtime.
    """

    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int | None]
    threads: int


def measure(
    files: Mapping[str, bytes],
    inputs: tuple[Any, ...],
    *,
    runs: int,
    warmup: int,
    threads: int | None,
    timeout: float = 3600.0,
) -> Measurement:
    """Returns the times of alternating runs of files on the same inputs, and the memory of each alone.

    Args:
        files: the bytes of each file by name.
        inputs: positional inputs.
        runs: how often each file is run and timed.
        warmup: how often before.
        threads: of the runtime; None: as many as it chooses.
        timeout: seconds after which a child is ended.

    Raises:
        RuntimeFailure: a file did not run; gives the runtime's words.
    """
    with tempfile.TemporaryDirectory(prefix="zeropoint-") as folder:
        save_values(Path(folder, "in.npz"), pytree.tree_leaves(inputs))
        names = [f"{i}.pte" for i in range(len(files))]
        for name, pte in zip(names, files.values(), strict=True):
            Path(folder, name).write_bytes(pte)
        plan = {"runs": runs, "warmup": warmup, "threads": threads}
        timed = _child(folder, {**plan, "what": "time", "files": names}, timeout)
        memory = [{**plan, "what": "memory", "files": [name]} for name in names]
        with ThreadPoolExecutor() as pool:  # Each is a process, and memory does not depend on the others.
            peaks = [found["peak"] for found in pool.map(lambda each: _child(folder, each, timeout), memory)]
    seconds = {name: timed["seconds"][file] for name, file in zip(files, names, strict=True)}
    return Measurement(seconds, dict(zip(files, peaks, strict=True)), timed["threads"])


def _child(folder: str, plan: dict[str, Any], timeout: float) -> dict[str, Any]:
    try:
        found = run_main(__name__, [folder, json.dumps(plan)], timeout, forked=False)
    except RuntimeFailure as error:
        raise RuntimeFailure(error.what, where="bench", remedy="Ask for fewer runs, if it was slow.") from error
    return json.loads(found.splitlines()[-1])


# -- time ------------------------------------------------------------------------------------------------------------


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Returns the seconds of each call of each function, called in turn so that noise meets all of them."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Returns the median over the rounds of one function's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


# -- the child -------------------------------------------------------------------------------------------------------


def main(folder: str, given: str) -> None:
    """The child: does what a plan says with the files in the folder, and prints the result as its last line."""
    from zeropoint.runtime.executorch import use_threads

    plan = json.loads(given)
    threads = use_threads(plan["threads"])
    inputs = load_values(Path(folder, "in.npz"))
    paths = {name: Path(folder, name) for name in plan["files"]}
    if plan["what"] == "memory":
        result = {"peak": _peak_growth(next(iter(paths.values())), inputs)}
    else:
        result = {"threads": threads, "seconds": _seconds(paths, inputs, plan["runs"], plan["warmup"])}
    print(f"\n{json.dumps(result)}", flush=True)


def _seconds(paths: Mapping[str, Path], inputs: list[Any], runs: int, warmup: int) -> dict[str, list[float]]:
    from zeropoint.runtime.executorch import Program

    programs = {name: Program.load(path) for name, path in paths.items()}
    return alternate({name: (lambda p=program: p(*inputs)) for name, program in programs.items()}, runs, warmup)


def _peak_growth(path: Path, inputs: list[Any]) -> int | None:
    from zeropoint.runtime.executorch import Program

    before = _resident("VmRSS") if _forget_peak() else None
    program = Program.load(path)
    for _ in range(MEMORY_RUNS):
        program(*inputs)
    peak = _resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _forget_peak() -> bool:
    try:
        REFERENCES.write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """Returns a figure of /proc/self/status, in bytes; None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found[1]) * 1024

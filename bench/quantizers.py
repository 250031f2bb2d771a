"""Does every quantizer of the executorch package work in zeropoint, as in torchao, up to what its backend runs?

Each runs in a process of its own, with a time limit: what fails, hangs or aborts is a cell of the table.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench._measure import parser, write_json
from bench._quantizer_classes import find_classes
from bench._quantizer_page import page, print_rows
from bench._quantizer_policies import POLICIES
from bench._quantizer_stages import NETWORKS, run_stages

Row = dict[str, Any]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["bench._quantizer_stages", "torchao.quantization.pt2e.quantize_pt2e", "executorch.exir"]
)
STAGES = ("torchao", "lower")
NO_DOWNLOAD = {"QNN_SDK_ROOT": "/nonexistent"}
"""Qualcomm's package downloads an SDK when it is imported, unless it is told where one is."""


@dataclass(frozen=True, slots=True)
class Job:
    """One policy, or none for a class that no policy makes, on one network."""

    quantizer: str
    module: str
    policy: int | None
    network: str
    stages: tuple[str, ...]

    def row(self) -> Row:
        """Returns the beginning of the row: what was run."""
        configuration = "" if self.policy is None else POLICIES[self.policy].configuration
        return {
            "quantizer": self.quantizer,
            "module": self.module,
            "configuration": configuration,
            "network": self.network,
        }


def jobs(
    only: Sequence[str] = (), networks: Sequence[str] = tuple(NETWORKS), stages: Sequence[str] = STAGES
) -> list[Job]:
    """Returns a job for each policy of each class that is found, and each network; the first network is lowered."""
    made: list[Job] = []
    for name, module in find_classes("executorch").items():
        indices = [i for i, policy in enumerate(POLICIES) if policy.quantizer == name] or [None]
        for index, network in itertools.product(indices, networks):
            wanted = tuple(stage for stage in stages if stage != "lower" or network == networks[0])
            if not only or name in only:
                made.append(Job(name, module, index, network, wanted))
    return made


def run_apart(waiting: Sequence[Job], limit: float) -> Iterator[Row]:
    """Gives the row of each job, run in one process; in another one after a job that killed it, or took too long."""
    while waiting:
        done = 0
        for row in _in_one_process(waiting, limit):
            done += 1
            yield row
        waiting = waiting[done:]


def _in_one_process(waiting: Sequence[Job], limit: float) -> Iterator[Row]:
    """Gives the rows of jobs up to the first that ends the process, with what each stage gave, or an "error"."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=_child, args=(waiting, writer), daemon=True)
    child.start()
    writer.close()
    for job in waiting:
        row, start = job.row(), time.perf_counter()
        while "seconds" not in row:
            if not reader.poll(max(0.0, start + limit - time.perf_counter())):
                child.kill()
                row |= {"error": f"took longer than {limit:.0f} s", "seconds": limit}
            else:
                row |= _received(reader, child)
        yield row
        if child.exitcode is not None or row["seconds"] == limit:
            break
    child.join()


def _received(reader: Connection, child: Any) -> Row:
    """Returns what the child sent, or how it ended."""
    try:
        return dict([reader.recv()])
    except EOFError:
        child.join()
        return {"error": f"its process ended with {child.exitcode}", "seconds": 0.0}


def _child(waiting: Sequence[Job], writer: Connection) -> None:
    """Sends what each stage of each job gave, then how long it took."""
    _silence()
    for job in waiting:
        start = time.perf_counter()
        try:
            if job.policy is None:
                raise LookupError("no row of bench/_quantizer_policies.py makes it")
            policy = POLICIES[job.policy]
            run_stages(policy, job.module, job.network, job.stages, lambda *reported: writer.send(reported))
        except Exception as error:
            writer.send(("error", f"{type(error).__name__}: {error}"))
        writer.send(("seconds", time.perf_counter() - start))
    writer.close()


def _silence() -> None:
    """Keeps what compilers and packages print out of the table, and lets them find their programs."""
    os.environ.update(NO_DOWNLOAD, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")


def run_all(only: Sequence[str], limit: float) -> Iterator[Row]:
    """Gives the rows of all stages, those of each module in a process of its own: some packages change torch."""
    for _, group in itertools.groupby(jobs(only), lambda job: job.module):
        yield from run_apart(list(group), limit)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", nargs="+", default=(), metavar="CLASS", help="the classes to run")
    arguments.add_argument("--limit", type=float, default=600.0, help="seconds for one quantizer and network")
    arguments.add_argument("--as-installed", metavar="FILE", help="figures of --json without vendors' packages")
    arguments.add_argument("--write", metavar="FILE", help="also write the page, e.g. docs/quantizers.md")
    options = arguments.parse_args()
    rows = list(print_rows(run_all(options.only, options.limit)))
    write_json(options.json, rows)
    if options.write:
        plain = json.loads(Path(options.as_installed).read_text()) if options.as_installed else rows
        Path(options.write).write_text(page(rows, plain))


if __name__ == "__main__":
    main()

"""One of two processes that train together: ``python -m ranks FOLDER RANK``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from resumable import TRAININGS, inputs, network
from torch.nn.parallel import DistributedDataParallel

from zeropoint.algorithms.qat_schedule import QATSchedule
from zeropoint.numerics.learnable_fake_quantize import enable_range_learning
from zeropoint.workflow import convert_pt2e, prepare_qat_pt2e

STEPS = 6
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "observing": ("moving average", {}),
    "frozen": ("moving average", {"freeze_ranges_after": 4, "freeze_batch_norm_after": 3}),
    "learning": ("learned", {}),
}


def wrapped(training: str) -> DistributedDataParallel:
    """Returns the same model in each process; ranges that are learned begin to before it is wrapped."""
    exported = torch.export.export(network(0).train(), (inputs(0),)).module()
    model = prepare_qat_pt2e(exported, TRAININGS[training][0]())
    if training == "learned":
        model(inputs(0))
        model.apply(enable_range_learning)
    return DistributedDataParallel(model)


def train(model: DistributedDataParallel, rank: int, settings: dict[str, int]) -> list[float]:
    schedule, optimizer = QATSchedule(**settings), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses: list[float] = []
    for step in range(STEPS):
        torch.manual_seed(step)
        schedule.step(model)
        loss = (model(inputs(10 * rank + step % 5) / 10) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def result(model: DistributedDataParallel, losses: list[float]) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.eval()
    with torch.no_grad():
        model.module.apply(lambda each: each.disable_observer() if hasattr(each, "disable_observer") else None)
        model(inputs(3))  # Its buffers are those of rank 0 from here on.
    after = dict(model.module.state_dict())
    converted = convert_pt2e(copy.deepcopy(model.module))
    return {"losses": losses, "state": state, "after": after, "output": converted(inputs(3))}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    for name, (training, settings) in CASES.items():
        model = wrapped(training)
        torch.save(result(model, train(model, rank, settings)), folder / f"{name} {rank}.pt")
        if rank == 0:
            torch.save(model.module.state_dict(), folder / f"{name} model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

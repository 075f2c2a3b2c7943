"""One program in several processes, as ``accelerate launch`` starts them: each takes a share, results come together.

In a single process nothing of this costs anything: accelerate is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")


def process_index_and_count() -> tuple[int, int]:
    """Return this process's number and how many there are, under accelerate's launcher or torchrun; (0, 1) alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks; asked before anything heavy is imported."""
    return int(os.environ.get("RANK", "0")) == 0 or int(os.environ.get("WORLD_SIZE", "1")) < 2


def split_between_processes(items: Sequence[Item]) -> list[tuple[int, Item]]:
    """Return this process's items with their numbers: every count-th, so that long and short ones are dealt evenly."""
    index, count = process_index_and_count()
    return list(enumerate(items))[index::count]


def gather_items(found: Sequence[tuple[int, Item]]) -> list[Item]:
    """Return what all processes found, in the order of its numbers."""
    if process_index_and_count()[1] == 1:
        return [item for _, item in sorted(found, key=lambda pair: pair[0])]
    from accelerate.utils import gather_object

    return [item for _, item in sorted(gather_object(list(found)), key=lambda pair: pair[0])]


def sum_across_processes(table: Tensor) -> Tensor:
    """Add up a tensor of every process, in place; exact where each entry is zero in all processes but one.

    It goes over the process's device, the only place where nccl adds, row by row: it may be larger than that.
    """
    if process_index_and_count()[1] == 1:
        return table
    from accelerate.utils import reduce

    device = _state().device
    for row in table:
        total: Any = reduce(row.to(device), "sum")
        row.copy_(total)
    return table


def wait_for_everyone() -> None:
    """Go on when all processes have come here."""
    if process_index_and_count()[1] > 1:
        _state().wait_for_everyone()


def runs_on_cpu() -> bool:
    """Whether processes run on the CPU: accelerate joins them there only if it is told to."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=runs_on_cpu())

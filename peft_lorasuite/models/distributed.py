"""Work split between processes, as ``accelerate launch`` or torchrun starts them.

In a single process accelerate is never imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")


def process_index_and_count() -> tuple[int, int]:
    """Return the index of this process and the number of processes; (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def is_main_process() -> bool:
    """Return whether this process writes files and output; called before anything heavy is imported."""
    return int(os.environ.get("RANK", "0")) == 0 or int(os.environ.get("WORLD_SIZE", "1")) < 2


def split_between_processes(items: Sequence[Item]) -> list[tuple[int, Item]]:
    """Return the items of this process with their indices.

    Process i of n gets items i, i + n, i + 2n, ..., so that long and short ones are spread evenly.
    """
    index, count = process_index_and_count()
    return list(enumerate(items))[index::count]


def gather_items(found: Sequence[tuple[int, Item]]) -> list[Item]:
    """Return the items of all processes in the order of their indices."""
    if process_index_and_count()[1] == 1:
        return [item for _, item in sorted(found, key=lambda pair: pair[0])]
    from accelerate.utils import gather_object

    return [item for _, item in sorted(gather_object(list(found)), key=lambda pair: pair[0])]


def sum_across_processes(table: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; exact where each entry is nonzero in at most one process.

    The sum runs on the process's device, as NCCL requires, row by row: the tensor may be larger than its memory.
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
    """Wait until all processes have reached this call."""
    if process_index_and_count()[1] > 1:
        _state().wait_for_everyone()


def runs_on_cpu() -> bool:
    """Return whether the processes run on the CPU, which accelerate has to be asked for."""
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=runs_on_cpu())

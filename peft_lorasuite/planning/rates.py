"""How fast a machine reads and computes: stated rates, and the measuring of the machine at hand."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraSuiteError
from ..linalg.assignment import assign, greedy_pairs
from .stages import Stage

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """How fast a machine is; `measure_rates` measures the one at hand.

    The defaults are the best that two cores of a server (AMD EPYC with AVX-512 bf16, no GPU) gave, files read cold.

    Attributes:
        read: Bytes read from disk per second, in GB.
        fp32: Operations of a matrix product per second in float32, in 10^9.
        fp64: The same in float64.
        bf16: The same in bfloat16, in which published backbones run.
        assign: Steps of the Hungarian method (n^2 m) per second, in 10^9.
        scores: Scores per second that the matching of feed-forward units looks at, in 10^9.
    """

    read: float = 0.4
    fp32: float = 180.0
    fp64: float = 90.0
    bf16: float = 400.0
    assign: float = 20.0
    scores: float = 0.3

    def __post_init__(self) -> None:
        slow = {name: value for name, value in vars(self).items() if not value > 0}
        if slow:
            raise LoraSuiteError("a rate is not positive", got=slow)

    def seconds(self, stage: Stage) -> float:
        """Return how long a stage takes: reading and computing add up."""
        work = (
            (stage.read, self.read), (stage.fp32, self.fp32), (stage.fp64, self.fp64), (stage.run, self.bf16),
            (stage.assign, self.assign), (stage.scores, self.scores),
        )  # fmt: skip
        return sum(amount / rate / GB for amount, rate in work)


def measure_rates(*, size: int = 1024, bytes_read: int = 2**27) -> Rates:
    """Measure the machine at hand with the threads that torch may use; about two seconds.

    Args:
        size: Rows of the matrices that are multiplied.
        bytes_read: Size of the temporary file that is read; its pages leave the cache first where the system allows.
    """
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64), ("bf16", torch.bfloat16)):
        M = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        rates[name] = 2 * size**3 / fastest(lambda M=M: M @ M) / GB
    scores = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(0))
    steps = 2 * size**3 / fastest(lambda: assign(scores), 1)
    looked = scores.numel() / fastest(lambda: greedy_pairs(scores))
    return Rates(read=_read_rate(bytes_read), assign=steps / GB, scores=looked / GB, **rates)


def fastest(work: Callable[[], Any], tries: int = 3) -> float:
    """Return the seconds of the fastest of some runs: other work on the machine only ever adds to them."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _read_rate(count: int) -> float:
    """Read a fresh file, out of the page cache where the system lets it be dropped; GB per second."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(2**20) * max(count // 2**20, 1))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path = Path(file.name)
        return path.stat().st_size / fastest(path.read_bytes, 1) / GB

"""The dtype in which a model runs: what its device computes fast, and what fits into memory."""

from __future__ import annotations

import logging
import platform
from functools import cache
from typing import Any, NamedTuple

import torch

from ..errors import LoraSuiteError

log = logging.getLogger(__name__)

CPU_MAPS = (None, "cpu", "disk")
"""Values of ``device_map`` that run a model on the CPU."""
FREE_MEMORY = 0.8
"""Share of the available memory that a model's weights may take."""


class RunningDtype(NamedTuple):
    """How a model is loaded and computes.

    Attributes:
        dtype: Dtype of the loaded weights.
        upcast: Whether the weights stay in a 16-bit dtype while every layer computes in float32.
        reason: Why it is not the checkpoint's own dtype; empty if it is.
    """

    dtype: torch.dtype
    upcast: bool = False
    reason: str = ""

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float32 if self.upcast else self.dtype

    def log(self, model: str) -> None:
        """Log the dtype where it is not the checkpoint's own."""
        if self.reason:
            _log_once(f"{model} runs in {str(self.compute).removeprefix('torch.')}: {self.reason}")


@cache
def _log_once(text: str) -> None:
    """Log a text at its first call alone: an upgrade loads a model several times."""
    log.info("%s", text)


def choose_dtype(
    dtype: torch.dtype | str, stored: torch.dtype, *, parameters: int, device_map: Any = None
) -> RunningDtype:
    """Choose the dtype in which a model runs; all commands and benchmarks use this function.

    A 16-bit checkpoint runs in its own dtype where the device has instructions for it, and otherwise in float32:
    products of bfloat16 matrices take about ninety times as long on a CPU without such instructions. Where the float32
    weights would not fit into memory, they stay as stored and each layer computes in float32.

    Args:
        dtype: A dtype, its name, or ``"auto"``.
        stored: Dtype of the checkpoint.
        parameters: Number of weights.
        device_map: As in ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        LoraSuiteError: For a name that is not that of a floating point dtype.
    """
    if dtype != "auto":
        return RunningDtype(as_dtype(dtype))
    on_cpu = device_map in CPU_MAPS or not torch.accelerator.is_available()
    if stored not in (torch.bfloat16, torch.float16) or has_instructions(stored, on_cpu=on_cpu):
        return RunningDtype(stored)
    name = str(stored).removeprefix("torch.")
    reason = f"the {'processor' if on_cpu else 'device'} has no instructions for {name}"
    on_disk = device_map == "disk"
    if on_cpu and not on_disk and 4 * parameters > FREE_MEMORY * available_memory():
        return RunningDtype(stored, upcast=True, reason=f"{reason}, and the weights do not fit in float32")
    return RunningDtype(torch.float32, reason=reason)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating point dtype, given as such or by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoraSuiteError(
            "unknown dtype", got=repr(dtype), wanted="auto, float32, bfloat16 or float16", do="pass one of them"
        )
    return found


def has_instructions(dtype: torch.dtype, *, on_cpu: bool) -> bool:
    """Return whether the device has instructions for matrix products in a 16-bit dtype, as torch reports it."""
    if not on_cpu:
        cuda = torch.cuda.is_available() and dtype == torch.bfloat16
        return torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True
    if platform.machine().lower() in ("x86_64", "amd64"):
        if dtype == torch.bfloat16:
            return _torch_cpu_flag("_is_avx512_bf16_supported") or _torch_cpu_flag("_is_amx_tile_supported")
        return _torch_cpu_flag("_is_amx_fp16_supported")
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    check = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return bool(check is not None and torch.backends.mkldnn.is_available() and check())


def available_memory() -> int:
    """Return the bytes of memory that are available to this process."""
    import psutil

    return int(psutil.virtual_memory().available)


def _torch_cpu_flag(name: str) -> bool:
    check = getattr(torch.cpu, name, None)
    return bool(check is not None and check())

"""A second device for tests on machines without a GPU: tensors that say ``second:0`` and keep their data on the CPU.

It is a PrivateUse1 backend of PyTorch, written in Python. As on a GPU, an operation on tensors of both devices is an
error (a CPU tensor of no dimension and the index of `index` are allowed), and values reach the CPU only by a copy. So a
forgotten ``.to(device)`` fails here as it does there. Gradients through a write to a part of a tensor are wrong here,
since a view does not know its strides. `install` registers the device for the rest of the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
BETWEEN_DEVICES = ("aten::_copy_from", "aten::_index_put_impl_", "aten::index.Tensor")
"""Operations that take tensors of both devices; the last two on CUDA as well, for the index."""
ALIASES = ("detach", "alias", "lift", "lift_fresh")
"""PyTorch's own kernels, which share the storage, to which the data belongs."""
COPIES = ("_to_copy", "copy", "copy_", "to")
"""PyTorch's own kernels, which end in ``_copy_from``."""
_libraries: list[torch.library.Library] = []
"""Kernels are registered for as long as their library is alive."""


class _DeviceModule:
    """What PyTorch and accelerate ask of ``torch.second``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device: Any = None) -> None:
        """Do nothing: every operation is finished when it returns."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 2**30, 2**30

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: random numbers are drawn on the CPU."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Do nothing, likewise."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> None:
    """Register the device, unless it is there."""
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([fallback, aten])
    fallback.fallback(_run, "PrivateUse1")
    _deep_copies_of_data()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        kernels = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")  # come before a fallback
        known = any(torch._C._dispatch_has_kernel_for_dispatch_key(name, kernel) for kernel in kernels)
        if namespace == "aten" and known and base not in (*ALIASES, *COPIES):
            op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
            if op is not None:
                aten.impl(op, _kernel(op), "PrivateUse1")


def _deep_copies_of_data() -> None:
    """Copy a tensor by an operation where ``deepcopy`` would copy the memory of its storage, which is empty."""
    plain = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: Any) -> torch.Tensor:
        return tensor.detach().clone() if tensor.device.type == NAME else plain(tensor, memo)

    torch.Tensor.__deepcopy__ = copied  # pyright: ignore


def _kernel(op: Any) -> Any:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


@torch.inference_mode(False)  # the data of a tensor that is made in inference mode can be used outside of it
@torch.no_grad()
def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the data of its tensors, and give the results to the device."""
    values, form = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    devices = {value.device.type for value in tensors if value.ndim or value.device.type == NAME}
    if len(devices) > 1 and op.name() not in BETWEEN_DEVICES:
        raise RuntimeError(f"expected all tensors on one device, got {' and '.join(sorted(devices))} ({op.name()})")
    owners: dict[int, torch.Tensor] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.device.type == NAME:
            values[index] = data = _data(value, op)
            owners[id(data)] = value
        elif isinstance(value, torch.device):
            values[index] = torch.device("cpu")
    args, kwargs = tree_unflatten(values, form)
    if op.name() == "aten::_copy_from":  # (source, destination)
        args[1].copy_(args[0])
        return owners.get(id(args[1]), args[1])
    if op.name() == "aten::_local_scalar_dense":
        return args[0].item()
    if op.name() in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):  # strides are those of the data
        found = args[0].reshape(args[1])
    else:
        found = op(*args, **kwargs)
    results, form = tree_flatten(found)
    return tree_unflatten([_wrap(one, owners) if isinstance(one, torch.Tensor) else one for one in results], form)


def _data(tensor: torch.Tensor, op: Any) -> torch.Tensor:
    data = getattr(tensor.untyped_storage(), "data", None)
    if data is None or data.shape != tensor.shape:
        raise RuntimeError(f"the data of an operand of {op.name()} is lost: give the operation a kernel here")
    return data


def _wrap(data: torch.Tensor, owners: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the device's tensor of some data: the operand, for an operation in place."""
    if id(data) in owners:
        return owners[id(data)]
    tensor = torch._C._acc.create_empty_tensor(list(data.shape), data.dtype)
    tensor.untyped_storage().data = data
    return tensor

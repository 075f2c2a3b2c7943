"""Computing in float32 with 16-bit weights: half the memory, one layer's float32 copy at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    """``x @ W^T`` in float32, saving the 16-bit weight rather than its float32 copy for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.transposed = transposed
        return x.float() @ (weight.float() if transposed else weight.float().T)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ (weight.float().T if ctx.transposed else weight.float()), None, None


def compute_in_float32(model: nn.Module) -> nn.Module:
    """Make a model with 16-bit weights compute in float32, and return it.

    The weights of linear modules and embeddings stay in 16 bits and are converted each time their module runs. All
    other weights (norms, biases) are converted once.
    """
    from transformers.pytorch_utils import Conv1D

    unchanged: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.forward = partial(_linear, module, isinstance(module, Conv1D))  # pyright: ignore
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_embedding, module)  # pyright: ignore
        else:
            continue
        unchanged.add(id(module.weight))
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.is_floating_point() and id(weight) not in unchanged:
            weight.data = weight.data.float()
    return model


def _linear(module: Any, transposed: bool, x: Tensor) -> Tensor:
    y = _Linear.apply(x, module.weight, transposed)
    return y if module.bias is None else y + module.bias


def _embedding(module: nn.Embedding, ids: Tensor) -> Tensor:
    rows = nn.functional.embedding(ids, module.weight).float()
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))  # in Gemma
    return rows if scale is None else rows * float(scale)

"""What a forward pass shows of a model without a converter: its head, its final norm, and its last projection.

The head is what its logits say: a multiple of the output of ``get_output_embeddings()`` or a soft cap of it. The final
norm is the module whose output the head reads. The last projection is the latest linear module whose output, changed by
d, changes what the final norm reads by a multiple of d. A norm may stand between the two (OLMo 3, GLM 4).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoraSuiteError
from ..text.calibration import built_in_text
from .activations import encode_text
from .backbone import Backbone
from .forward import model_inputs

TOKENS = 16
"""Tokens of the text that the model reads."""
EXACT, EXACT_16 = 1e-4, 2e-2
"""Relative error up to which logits, or what the final norm reads, count as explained, in float32 and in 16 bits."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft cap of the logits in configs."""
CHANGE, REACHED = 4.0, 3e-3
"""Size of a change of a module's output, relative to the output; relative error of what arrives, beside rounding."""
CANDIDATES = 6
"""Linear modules that are tried from the last one on."""


@dataclass(frozen=True, eq=False)
class FoundHead:
    """How a model computes its logits: ``x = (weight @ state + bias) / scaling``, then ``cap * tanh(x / cap)``.

    Attributes:
        scaling: Divisor of the logits.
        cap: Soft cap of the logits, if there is one.
        bias: Constant that is added to the logits beside the head's own bias, if there is one.
        tokens: Number of logits: the rows of the head, or fewer.
        norm: Name of the module whose output is the state, up to a factor; None if there is none.
        norm_factor: That factor.
    """

    scaling: float
    cap: float | None
    bias: Tensor | None
    tokens: int
    norm: str | None
    norm_factor: float = 1.0


@dataclass(frozen=True, eq=False)
class FoundProjection:
    """The last linear module whose output reaches the final norm.

    Attributes:
        module: Its name.
        factor: What its output, or that of its norm, is multiplied by on the way.
        gain: Gain of the norm behind it, (D,), if there is one.
    """

    module: str
    factor: float
    gain: Tensor | None = None


class Call(NamedTuple):
    """A call of a module, with its first input and its output."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class ModelReader:
    """Runs a model on a short text, with hooks.

    Attributes:
        model: The loaded model, without adapters or with some.
        backbone: Its backbone.
    """

    model: Any
    backbone: Backbone
    _ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        text = " ".join(built_in_text()[:2])
        self._ids = torch.tensor([encode_text(self.backbone, text)["input_ids"][:TOKENS]], device=self.model.device)

    @property
    def tolerance(self) -> float:
        """Relative error up to which two tensors of the model count as equal."""
        return EXACT if self.model.dtype in (torch.float32, torch.float64) else EXACT_16

    def run(self) -> Tensor:
        """Return the logits, (tokens, vocabulary)."""
        return self.model(**model_inputs(self.model, input_ids=self._ids, use_cache=False)).logits[0].float()

    def calls(self) -> tuple[list[Call], Tensor]:
        """Return all calls of modules without submodules, in order, and the logits."""
        found: list[Call] = []

        def keep(name: str, module: nn.Module) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                x = next((one for one in (*args, *kwargs.values()) if torch.is_tensor(one)), None)
                if x is not None and torch.is_tensor(output):
                    found.append(Call(name, module, x.detach(), output.detach()))

            return module.register_forward_hook(hook, with_kwargs=True)

        leaves = [(name, one) for name, one in self.model.named_modules() if not list(one.children())]
        handles = [keep(name, one) for name, one in leaves]
        try:
            logits = self.run()
        finally:
            for handle in handles:
                handle.remove()
        return found, logits

    def input_of(self, module: nn.Module, changed: nn.Module | None = None, change: Tensor | None = None) -> Tensor:
        """Return what a module reads last, in float32, while ``change`` is added to the output of another one."""
        found: list[Tensor] = []
        hooks = [module.register_forward_pre_hook(lambda _, args, kwargs: found.append(first_tensor(args, kwargs)),
                                                  with_kwargs=True)]  # fmt: skip
        if changed is not None and change is not None:
            hooks.append(changed.register_forward_hook(partial(_add, change)))
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return found[-1].float()


def _add(change: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Add a change to a module's output; a module that is called more than once may have outputs of other shapes."""
    return output + change if output.shape == change.shape else output


def first_tensor(args: Any, kwargs: Any) -> Tensor:
    """Return the first tensor among the arguments of a module."""
    return next(one for one in (*args, *kwargs.values()) if torch.is_tensor(one)).detach()


@torch.no_grad()
def find_head(model: Any, backbone: Backbone) -> FoundHead:
    """Find how a model without a converter computes its logits.

    Raises:
        LoraSuiteError: If its logits are not those of its head.
    """
    reader = ModelReader(model, backbone)
    calls, logits = reader.calls()
    out = model.get_output_embeddings()
    top = [call for call in calls if call.module is out]
    if not top:
        raise LoraSuiteError(
            "the model computes its logits without its language-model head", where=repr(backbone), do=ANOTHER
        )
    last = top[-1]
    raw, tokens = last.y.reshape(-1, last.y.shape[-1]).float(), logits.shape[-1]
    if len(raw) != len(logits) or raw.shape[1] < tokens:
        raise LoraSuiteError(
            "the model's logits are not those of its head", where=repr(backbone), got=tuple(raw.shape),
            wanted=tuple(logits.shape), do=ANOTHER,
        )  # fmt: skip
    scale, cap, bias = _fit_logits(raw[:, :tokens], logits, backbone, reader.tolerance)
    return FoundHead(1 / scale, cap, bias, tokens, *_find_norm(calls, last.x, reader.tolerance))


ANOTHER = "choose another backbone, or add a converter with peft_lorasuite.register, see docs/add-a-family.md"


def _fit_logits(
    raw: Tensor, logits: Tensor, backbone: Backbone, tolerance: float
) -> tuple[float, float | None, Tensor | None]:
    """Return scale, soft cap and constant with which the head's output gives the logits."""
    values = backbone.config.get_text_config().to_dict()
    for cap in (values.get(name) for name in SOFT_CAPS):
        if cap and _error(cap * torch.tanh(raw / cap), logits) < tolerance:
            return 1.0, float(cap), None
    scale = float((logits * raw).sum() / (raw * raw).sum())
    if _error(scale * raw, logits) < tolerance:
        return scale, None, None
    centered, target = raw - raw.mean(dim=0), logits - logits.mean(dim=0)
    scale = float((target * centered).sum() / (centered * centered).sum())
    bias = (logits - scale * raw).mean(dim=0)
    if scale and _error(scale * raw + bias, logits) < tolerance:
        return scale, None, bias.cpu() / scale
    raise LoraSuiteError(
        "the model's logits are no multiple of its head's output", where=repr(backbone),
        got=f"relative error {_error(scale * raw, logits):.1g}", wanted=f"below {tolerance:g}", do=ANOTHER,
    )  # fmt: skip


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _find_norm(calls: list[Call], state: Tensor, tolerance: float) -> tuple[str | None, float]:
    """Return the last module without submodules whose output is the state up to a factor, and the factor.

    There is none if the module needs more than its input.
    """
    for call in reversed(calls):
        if call.y.shape == call.x.shape == state.shape and not isinstance(call.module, (nn.Linear, nn.Dropout)):
            x, y, wanted = (values.float() for values in (call.x, call.y, state))
            factor = float((wanted * y).sum() / (y * y).sum().clamp_min(1e-30))
            if not factor or _error(factor * y, wanted) > tolerance:
                continue
            try:
                again = copy.deepcopy(call.module).cpu().float()(x.cpu())
            except (TypeError, RuntimeError):  # it needs more than its input
                break
            same = torch.is_tensor(again) and _error(again, y.cpu()) < max(tolerance, 1e-3)
            return (call.name, 1.0 if torch.equal(y, wanted) else factor) if same else (None, 1.0)
    return None, 1.0


@torch.no_grad()
def find_projection(model: Any, backbone: Backbone, target: str) -> FoundProjection | None:
    """Find the last projection of a model without a converter.

    Args:
        model: The loaded model, without adapters.
        backbone: Its backbone.
        target: Name of the final norm or, where there is none, of the head.

    Returns:
        The projection; None if no linear module's output reaches the target as it is.
    """
    reader = ModelReader(model, backbone)
    calls, _ = reader.calls()
    reads = model.get_submodule(target)
    before = reader.input_of(reads)
    trained = {site.path for site in backbone.arch.sites if site.trained}
    linear = [call for call in calls if call.name in trained and call.y.shape[-1] == before.shape[-1]]
    for call in reversed(linear[-CANDIDATES:]):
        factor = _reaches(reader, reads, before, call)
        if factor is not None:
            return FoundProjection(call.name, factor)
        for norm in (one for one in calls if one.x.shape == call.y.shape and torch.equal(one.x, call.y)):
            gain, factor = _gain(norm), _reaches(reader, reads, before, norm)
            if gain is not None and factor is not None:
                return FoundProjection(call.name, factor, gain)
    return None


def _reaches(reader: ModelReader, target: nn.Module, before: Tensor, call: Call) -> float | None:
    """Return c if adding d to a module's output adds c d to what the target reads, up to rounding; else None."""
    noise = torch.randn(call.y.shape, generator=torch.Generator().manual_seed(0)).to(call.y)
    change = CHANGE * noise * call.y.float().pow(2).mean().sqrt().to(call.y)
    if before.numel() != change.numel() or not float(change.norm()):
        return None
    after = reader.input_of(target, call.module, change)
    moved, change = (after - before).reshape(-1), change.reshape(-1).float()
    factor = float(moved @ change / (change @ change))
    rounding = 2 * torch.finfo(reader.model.dtype).eps * (before.abs() + after.abs()).reshape(-1)
    left = ((moved - factor * change).abs() - rounding).clamp_min(0)
    close = abs(factor) > 1e-3 and float(left.norm()) < REACHED * float(moved.norm())
    return factor if close else None


def _gain(norm: Call) -> Tensor | None:
    """Return the gain of an RMS norm, (D,), from one of its calls; None for another module."""
    x, y = (values.reshape(-1, values.shape[-1]).float() for values in (norm.x, norm.y))
    if x.shape != y.shape or isinstance(norm.module, nn.Linear):
        return None
    unit = x / x.pow(2).mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    gain = (unit * y).sum(dim=0) / unit.pow(2).sum(dim=0).clamp_min(1e-30)
    return gain.cpu() if _error(unit * gain, y) < 1e-2 else None

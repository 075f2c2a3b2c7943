"""Fact editing: what an adapter knows about the entities of a prompt template, written into one early layer.

Where an entity ends, an early layer of the new model identifies it whatever the wording around it: the input of its
``down`` projection is the key. What must be added to the projection's output for an answer to follow is the value, the
same for all entities with that answer. A few entities per answer suffice to solve for it, by gradients of the values
alone; no weight is trained. The update is the ridge regression of values on keys, whose rank is at most the number of
answers. (Keys and values as in ROME, arXiv 2202.05262.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...compat import cache_argument, output_cache
from ...linalg.lowrank import LowRank, reduced_rank_ridge
from ...models.backbone import Backbone
from ...models.generation import Turn
from ...models.prefix_cache import decoder
from ...progress import Progress, no_progress
from .fact_keys import read_keys, read_text
from .facts import Fact, find_facts
from .positions import Place, Tokens, tokenize
from .states import down_projection
from .targets import Head, Targets

TargetFunction = Callable[[Sequence[int]], Targets]
"""Indices of places -> target probabilities there."""
FactGroup = tuple[list[Fact], Tensor, Any]
"""Facts of one shape, their token ids from the entity's last token on, and the cache of the tokens before."""
DEPTH = 0.18
"""Relative depth of the edited layer: early, where entities are identified whatever the wording."""
RIDGE = 0.1
"""Ridge of the regression, as a fraction of the mean diagonal of the Gram matrix."""
ANCHOR_TEXT_TOKENS = 3000
"""Tokens of other text at which the projection's output is regularized toward that of the base model."""
EXAMPLES = 3
"""Entities per answer that its value is solved on."""
STEP_SIZE, MAX_STEPS, MOMENTUM = 0.065, 30, 0.8
"""Length of a step, as a fraction of the norm of the state that the value is added to; steps at most; momentum. The
values end at about the norm of that state."""
MAX_DIVERGENCE = 0.02
"""Mean divergence, in nats, at which the value of an answer is good enough."""


def edit_facts(
    model: Any, new: Backbone, head: Head, turns: Sequence[Turn], places: Sequence[Place],
    targets_at: TargetFunction, *, seed: int, progress: Progress = no_progress,
) -> tuple[int, LowRank, dict[str, Any]] | None:  # fmt: skip
    """Write the facts that the turns state into an early ``down`` projection.

    Args:
        model: The loaded new model, without adapters.
        new: Its backbone.
        head: Its head.
        turns: Prompts and the old adapted model's answers.
        places: Turn, old position and new position of each predicting position.
        targets_at: Returns the target probabilities at some places.
        seed: Random seed.
        progress: Shows the progress.

    Returns:
        The layer, the update and figures for the report; None where the turns state no facts.
    """
    rows = [tokenize(new, turn) for turn in turns]
    facts = find_facts(turns, rows, places)
    layer = round(DEPTH * new.arch.layers)
    if not facts or layer >= new.arch.layers - 1:
        return None
    down, answers = down_projection(model, new, layer), sorted({fact.answer for fact in facts})
    values, before, left = _solve_values(model, new, layer, head, facts, answers, rows, targets_at, seed, progress)
    keys, anchors = read_keys(model, down, [(rows[fact.turn], fact.ends) for fact in facts], seed, progress)
    text = read_text(model, new, down, seed, ANCHOR_TEXT_TOKENS)
    anchors = torch.cat([anchors, text * min(len(keys) / len(text), 1.0) ** 0.5])  # weighs at most as much as the keys
    key_facts = [fact for fact in facts for _ in fact.ends]
    wanted = values[[answers.index(fact.answer) for fact in key_facts]].to(keys.device)
    rank = min(len(answers), *new.arch.in_layer(layer).shape("down"))
    update, explained = reduced_rank_ridge(keys, wanted, anchors, weight=1.0, ridge=RIDGE, rank=rank)
    figures = {
        "layer": layer, "facts": len(facts), "answers": len(answers), "divergence": round(before, 4),
        "divergence_left": round(left, 4), "values_explained": round(explained, 4),
    }  # fmt: skip
    return layer, update.cpu(), figures


def _solve_values(
    model: Any, new: Backbone, layer: int, head: Head, facts: Sequence[Fact], answers: Sequence[int],
    rows: Sequence[Tokens], targets_at: TargetFunction, seed: int, progress: Progress,
) -> tuple[Float[Tensor, "answers hidden"], float, float]:  # fmt: skip
    """Solve for the value of every answer; also return the mean divergence before and what is left of it, in nats.

    Each value moves by normalized steps of one length. Adam, which normalizes every coordinate, reaches the same
    answers along directions that disturb other text eight times as much.
    """
    groups = _group_facts(model, _draw_examples(facts, answers, seed), rows)
    targets = targets_at([fact.place for group, _, _ in groups for fact in group])
    head, targets = head.restrict(targets.ids), targets.log_probs.split([len(group) for group, _, _ in groups])
    answer_of = [
        torch.tensor([answers.index(fact.answer) for fact in group], device=head.device) for group, _, _ in groups
    ]
    weight = 1 / torch.cat(answer_of).bincount(minlength=len(answers))
    down, step = down_projection(model, new, layer), STEP_SIZE * _mean_state_norm(model, new, layer, groups)
    V = torch.zeros(len(answers), new.arch.hidden, requires_grad=True, device=head.device)
    divergence, moment, before = V.new_zeros(len(answers)), torch.zeros_like(V), 0.0
    for _ in progress("solving for values", range(MAX_STEPS)):
        gradient, divergence = torch.zeros_like(V), V.new_zeros(len(answers))
        for (_, ids, cache), own, target in zip(groups, answer_of, targets, strict=True):
            with torch.enable_grad():
                loss = weight[own] * _divergence(model, head, down, V[own], ids, cache, target)
                gradient += torch.autograd.grad(loss.sum(), V)[0]
            divergence.index_add_(0, own, loss.detach())
        before = before or float(divergence.mean())
        active = divergence >= MAX_DIVERGENCE
        if not active.any():
            break
        moment = torch.lerp(gradient, moment, MOMENTUM)
        with torch.no_grad():
            V -= step * active[:, None] * torch.nn.functional.normalize(moment, dim=1)
    return V.detach(), before, float(divergence.mean())


def _divergence(
    model: Any, head: Head, down: torch.nn.Module, values: Tensor, ids: Tensor, cache: Any, target: Tensor
) -> Float[Tensor, " facts"]:
    """Return the divergence, in nats, from the target at the last token, with values added at the first token."""
    with add_to_output(down, lambda x: _at_first_position(x, values)):
        states = decoder(model)(input_ids=ids, **cache_argument(deepcopy(cache))).last_hidden_state[:, -1]
    log_probs = head.logits(states.float(), normed=True).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(log_probs, target, reduction="none", log_target=True).sum(dim=1)


@torch.no_grad()
def _mean_state_norm(model: Any, new: Backbone, layer: int, groups: Sequence[FactGroup]) -> float:
    """Return the mean norm of what a value is added to: the layer's output or, before a norm, the projection's."""
    normed, norms = new.arch.site("down").post_norm is not None, []
    module = down_projection(model, new, layer) if normed else model.get_submodule(new.arch.layer_path)[layer]

    def keep(module: Any, args: Any, output: Any) -> None:
        norms.append((output[0] if isinstance(output, tuple) else output)[:, 0].float().norm(dim=-1).cpu())

    hook = module.register_forward_hook(keep)
    try:
        for _, ids, cache in groups:
            decoder(model)(input_ids=ids[:, :1], **cache_argument(deepcopy(cache)))
    finally:
        hook.remove()
    return float(torch.cat(norms).mean()) / (1.0 if normed else new.arch.residual_scale)


@torch.no_grad()
def _group_facts(model: Any, facts: Sequence[Fact], rows: Sequence[Tokens]) -> list[FactGroup]:
    """Group facts with entity and answer at the same positions, and cache the tokens before the entity's last one."""
    shapes: dict[tuple[int, int], list[Fact]] = defaultdict(list)
    for fact in facts:
        shapes[fact.ends[-1], fact.deciding].append(fact)
    groups = []
    for (end, deciding), group in shapes.items():
        ids = torch.tensor([rows[fact.turn].ids[: deciding + 1] for fact in group], device=model.device)
        cache = output_cache(decoder(model)(input_ids=ids[:, :end], use_cache=True)) if end else None
        groups.append((group, ids[:, end:], cache))
    return groups


def _at_first_position(x: Tensor, values: Tensor) -> Tensor:
    """Return values, (rows, D), at the first position and zeros at the others; OPT joins rows and positions of x."""
    length = x.numel() // x.shape[-1] // len(values)
    return torch.nn.functional.pad(values[:, None], (0, 0, 0, length - 1)).reshape(*x.shape[:-1], -1)


def _draw_examples(facts: Sequence[Fact], answers: Sequence[int], seed: int) -> list[Fact]:
    """Draw `EXAMPLES` facts of every answer."""
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, list[Fact]] = {answer: [] for answer in answers}
    for number in order:
        if len(chosen[facts[number].answer]) < EXAMPLES:
            chosen[facts[number].answer].append(facts[number])
    return [fact for some in chosen.values() for fact in some]


@contextmanager
def add_to_output(down: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add a function of a projection's input to its output while the context lasts."""
    hook = down.register_forward_hook(lambda module, args, output: output + change(args[0]).to(output))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def apply_update(down: torch.nn.Module, update: LowRank | None) -> Iterator[None]:
    """Apply a low-rank update of a projection while the context lasts."""
    if update is None:
        yield
        return
    with add_to_output(down, update.apply):
        yield

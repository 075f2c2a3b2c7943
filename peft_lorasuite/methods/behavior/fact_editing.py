"""Memory: what an adapter knows about the things that fill a form, written into one early layer, without training.

Where a name ends, an early layer of the new model knows which name it is, whatever the wording around it: the input of
its ``down`` projection is the key. What has to be added there for one answer to come out is the same for all names: the
value. Few names show the value of each answer, by gradients that stop at the values; no weight is trained. The update
is the ridge regression of values on keys, whose rank is at most the number of answers.
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

from ...linalg.lowrank import LowRank, reduced_rank_ridge
from ...models.backbone import Backbone
from ...models.generation import Turn
from ...models.prefix_cache import decoder
from ...progress import Progress, no_progress
from .fact_keys import read_keys, read_text
from .facts import Fact, facts
from .positions import Place, Tokens, tokenize
from .states import down_projection
from .targets import Head, Targets

Ask = Callable[[Sequence[int]], Targets]
"""Gives the wanted probabilities at some of the places, by their numbers."""
DEPTH = 0.18
"""Where in the network the facts are written: early, where names are told apart in whatever wording."""
RIDGE = 0.1
"""Of the regression, as a share of the mean diagonal of the Gram matrix."""
TEXT = 3000
"""Tokens of other text, at which nothing is wanted."""
EXAMPLES = 3
"""Names per answer from which its value is solved for."""
RATE, STEPS, MOMENTUM = 0.065, 30, 0.8
"""Length of a value's step, as a share of the state that it is added to, steps at most, and what of one goes on into
the next; values end at about that state's own length."""
ENOUGH = 0.02
"""Mean divergence, in nats, at which the value of an answer is good enough."""


def edit_facts(
    model: Any, new: Backbone, head: Head, turns: Sequence[Turn], places: Sequence[Place],
    ask: Ask, *, seed: int, progress: Progress = no_progress,
) -> tuple[int, LowRank, dict[str, Any]] | None:  # fmt: skip
    """Write what the turns tell about the fillings of their forms into one early ``down`` projection.

    Args:
        model: The loaded new model, plain.
        new: Its backbone.
        head: Its head.
        turns: Prompts and the old adapted model's answers.
        places: Turn, old position and new position of each row of the targets.
        ask: Gives the wanted probabilities at some places, by their numbers.
        seed: Of what is drawn at random.
        progress: Shows how far it is.

    Returns:
        The layer, the update and figures for the report; None where the turns tell nothing of the kind.
    """
    rows = [tokenize(new, turn) for turn in turns]
    info = facts(turns, rows, places)
    layer = round(DEPTH * new.arch.layers)
    if not info or layer >= new.arch.layers - 1:
        return None
    down, answers = down_projection(model, new, layer), sorted({fact.answer for fact in info})
    values, left = _values(model, new, layer, head, info, answers, rows, ask, seed, progress)
    keys, quiet = read_keys(model, down, [(rows[fact.turn], fact.ends) for fact in info], seed, progress)
    text = read_text(model, new, down, seed, TEXT)
    quiet = torch.cat([quiet, text * min(len(keys) / len(text), 1.0) ** 0.5])  # at most what the names weigh
    owners = [fact for fact in info for _ in fact.ends]
    wanted = values[[answers.index(fact.answer) for fact in owners]]
    rank = min(len(answers), *new.arch.shape("down"))
    update, explained = reduced_rank_ridge(keys, wanted, quiet, weight=1.0, ridge=RIDGE, rank=rank)
    figures = {
        "layer": layer, "facts": len(info), "answers": len(answers), "divergence_left": round(left, 4),
        "values_explained": round(explained, 4),
    }  # fmt: skip
    return layer, update, figures


def _values(
    model: Any, new: Backbone, layer: int, head: Head, info: Sequence[Fact], answers: Sequence[int],
    rows: Sequence[Tokens], ask: Ask, seed: int, progress: Progress,
) -> tuple[Float[Tensor, "answers hidden"], float]:  # fmt: skip
    """Solve for what has to be added at a name's last token for every answer; also the divergence left, in nats.

    A value goes down its slope by steps of one length. Steps of one length for every coordinate (Adam) reach the same
    answers by ways that lead through much else: what they add disturbed other text eight times as much.
    """
    groups = _begun(model, _examples(info, answers, seed), rows)
    places = [fact.place for chosen, _, _ in groups for fact in chosen]
    targets = ask(places)
    head, targets = head.restrict(targets.ids), targets.log_probs.split([len(chosen) for chosen, _, _ in groups])
    at = [torch.tensor([answers.index(fact.answer) for fact in chosen]) for chosen, _, _ in groups]
    share = 1 / torch.cat(at).bincount(minlength=len(answers))
    down, step = down_projection(model, new, layer), RATE * _length(model, new, layer, groups)
    V, off = torch.zeros(len(answers), new.arch.hidden, requires_grad=True), torch.zeros(len(answers))
    moment = torch.zeros_like(V)
    for _ in progress("solving for values", range(STEPS)):
        slope, off = torch.zeros_like(V), torch.zeros(len(answers))
        for (_, ids, cache), own, target in zip(groups, at, targets, strict=True):
            with torch.enable_grad():
                lost = share[own] * _missed(model, head, down, V[own], ids, cache, target)
                slope += torch.autograd.grad(lost.sum(), V)[0]
            off.index_add_(0, own, lost.detach())
        going = off >= ENOUGH
        if not going.any():
            break
        moment = torch.lerp(slope, moment, MOMENTUM)
        with torch.no_grad():
            V -= step * going[:, None] * torch.nn.functional.normalize(moment, dim=1)
    return V.detach(), float(off.mean())


def _missed(
    model: Any, head: Head, down: torch.nn.Module, values: Tensor, ids: Tensor, cache: Any, target: Tensor
) -> Float[Tensor, " facts"]:
    """Divergence, in nats, of the last token's prediction from the wanted one with values added at the first token."""
    with adding(down, lambda x: _first(x, values)):
        states = decoder(model)(input_ids=ids, cache=deepcopy(cache)).last_hidden_state[:, -1]
    got = head.logits(states.float().cpu(), normed=True).log_softmax(dim=-1)
    return torch.nn.functional.kl_div(got, target, reduction="none", log_target=True).sum(dim=1)


@torch.no_grad()
def _length(model: Any, new: Backbone, layer: int, groups: Sequence[tuple[list[Fact], Tensor, Any]]) -> float:
    """Mean length of what a value is added to: the layer's state, or where a norm stands between, what that takes."""
    normed, seen = new.arch.site("down").post_norm is not None, []
    place = down_projection(model, new, layer) if normed else model.get_submodule(new.arch.layer_path)[layer]

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[:, 0].float().norm(dim=-1).cpu())

    hook = place.register_forward_hook(keep)
    try:
        for _, ids, cache in groups:
            decoder(model)(input_ids=ids[:, :1], cache=deepcopy(cache))
    finally:
        hook.remove()
    return float(torch.cat(seen).mean()) / (1.0 if normed else new.arch.residual_scale)


@torch.no_grad()
def _begun(model: Any, chosen: Sequence[Fact], rows: Sequence[Tokens]) -> list[tuple[list[Fact], Tensor, Any]]:
    """Read what stands before the names' last tokens, once: facts of one shape, their tokens from there, the cache."""
    shapes: dict[tuple[int, int], list[Fact]] = defaultdict(list)
    for fact in chosen:
        shapes[fact.ends[-1], fact.deciding].append(fact)
    groups = []
    for (end, deciding), alike in shapes.items():
        ids = torch.tensor([rows[fact.turn].ids[: deciding + 1] for fact in alike], device=model.device)
        cache = decoder(model)(input_ids=ids[:, :end], use_cache=True).cache if end else None
        groups.append((alike, ids[:, end:], cache))
    return groups


def _first(x: Tensor, values: Tensor) -> Tensor:
    """Add values at the first position only."""
    padded = values.new_zeros(x.shape[0], x.shape[1], values.shape[-1])
    padded[:, 0] = values
    return padded


def _examples(info: Sequence[Fact], answers: Sequence[int], seed: int) -> list[Fact]:
    """Draw a few facts of every answer."""
    order = torch.randperm(len(info), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, list[Fact]] = {answer: [] for answer in answers}
    for number in order:
        if len(chosen[info[number].answer]) < EXAMPLES:
            chosen[info[number].answer].append(info[number])
    return [fact for some in chosen.values() for fact in some]


@contextmanager
def adding(down: torch.nn.Module, change: Any) -> Iterator[None]:
    """Add to a projection's output what a function makes of its input, for a while."""
    hook = down.register_forward_hook(lambda module, args, output: output + change(args[0]).to(output))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def apply_update(down: torch.nn.Module, update: LowRank | None) -> Iterator[None]:
    """Run a model with a low-rank update of one projection."""
    if update is None:
        yield
        return
    with adding(down, update.apply):
        yield

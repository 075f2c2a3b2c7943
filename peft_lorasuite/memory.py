"""Facts: what an adapter knows about the things that fill a form, written into one early layer, without training.

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
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .answering import Turn
from .backbone import Backbone
from .beginning import decoder
from .behaviour import Place, Tokens, tokens
from .elicitation import common_opening
from .keys import read_keys, read_text
from .lowrank import LowRank, reduced_rank_ridge
from .progress import Progress, silent
from .recombination import SLOT, forms
from .teacher import Head, Teacher

Ask = Callable[[Sequence[int]], Teacher]
"""Gives the wanted probabilities at some of the places, by their numbers."""
DEPTH = 0.18
"""Where in the network the facts are written: early, where names are told apart in whatever wording."""
RIDGE = 0.1
"""Of the regression, as a share of the mean diagonal of the Gram matrix."""
SHOWN = 8
"""Turns of a form that show how its answers begin."""
TORN = 0.1
"""Share of fillings with several answers from which on the answers do not hang on the fillings alone."""
EXAMPLES = 3
"""Names per answer from which its value is solved for."""
RATE, STEPS = 0.3, 30
"""Step of a value's coordinates (Adam) and steps at most; values of an answer end at a norm of about 30 to 40."""
ENOUGH = 0.02
"""Mean divergence, in nats, at which the values are good enough."""


@dataclass(frozen=True)
class Fact:
    """What a turn says about the filling of its form.

    Attributes:
        filling: What the turn is about.
        turn: Number of the turn.
        ends: Positions, in the new tokens, where the filling ends before the answer: in the prompt, in the response.
        deciding: Position that predicts the answer.
        place: Number of that position among the teacher's.
        answer: The new token that the old adapted model's answer has next.
    """

    filling: str
    turn: int
    ends: tuple[int, ...]
    deciding: int
    place: int
    answer: int


def facts(turns: Sequence[Turn], rows: Sequence[Tokens], places: Sequence[Place]) -> list[Fact]:
    """Find what turns of one form say about their fillings.

    Forms whose answers are all the same say nothing, nor do fillings to which another answer is given elsewhere.

    Args:
        turns: Prompts and the old adapted model's answers.
        rows: The same in the new tokens.
        places: Turn, old position and new position of each row of the teacher.
    """
    number = {(turn, position): index for index, (turn, _, position) in enumerate(places)}
    found: list[Fact] = []
    for form in forms([turn.prompt for turn in turns]):
        wanted = {form.fill(filling): filling for filling in form.fillings}
        members = [(n, turn, wanted[turn.prompt]) for n, turn in enumerate(turns) if turn.prompt in wanted]
        opening = common_opening([(turn, filling) for _, turn, filling in members[:SHOWN]])
        told = []
        for n, turn, filling in members:
            said = opening.replace(SLOT, filling)
            if not turn.response.startswith(said):
                continue  # it answers in another form
            decided = len(turn.prompt) + len(said)
            places_of = {end: position for position, end in enumerate(rows[n].ends)}
            deciding = places_of.get(decided)
            text = (turn.prompt + turn.response)[:decided]
            ends = tuple(places_of[end] for end in _ends(text, filling) if end in places_of)
            if deciding is not None and deciding + 1 < len(rows[n].ids) and (n, deciding) in number and ends:
                told.append(Fact(filling, n, ends, deciding, number[n, deciding], rows[n].ids[deciding + 1]))
        found += told if len({fact.answer for fact in told}) > 1 else []
    return _consistent(found)


def _consistent(found: Sequence[Fact]) -> list[Fact]:
    """Leave out fillings with several answers, and everything where these are many: no fact hangs on a name then."""
    answers: dict[str, set[int]] = defaultdict(set)
    for fact in found:
        answers[fact.filling].add(fact.answer)
    torn = {filling for filling, several in answers.items() if len(several) > 1}
    if len(torn) > TORN * len(answers):
        return []
    return [fact for fact in found if fact.filling not in torn]


def _ends(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start + len(part)
        start = text.find(part, start + 1)


def memorise(
    model: Any, new: Backbone, head: Head, turns: Sequence[Turn], places: Sequence[Place],
    ask: Ask, *, seed: int, progress: Progress = silent,
) -> tuple[int, LowRank, dict[str, Any]] | None:  # fmt: skip
    """Write what the turns tell about the fillings of their forms into one early ``down`` projection.

    Args:
        model: The loaded new model, plain.
        new: Its backbone.
        head: Its head.
        turns: Prompts and the old adapted model's answers.
        places: Turn, old position and new position of each row of the teacher.
        ask: Gives the wanted probabilities at some places, by their numbers.
        seed: Of what is drawn at random.
        progress: Shows how far it is.

    Returns:
        The layer, the update and figures for the report; None where the turns tell nothing of the kind.
    """
    rows = [tokens(new, turn) for turn in turns]
    told = facts(turns, rows, places)
    layer = round(DEPTH * new.arch.layers)
    if not told or layer >= new.arch.layers - 1:
        return None
    down = model.get_submodule(new.arch.layer_path)[layer].get_submodule(new.arch.site("down").path)
    answers = sorted({fact.answer for fact in told})
    values, left = _values(model, new.arch.hidden, head, down, told, answers, rows, ask, seed, progress)
    keys, quiet = read_keys(model, down, [(rows[fact.turn], fact.ends) for fact in told], seed, progress)
    text = read_text(model, new, down, seed)
    quiet = torch.cat([quiet, text * min(len(keys) / len(text), 1.0) ** 0.5])  # at most what the names weigh
    owners = [fact for fact in told for _ in fact.ends]
    wanted = values[[answers.index(fact.answer) for fact in owners]]
    rank = min(len(answers), *new.arch.shape("down"))
    update, explained = reduced_rank_ridge(keys, wanted, quiet, weight=1.0, ridge=RIDGE, rank=rank)
    figures = {
        "layer": layer, "facts": len(told), "answers": len(answers), "divergence_left": round(left, 4),
        "values_explained": round(explained, 4),
    }  # fmt: skip
    return layer, update, figures


def _values(
    model: Any, hidden: int, head: Head, down: torch.nn.Module, told: Sequence[Fact], answers: Sequence[int],
    rows: Sequence[Tokens], ask: Ask, seed: int, progress: Progress,
) -> tuple[Float[Tensor, "answers hidden"], float]:  # fmt: skip
    """Solve for what has to be added at a name's last token for every answer; also the divergence left, in nats."""
    groups = _begun(model, _examples(told, answers, seed), rows)
    places = [fact.place for chosen, _, _ in groups for fact in chosen]
    teacher = ask(places)
    head, line = head.on(teacher.ids), {place: number for number, place in enumerate(places)}
    V = torch.zeros(len(answers), hidden, requires_grad=True)
    solver = torch.optim.Adam([V], lr=RATE)
    left, count = float("inf"), sum(len(chosen) for chosen, _, _ in groups)
    for _ in progress("solving for values", range(STEPS)):
        left, slope = 0.0, torch.zeros_like(V)
        for chosen, ids, cache in groups:
            at = [answers.index(fact.answer) for fact in chosen]
            with torch.enable_grad(), adding(down, lambda x, at=at: _first(x, V[at])):
                states = decoder(model)(input_ids=ids, cache=deepcopy(cache)).last_hidden_state[:, -1]
                got = head.logits(states.float().cpu(), normed=True).log_softmax(dim=-1)
                target = teacher.target[[line[fact.place] for fact in chosen]]
                loss = torch.nn.functional.kl_div(got, target, reduction="sum", log_target=True) / count
                slope += torch.autograd.grad(loss, V)[0]
            left += float(loss.detach())
        if left < ENOUGH:
            break
        V.grad = slope
        solver.step()
    return V.detach(), left


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


def _examples(told: Sequence[Fact], answers: Sequence[int], seed: int) -> list[Fact]:
    """Draw a few facts of every answer."""
    order = torch.randperm(len(told), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, list[Fact]] = {answer: [] for answer in answers}
    for number in order:
        if len(chosen[told[number].answer]) < EXAMPLES:
            chosen[told[number].answer].append(told[number])
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
def updated(down: torch.nn.Module, update: LowRank | None) -> Iterator[None]:
    """Run a model with a low-rank update of one projection."""
    if update is None:
        yield
        return
    with adding(down, update.applied):
        yield

"""What the whole experiment will cost: the map from `planning.plan`, training and evaluation counted here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pairs import Pair

from peft_lorasuite.evaluation.tasks import select
from peft_lorasuite.planning.counts import Side, Stage
from peft_lorasuite.planning.plan import Plan, plan, text
from peft_lorasuite.planning.rates import Rates, measure_rates

GB = 1e9
PROMPT, RESPONSE = 160, {"math": 256, "commonsense": 8}
"""Tokens of a prompt, and of a response: math up to the paper's limit, commonsense until the model ends it."""
SAMPLE = 256
"""Tokens of a training sample: the cutoff, an upper bound."""
KEPT_BYTES = 34
"""Bytes that a layer keeps for the backward pass, per token and hidden unit, in 16 bits (Korthikanti et al. 2022)."""
BATCH = 16


@dataclass(frozen=True)
class Work:
    """The size of an experiment.

    Attributes:
        suite: Benchmarks.
        limit: Items of each, None for all.
        train: Training samples of the old adapter and of retraining.
        samples: Samples of the light fine-tuning.
        epochs: Passes over them.
        bandwidth: Bytes of memory read per second, in GB: what generation waits for.
        batch: Prompts answered together.
    """

    suite: str | Iterable[str]
    limit: int | None
    train: int
    samples: int
    epochs: int
    bandwidth: float
    batch: int = 8

    def training(self, name: str, side: Side, count: int) -> Stage:
        """Forward (2 N), gradients of the activations (2 N) a token; those of a LoRA's own factors are few."""
        run = 4 * _multiplied(side) * SAMPLE * count * self.epochs
        arch, tokens = side.arch, BATCH * SAMPLE
        kept = arch.layers * tokens * arch.hidden * KEPT_BYTES * side.item // 2
        scores = arch.layers * BATCH * arch.heads.query * SAMPLE**2 * 5 * side.item // 2
        logits = tokens * arch.vocabulary * (side.item + 8)
        memory = side.total * side.item + kept + scores + logits
        return Stage(name, side.total * side.item, run=run, memory=memory)

    def evaluation(self, name: str, side: Side) -> tuple[Stage, float]:
        """Return the products, and the seconds in which the weights go through memory once for every token."""
        counts = {b: min(self.limit or b.size, b.size) for b in select(self.suite)}
        tokens = sum(count * (PROMPT + RESPONSE[b.suite]) for b, count in counts.items())
        steps = sum(-(-count // self.batch) * RESPONSE[b.suite] for b, count in counts.items())
        arch = side.arch
        longest = PROMPT + max(RESPONSE[b.suite] for b in counts)
        cache = 2 * arch.layers * arch.heads.key_value * arch.heads.size * longest * self.batch * side.item
        memory = side.total * side.item + cache
        stage = Stage(name, side.total * side.item, run=2 * _multiplied(side) * tokens, memory=memory)
        return stage, steps * side.total * side.item / self.bandwidth / GB


def whole_plan(planned: Plan, work: Work) -> str:
    """Lay out the map's plan and below it every stage of the experiment, with its time and memory."""
    old, new = planned.costs.old, planned.costs.new
    trained = [
        (work.training(f"old adapter, {work.train} samples", old, work.train), 0.0),
        (work.training(f"vanilla LoRA, {work.samples} samples", new, work.samples), 0.0),
        (work.training(f"light fine-tuning, {work.samples} samples", new, work.samples), 0.0),
        (work.training(f"retraining, {work.train} samples", new, work.train), 0.0),
    ]
    scored = [work.evaluation(f"evaluate {row}", side)
              for row, side in (("old, old-lora: each", old), ("a row of the new backbone", new))]  # fmt: skip
    made = [(stage, planned.rates.seconds(stage) + waited) for stage, waited in (*trained, *scored)]
    mapped = Stage("map", memory=planned.memory)
    carried = replace(planned.upgrade, name="upgrade")
    lines = [(mapped, planned.seconds), (carried, planned.rates.seconds(carried)), *made]
    total = sum(seconds for _, seconds in lines) + made[-2][1] + 4 * made[-1][1]  # 2 rows of the old, 5 of the new
    table = [f"{stage.name:<36}{_time(seconds):>10}{stage.memory / GB:>10.1f} GB" for stage, seconds in lines]
    foot = (
        f"whole experiment: {_time(total)}, {max(stage.memory for stage, _ in lines) / GB:.1f} GB at its peak. "
        f"Counted, not measured: samples at their cutoff of {SAMPLE} tokens, generation at {work.bandwidth:.3g} GB/s, "
        f"responses of {RESPONSE['math']} (math) and {RESPONSE['commonsense']} (commonsense) tokens."
    )
    return "\n".join([text(planned), "", *table, "", foot])


def experiment(args: argparse.Namespace, pair: Pair) -> str:
    """Return the plan of an experiment as it was called for, from the backbones' configs alone."""
    rates = Rates(bf16=args.bf16) if args.bf16 else measure_rates()
    samples = args.samples or dict(pair.samples).get(select(args.suite)[0].suite, 100)
    work = Work(args.suite, args.limit, args.train_samples, samples, args.epochs, args.bandwidth, args.batch_size)
    return whole_plan(plan(args.old or pair.old, args.new or pair.new, rates=rates, rank=args.rank), work)


def _multiplied(side: Side) -> int:
    """Weights that meet every token: a table of embeddings that is no head as well is only looked up."""
    return side.total - (0 if side.arch.tied else side.table)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )

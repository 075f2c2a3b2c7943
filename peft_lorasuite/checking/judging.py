"""The lines of a check from what both sides gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from .answers import plain
from .likelihood import Reading, calibration_error, per_token, share_with_bound
from .page import Line
from .sides import OldSide, Side

SMALLEST_EFFECT = 0.1
"""Nats per token below which a difference of likelihoods means nothing; that of measured gaps (`reporting.gap`)."""
SHORT = 32
"""Tokens up to which answers are short: of longer ones nearly all change from one training to the next."""
MORE = "upgrade with --method distill and prompts of the task, or add --finetune with labeled samples"
"""What recovers more of the gap."""
GAP, FLIPS, CHANGED = "gap recovered", "negative flips", "changed answers"

Limits = Mapping[str, float]


def answer_lines(
    old: OldSide, new: Side, retrained: Side | None, limits: Limits, seed: int, *, labeled: bool
) -> list[Line]:
    """Return the lines about the answers and their likelihoods.

    Args:
        old: The old adapted model.
        new: The upgraded model.
        retrained: A retrained adapter on the new backbone, if there is one.
        limits: The thresholds.
        seed: Seed of the bootstrap.
        labeled: Whether the prompts have reference answers.
    """
    lines = [gap_line(old, new, retrained, limits["gap"], seed, labeled=labeled)]
    if labeled:
        lines += [flips_line(old, new, retrained, limits["flips"]), calibration_line(old, new, limits["ece"])]
    else:
        lines += [confidence_line(old, limits["confidence"]), changed_line(old, new, retrained, limits["changed"])]
    lines += [
        divergence_line("divergence on the task", old.readings, new.readings, limits["task_divergence"]),
        divergence_line("divergence on other text", old.text, new.text, limits["divergence"]),
        stops_line(old, new, limits["stops"]), length_line(old, new, limits["length"]),
    ]  # fmt: skip
    return lines


def gap_line(
    old: OldSide, new: Side, retrained: Side | None, limit: float, seed: int, *, labeled: bool
) -> Line:  # fmt: skip
    """Return the share of the way from the new backbone to the retrained or else the old adapted model."""
    answers = "the reference answers" if labeled else "the old adapted model's answers"
    effect = per_token(old.readings, "base") - per_token(old.readings, "nll")
    if not effect >= SMALLEST_EFFECT:
        return Line.of(
            GAP, False, f"the old adapter gains {effect:.2f} nats per token of {answers}",
            f"at least {SMALLEST_EFFECT}", reason="pass prompts of its task in its format (--data, --format)",
        )  # fmt: skip
    best, name = (old, "the old adapted model") if retrained is None else (retrained, "the retrained one")
    base, reached = ([getattr(one, field) for one in new.readings] for field in ("base", "nll"))
    wholes = [start - one.nll for start, one in zip(base, best.readings, strict=True)]
    count = sum(one.tokens for one in new.readings)
    if sum(wholes) < SMALLEST_EFFECT * count:
        behind = (sum(reached) - sum(one.nll for one in best.readings)) / max(count, 1)
        return Line.of(
            GAP, behind <= SMALLEST_EFFECT, f"{behind:+.2f} nats per token behind {name}", f"at most {SMALLEST_EFFECT}",
            behind, "the new backbone gives these answers without an adapter",
        )  # fmt: skip
    parts = [start - end for start, end in zip(base, reached, strict=True)]
    share, low = share_with_bound(parts, wholes, seed)
    measured = f"{share:.1%}, lower bound {low:.1%}, of the way to {name} by the likelihood of {answers}"
    reason = "" if low >= limit else MORE
    return Line.of(GAP, low >= limit, measured, f"lower bound at least {limit:.0%}", low, reason)


def confidence_line(old: OldSide, limit: float) -> Line:
    """Return whether the old adapted model is sure of its answers: otherwise these say little without labels."""
    value = per_token(old.readings, "confidence")
    reason = "" if value >= limit else "pass prompts of its task, or labels (--data)"
    return Line.of("confidence of the old one", value >= limit, f"{value:.2f}", f"at least {limit:.2f}", value, reason)


def flips_line(old: OldSide, new: Side, retrained: Side | None, limit: float) -> Line:
    """Return the share of the prompts that were right and are wrong now."""
    lost, won = _flips(old, new)
    count, before = len(new.right), sum(old.right)
    measured = f"{lost} of {count} right before and wrong now, {won} the other way ({before} to {sum(new.right)} right)"
    if not before:
        return Line.skipped(FLIPS, "the old adapted model has no answer right, word by word", measured)
    limit, floor = _with_floor(limit, None if retrained is None else _flips(old, retrained)[0] / count)
    return Line.of(FLIPS, lost / count <= limit, f"{lost / count:.1%}: {measured}", f"at most {floor}", lost / count)


def _flips(old: OldSide, new: Side) -> tuple[int, int]:
    """Return how many answers were right and are wrong now, and the reverse."""
    pairs = list(zip(old.right, new.right, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def changed_line(old: OldSide, new: Side, retrained: Side | None, limit: float) -> Line:
    """Return the share of answers that differ from those of the old adapted model."""
    value = _changed(old, new)
    measured = f"{value:.1%} of {len(new.answers)} answers differ from the old ones"
    if retrained is None and old.tokens > SHORT:
        reason = f"answers of over {SHORT} tokens differ after any training (--retrained has a floor for them)"
        return Line.skipped(CHANGED, reason, measured)
    limit, floor = _with_floor(limit, None if retrained is None else _changed(old, retrained))
    return Line.of(CHANGED, value <= limit, measured, f"at most {floor}", value)


def _changed(old: OldSide, new: Side) -> float:
    return fmean(plain(one) != plain(other) for one, other in zip(old.answers, new.answers, strict=True))


def _with_floor(limit: float, floor: float | None) -> tuple[float, str]:
    """Return a limit, raised to what a retraining differs by, and the words for it."""
    if floor is None:
        return limit, f"{limit:.1%}"
    return max(limit, floor), f"{max(limit, floor):.1%}, a retraining has {floor:.1%}"


def calibration_line(old: OldSide, new: Side, limit: float) -> Line:
    """Return the expected calibration error of the answers, and that of the old adapted model."""
    before, after = (calibration_error(one.confidences, one.right) for one in (old, new))
    measured = f"ECE {after:.3f}, before {before:.3f}"
    return Line.of("calibration", after - before <= limit, measured, f"at most {limit:g} more", after)


def divergence_line(name: str, old: Sequence[Reading], new: Sequence[Reading], limit: float) -> Line:
    """Return the divergence from the backbone without the adapter, in nats per token."""
    if not new:
        return Line.skipped(name, "the built-in text has no tokens in this vocabulary")
    before, after = (per_token(one, "divergence") for one in (old, new))
    measured = f"{after:.3f} nats per token from the new backbone; the old adapter {before:.3f} from its own"
    return Line.of(name, after - before <= limit, measured, f"at most {limit:g} more", after)


def stops_line(old: OldSide, new: Side, limit: float) -> Line:
    """Return the share of answers that stop by themselves."""
    before, after = fmean(old.ended), fmean(new.ended)
    measured = f"{after:.1%}, before {before:.1%}"
    return Line.of("answers that stop", before - after <= limit, measured, f"at most {limit:.0%} fewer", after)


def length_line(old: OldSide, new: Side, limit: float) -> Line:
    """Return the mean length of the answers in characters."""
    before, after = (fmean(map(len, one.answers)) for one in (old, new))
    measured = f"{after:.0f} characters, before {before:.0f}"
    if not before:
        return Line.skipped("length of answers", "the old adapted model gives no answers", measured)
    factor = after / before
    return Line.of("length of answers", 1 / limit <= factor <= limit, measured, f"within a factor of {limit:g}", factor)

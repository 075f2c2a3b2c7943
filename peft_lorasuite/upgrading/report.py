"""The report of an upgrade: what was transferred, and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._version import __version__
from ..adapters.adapter import Adapter
from ..io.dataclass_schema import record_of
from ..io.schema import NAME, PLAIN, TEXT, Kind, ListOf, Record, either, integer, number, one_of, optional, table_of
from ..methods.base import MethodResult
from ..text.summary import Summarized

SHOWN_LABELS = 6
"""Labels that are listed; the report has all."""
COPY_FATE = "not transferred: a copy of "
"""Beginning of the fate of a tensor that is saved twice."""
TRANSFERRED = "transferred"
"""Fate of a tensor that is in the result."""
APPLIED = "applied to the old model"
"""Fate of a tensor of whose effect the result is made; see `Report.by_behavior`."""


@dataclass(frozen=True, repr=False)
class Report(Summarized):
    """Report of an upgrade; written beside the weights as ``lorasuite_report.json``.

    Attributes:
        adapter: The old adapter.
        old: The old backbone.
        new: The new backbone.
        method: Name of the method, and its options.
        rank: Rank of the new adapter.
        modules: Per new module: its sources, energy kept, norm, residuals of the maps.
        tensors: Every tensor of the old adapter -> ``"transferred"``, ``"applied to the old model"`` where the result
            is made from what the whole adapter does, or ``"not transferred: ..."`` with the reason.
        facts: Measurements of the method and the map. Also ``auto``, the reason for the method; ``differences``, the
            structural differences of the backbones and how they are handled; ``prediction``, whether the upgrade is
            likely to hold; ``task``, type, labels and problem type of a classifier; ``named_base``, a warning if the
            adapter's base model is not the old backbone of the map.
        revisions: Commits on the Hub of ``adapter``, ``old`` and ``new``; None for a folder.
        version: Version of this package.
    """

    adapter: str
    old: str
    new: str
    method: Mapping[str, Any]
    rank: int
    modules: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, str | None] = field(default_factory=dict)
    version: str = __version__

    @property
    def by_behavior(self) -> bool:
        """Whether the result was made from the adapter's behavior: no module of it comes from one of the adapter."""
        return by_behavior(self.modules)

    @property
    def coverage(self) -> float | None:
        """Share of the old adapter's tensors that were transferred, from 0 to 1; copies do not count.

        None for methods that transfer the adapter's behavior: their result has modules of its own.
        """
        return coverage(self.tensors, self.modules)

    @property
    def verdict(self) -> str:
        """Whether the upgrade is likely to hold, in one line: the first thing to read."""
        found = self.facts.get("prediction")
        if not found:
            return "not predicted"
        if self.facts.get("rekey") and found["verdict"] != "retrain":
            return self._rekeyed(found)
        words = {"holds": "likely to hold", "doubtful": "doubtful", "retrain": "unlikely to hold: plan to retrain"}
        expected = f"about {found['expected_gap_recovered']:.0%} of the adapter's gain expected"
        if answers := found.get("equal_answers"):
            expected += f", {answers[0]} of {answers[1]} changed sample answers as the old adapted model's"
        warnings = [f"; {warning}" for warning in self.facts.get("warnings", [])]
        return f"{words[found['verdict']]} ({expected}){''.join(warnings)}"

    def _rekeyed(self, found: Mapping[str, Any]) -> str:
        """Return the verdict on an adapter that got new names for the same weights."""
        lost = [fate for fate in self.tensors.values() if fate.startswith(("not transferred", "in part"))]
        lost = [fate for fate in lost if not fate.startswith(COPY_FATE)]
        words = "lossless" if not lost and self.energy_kept > 1 - 1e-6 else "re-keyed in part"
        words = words if found["verdict"] == "holds" else "doubtful"
        return f"{words}: both backbones hold {found['because']}"

    @property
    def task_summary(self) -> str:
        """The labels of a classifier and, if the method measured it, how often the old one agrees; else empty."""
        found = self.facts.get("task")
        if not found:
            return ""
        names, rest = found["labels"][:SHOWN_LABELS], len(found["labels"]) - SHOWN_LABELS
        more = f" and {rest} more" if rest > 0 else ""
        agreed = self.facts.get(self.method["name"], {}).get("agreement")
        agreement = "" if agreed is None else f"; agreement with the old classifier {agreed:.0%}"
        if not names:
            return found["type"]
        return f"{found['type']}, {found['problem_type'] or 'no problem_type'}: {', '.join(names)}{more}{agreement}"

    @property
    def energy_kept(self) -> float:
        """Mean share of the energy ``||dW||_F^2`` that is left at the final rank, over the modules, from 0 to 1."""
        return sum(module["energy_kept"] for module in self.modules) / max(len(self.modules), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the verdict first."""
        coverage = None if self.coverage is None else round(self.coverage, 6)
        shares = {"coverage": coverage, "energy_kept": round(self.energy_kept, 6)}
        return {"verdict": self.verdict, **asdict(self), **shares}

    def _summary(self) -> tuple[str, dict[str, str]]:
        rows = {
            "adapter": self.adapter, "from": self.old, "to": self.new,
            "method": f"{self.method['name']}, rank {self.rank}, {len(self.modules)} modules",
        }  # fmt: skip
        if not self.by_behavior:
            lost = len(lost_tensors(self.tensors))
            rows["tensors"] = f"{len(self.tensors) - lost} of {len(self.tensors)} transferred"
        return f"Report: {self.verdict}", rows | ({"task": self.task_summary} if self.task_summary else {})


_module = {
    "module": NAME, "energy_kept": number(0.0), "norm": number(0.0),
    "from": table_of(ListOf(item=either(integer(0), NAME), fewest=2, most=2)),
}  # fmt: skip
_prediction = {
    "verdict": one_of("holds", "doubtful", "retrain"), "expected_gap_recovered": number(0.0), "because": TEXT,
    "equal_answers": optional(ListOf(item=integer(0), fewest=2, most=2)),
}  # fmt: skip
_task = {"type": NAME, "labels": ListOf(item=TEXT), "problem_type": optional(NAME)}
_sample: dict[str, Kind] = dict.fromkeys(("prompt", "base", "upgraded", "old"), TEXT)
_facts = {
    "samples": ListOf(item=Record(fields=_sample, required=list(_sample))),
    "task": Record(fields=_task, required=list(_task), others=PLAIN),
    "prediction": Record(fields=_prediction, required=[*_prediction][:3], others=PLAIN),
    "differences": ListOf(item=TEXT), "warnings": ListOf(item=TEXT), "hints": ListOf(item=TEXT),
}  # fmt: skip
_report = record_of(
    Report, adapter=TEXT, old=TEXT, new=TEXT, rank=integer(0),
    method=Record(fields={"name": NAME, "options": optional(table_of(PLAIN))}, required=["name"], others=PLAIN),
    modules=ListOf(item=Record(fields=_module, required=["module", "energy_kept", "norm"], others=PLAIN)),
    facts=optional(Record(fields=_facts, others=PLAIN)), revisions=optional(table_of(optional(NAME))),
)  # fmt: skip
_shares = {"coverage": optional(number(0.0, high=1.0)), "energy_kept": number(0.0), "verdict": TEXT}
REPORT_SCHEMA = Record(
    fields={**_report.fields, **_shares}, required=[*_report.required, "coverage", "energy_kept", "version"],
    others=PLAIN,
)  # fmt: skip
"""Schema of ``lorasuite_report.json``."""


def by_behavior(modules: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the modules of a result come from none of the adapter's."""
    return bool(modules) and not any(module["from"] for module in modules)


def lost_tensors(fates: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the tensors that the result does without, each with the reason."""
    return [(name, fate) for name, fate in fates.items() if fate not in (TRANSFERRED, APPLIED)]


def coverage(fates: Mapping[str, str], modules: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of the old adapter's tensors that were transferred; see `Report.coverage`."""
    if by_behavior(modules):
        return None
    counted = [fate for fate in fates.values() if not fate.startswith(COPY_FATE)]
    return sum(fate == TRANSFERRED for fate in counted) / max(len(counted), 1)


def tensor_fates(
    adapter: Adapter, method_result: MethodResult, modules: Sequence[Mapping[str, Any]], others: Mapping[str, str]
) -> dict[str, str]:
    """Return for every tensor of the adapter what became of it; see `Report.tensors`.

    Args:
        adapter: The old adapter.
        method_result: Result of the method.
        modules: The modules of the report.
        others: Fates of tensors outside the layers.
    """
    fates = fates_of(adapter.names, method_result.dropped)
    fates |= {name: f"not transferred: {reason}" for name, reason in adapter.unused.items()}
    fates |= dict.fromkeys(adapter.others, TRANSFERRED) | dict(others)
    if by_behavior(modules):
        fates = {name: APPLIED if fate == TRANSFERRED else fate for name, fate in fates.items()}
    return dict(sorted(fates.items()))


def fates_of(owners: Mapping[Any, Sequence[str]], dropped: Mapping[Any, str]) -> dict[str, str]:
    """Return the fates of tensors by their names.

    Args:
        owners: Key of an update, which ends with its part -> names of its tensors; one can have several owners.
        dropped: Keys of updates that are not transferred -> the reason.
    """
    reasons: dict[str, dict[str, None]] = {}
    counts: dict[str, list[int]] = {}
    for key, names in owners.items():
        for name in names:
            count = counts.setdefault(name, [0, 0])
            count[0] += 1
            if key in dropped:
                count[1] += 1
                reasons.setdefault(name, {})[f"{key[-1]}: {dropped[key]}"] = None
    fates = {}
    for name, (count, lost) in counts.items():
        partly = "in part; " if lost and lost < count else ""
        fates[name] = f"{partly}not transferred: {'; '.join(reasons[name])}" if lost else TRANSFERRED
    return fates

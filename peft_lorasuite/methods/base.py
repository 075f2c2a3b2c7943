"""What a method is: a function from a job to a draft, with options of its own, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from operator import gt, lt
from typing import Any, get_type_hints

from ..adapters.adapter import Adapter, Key
from ..errors import LoraSuiteError, unknown
from ..linalg.lowrank import LowRank
from ..mapping.sections import Request, Section, SectionSpec, build_section, common_parts
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..progress import Progress, silent
from .options import converted

BUILT_IN = {
    "copy": "copy",
    "cross-lora": "cross_lora",
    "distill": "distill",
    "lorasuite": "lorasuite",
    "transplant": "transplant",
    "transport": "transport",
}
"""Method name -> module of this package that registers it on import."""


@dataclass(frozen=True, eq=False)
class Job:
    """What a method is given.

    Attributes:
        adapter: The adapter, on the old backbone.
        map: The upgrade map of the pair.
        old: The old backbone, if the caller has it.
        new: The new backbone, if the caller has it.
        prompts: Unlabelled prompts, if the caller gave any.
        seed: Of whatever is drawn at random.
        progress: Shows how far a long step is.
    """

    adapter: Adapter
    map: UpgradeMap
    old: Backbone | None = None
    new: Backbone | None = None
    prompts: Sequence[str] | None = None
    seed: int = 0
    progress: Progress = silent

    def backbones(self, method: str) -> tuple[Backbone, Backbone]:
        """Return both backbones, or refuse: for methods that run or read them."""
        if self.old is None or self.new is None:
            raise LoraSuiteError(
                f"the method {method!r} reads both backbones",
                wanted="old= and new=",
                do="name them, or use a weight-based method",
            )
        return self.old, self.new

    def section(self, method: str, spec: SectionSpec, options: Any) -> Section:
        """Return the map's section of a method; build it for the adapter's parts if both backbones are at hand.

        Raises:
            LoraSuiteError: When the map lacks it, or was given it with other options, and a backbone is missing.
        """
        parts = common_parts(self.map, self.adapter.parts)
        kept = self.map.sections.get(spec.name)
        if kept is not None and set(parts) <= set(kept.parts) and spec.serves(kept.settings, options):
            return kept
        if self.old is not None and self.new is not None:
            return build_section(spec, Request(self.map, self.old, self.new, parts, options, progress=self.progress))
        wanted = {name: getattr(options, name) for name in spec.settings}
        lacks = f"the upgrade map has no section for {method!r}"
        raise LoraSuiteError(
            lacks if kept is None else f"{lacks} with these options and parts",
            where=self.map.home, got=f"{kept.settings}, {', '.join(kept.parts)}" if kept else "none", wanted=wanted,
            do=f"add it (map.with_section({method!r}, old, new) or `map OLD NEW --methods {method}`), "
            "or name both backbones",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Draft:
    """What a method returns: updates of the new backbone, per layer and part.

    Attributes:
        updates: ``(new layer, part)`` -> update.
        sources: ``(new layer, part)`` -> the old ``(layer, part)`` that it came from.
        dropped: Old ``(layer, part)`` -> why it is not carried.
        figures: ``(new layer, part)`` -> numbers for the report (residual, agreement of merged heads, ...).
        facts: What else is worth a line in the report.
        rank: Rank that the method asks for, if not the source adapter's.
    """

    updates: Mapping[Key, LowRank]
    sources: Mapping[Key, Key] = field(default_factory=dict)
    dropped: Mapping[Key, str] = field(default_factory=dict)
    figures: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None


def check_bounds(options: Any, least: Mapping[str, float], most: Mapping[str, float] | None = None) -> None:
    """Refuse options out of bounds, each option -> smallest or largest value. None, to be chosen later, passes."""
    for word, bounds, beyond in (("at least", least, lt), ("at most", most or {}, gt)):
        for name, bound in bounds.items():
            value = getattr(options, name)
            if value is not None and beyond(value, bound):
                raise LoraSuiteError("an option is out of range", where=name, got=value, wanted=f"{word} {bound:g}")


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class Method:
    """A registered method."""

    name: str
    run: Callable[[Job, Any], Draft]
    options: type
    needs_backbones: bool
    section: SectionSpec | None = None

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


_methods: dict[str, Method] = {}


def method(
    name: str, *, options: type = NoOptions, needs_backbones: bool = False, section: SectionSpec | None = None
) -> Callable[[Callable[[Job, Any], Draft]], Callable[[Job, Any], Draft]]:
    """Register a function ``(job, options) -> Draft`` under a name; ``options`` is a frozen dataclass.

    ``needs_backbones``: it cannot run without them. ``section``: what it keeps in the upgrade map.
    """

    def decorate(run: Callable[[Job, Any], Draft]) -> Callable[[Job, Any], Draft]:
        if name in _methods and _methods[name].run.__module__ != run.__module__:
            raise LoraSuiteError(
                f"two methods are called {name!r}", got=f"{_methods[name].run.__module__} and {run.__module__}"
            )
        if not is_dataclass(options):
            raise LoraSuiteError("a method's options are a dataclass", where=name, got=options)
        _methods[name] = Method(name, run, options, needs_backbones, section)
        return run

    return decorate


def find(name: str) -> Method:
    """Return a method by name."""
    if name not in _methods and name in BUILT_IN:
        import_module(f"{__package__}.{BUILT_IN[name]}")
    if name not in _methods:
        raise unknown("method", name, names())
    return _methods[name]


def names() -> list[str]:
    """Return every known method's name."""
    return sorted({*BUILT_IN, *_methods})


def reads_old(method: str, upgrade_map: UpgradeMap) -> bool:
    """Whether a method runs or reads the old backbone: by its nature, or for a section that the map lacks."""
    if method == "auto":
        return False
    chosen = find(method)
    lacks = chosen.section is not None and chosen.section.name not in upgrade_map.sections
    return chosen.needs_backbones or lacks


def make_options(chosen: Method, options: Any) -> Any:
    """Return a method's options: its own dataclass, or a mapping (or None), checked field by field."""
    if isinstance(options, chosen.options):
        values = {item.name: getattr(options, item.name) for item in fields(options) if item.init}
        return replace(options, **_typed(type(options), values))
    if options is None:
        return chosen.options()
    if not isinstance(options, Mapping):
        raise LoraSuiteError(
            "the options are another method's",
            where=chosen.name,
            got=type(options).__name__,
            wanted=chosen.options.__name__,
        )
    known = {item.name for item in fields(chosen.options)}
    for name in options:
        if name not in known:
            raise unknown(f"option of {chosen.name}", name, known)
    return chosen.options(**_typed(chosen.options, options))


def _typed(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(options)
    return {name: converted(name, value, types[name]) for name, value in values.items()}

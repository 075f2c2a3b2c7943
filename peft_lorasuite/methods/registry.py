"""The registry of methods: the built-in ones in a table, others by the decorator `method`.

Importing it does not import torch, so that the command line lists the methods without delay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LoraSuiteError, unknown_name_error

if TYPE_CHECKING:
    from ..mapping.sections import SectionSpec
    from ..mapping.upgrade_map import UpgradeMap
    from .base import MethodInput, MethodResult

    Run = Callable[[MethodInput, Any], MethodResult]


class BuiltIn(NamedTuple):
    """A built-in method: the module of this package that registers it, a one-line summary, and the paper."""

    module: str
    summary: str
    paper: str = ""


BUILT_IN = {
    "copy": BuiltIn("copy", "Copy every update to the layer with the same index, cropped or zero-padded (baseline)."),
    "rekey": BuiltIn("rekey", "Rename and lay out anew, without loss, where both backbones hold the same weights."),
    "lorasuite": BuiltIn(
        "lorasuite", "Transfer the factors head by head and unit by unit, from the weights alone.", "arXiv 2505.13515"
    ),
    "cross-lora": BuiltIn(
        "cross_lora", "Project the factors between the leading singular subspaces of the weights.", "arXiv 2508.05232"
    ),
    "transplant": BuiltIn(
        "transplant", "Fit the new model's last layer to the adapter's effect on the logits; training-free."
    ),
    "distill": BuiltIn("distill", "Train a LoRA toward the adapter's effect on the logits, without labels."),
}
"""Name -> built-in method, the baseline first."""


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: Name of the method.
        run: The function.
        options: Frozen dataclass of its options.
        needs_backbones: Whether it needs both backbones.
        section: The section that it stores in the upgrade map, if any.
    """

    name: str
    run: Run
    options: type
    needs_backbones: bool
    section: SectionSpec | None = None

    @property
    def summary(self) -> str:
        """One-line summary."""
        return BUILT_IN[self.name].summary if self.name in BUILT_IN else (self.run.__doc__ or "").partition("\n")[0]


_methods: dict[str, Method] = {}


def method(
    name: str, *, options: type = NoOptions, needs_backbones: bool = False, section: SectionSpec | None = None
) -> Callable[[Run], Run]:
    """Register a function ``(MethodInput, options) -> MethodResult`` as a method.

    Args:
        name: Name of the method.
        options: Frozen dataclass of its options.
        needs_backbones: Whether it needs both backbones.
        section: The section that it stores in the upgrade map, if any.

    Raises:
        LoraSuiteError: For a name that another module has registered, and for options that are not a dataclass.
    """

    def decorate(run: Run) -> Run:
        if name in _methods and _methods[name].run.__module__ != run.__module__:
            raise LoraSuiteError(
                f"two methods have the name {name!r}", got=f"{_methods[name].run.__module__} and {run.__module__}"
            )
        if not is_dataclass(options):
            raise LoraSuiteError("a method's options must be a dataclass", where=name, got=options)
        _methods[name] = Method(name, run, options, needs_backbones, section)
        return run

    return decorate


def find(name: str, *, auto: bool = False) -> Method:
    """Return a method by its name.

    Args:
        name: The name.
        auto: Whether ``"auto"`` is a choice as well where the name is from; for the error.

    Raises:
        LoraSuiteError: For an unknown name.
    """
    if name not in _methods and name in BUILT_IN:
        import_module(f"{__package__}.{BUILT_IN[name].module}")
    if name not in _methods:
        raise unknown_name_error("method", name, [*(["auto"] if auto else []), *names()])
    return _methods[name]


def names() -> list[str]:
    """Return the names of all known methods."""
    return sorted({*BUILT_IN, *_methods})


def summaries() -> dict[str, str]:
    """Return name -> one-line summary of all known methods, without importing the built-in ones."""
    known = {name: one.summary for name, one in BUILT_IN.items()}
    return known | {name: one.summary for name, one in _methods.items() if name not in known}


def reads_old(name: str, upgrade_map: UpgradeMap) -> bool:
    """Return whether a method reads the old backbone: always, or because the map does not have its section."""
    if name == "auto":
        return not upgrade_map.maps_weights
    chosen = find(name)
    needs_section = chosen.section is not None and chosen.section.name not in upgrade_map.sections
    return chosen.needs_backbones or needs_section

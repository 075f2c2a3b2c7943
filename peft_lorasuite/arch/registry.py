"""Which converter describes which ``config.model_type``: built in, registered here, or installed as a plugin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ..errors import LoraSuiteError, unknown
from .spec import Architecture

Converter = Callable[[Any], Architecture]

BUILT_IN = {
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "granite": "granite",
    "llama": "llama",
    "minicpm": "minicpm",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
}
"""``model_type`` -> module of `peft_lorasuite.converters`; imported on first use, so that importing us stays cheap."""

ENTRY_POINTS = "peft_lorasuite.converters"
ADVICE = (
    "add a converter with peft_lorasuite.register (or the entry point group "
    f"{ENTRY_POINTS!r}); docs/add-a-family.md shows how"
)


@dataclass(frozen=True)
class Entry:
    """A registered converter and where it came from."""

    converter: Converter
    origin: str


_registered: dict[str, Entry] = {}


def register(*model_types: str) -> Callable[[Converter], Converter]:
    """Register a function ``config -> Architecture`` for one or more ``config.model_type`` values.

    Raises:
        LoraSuiteError: When another converter is registered for one of them already.
    """

    def decorate(converter: Converter) -> Converter:
        origin = f"{converter.__module__}.{getattr(converter, '__qualname__', converter)}"
        for model_type in model_types:
            holder = _registered.get(model_type)
            built_in = f"peft_lorasuite.converters.{BUILT_IN.get(model_type)}"
            taken = holder.origin if holder else built_in if model_type in BUILT_IN else origin
            if taken != origin and not origin.startswith(f"{built_in}."):
                raise LoraSuiteError(
                    f"two converters for model type {model_type!r}",
                    got=f"{origin} and {taken}",
                    do="register under another model type or remove one of the packages",
                )
            _registered[model_type] = Entry(converter, origin)
        return converter

    return decorate


def known() -> dict[str, str]:
    """Return every known model type with the place its converter comes from, without importing any."""
    names = {model_type: f"{ENTRY_POINTS}.{module}" for model_type, module in BUILT_IN.items()}
    names |= {point.name: point.value for point in _plugins()}
    return dict(sorted((names | {name: entry.origin for name, entry in _registered.items()}).items()))


def architecture(config: Any) -> Architecture:
    """Describe a backbone by its config (anything with ``model_type`` and the family's config attributes).

    Raises:
        LoraSuiteError: For an unknown model type, a collision, or a config that the converter cannot read.
    """
    model_type = getattr(config, "model_type", None) or ""
    converter = _converter(model_type)
    try:
        return converter(config)
    except LoraSuiteError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = "lacks what its family needs" if isinstance(error, AttributeError) else "holds what its family cannot be"
        raise LoraSuiteError(
            f"the config {what}: {error}", where=model_type, do="check the backbone's config.json"
        ) from error


def _converter(model_type: str) -> Converter:
    plugins = [point for point in _plugins() if point.name == model_type]
    homes = [f"entry point {point.value}" for point in plugins]
    homes += [f"built in {BUILT_IN[model_type]}"] if model_type in BUILT_IN else []
    if len(homes) > 1:
        raise LoraSuiteError(
            f"two converters for model type {model_type!r}", got=" and ".join(homes), do="uninstall one of the packages"
        )
    if model_type not in _registered:
        if model_type in BUILT_IN:
            _load_built_in(BUILT_IN[model_type])
        elif plugins:
            register(model_type)(plugins[0].load())
        else:
            raise unknown("model type", model_type, known(), do=ADVICE)
    return _registered[model_type].converter


def _load_built_in(module: str) -> None:
    try:
        import_module(f"peft_lorasuite.converters.{module}")
    except ModuleNotFoundError as error:
        if error.name != "peft_lorasuite.converters":
            raise
        raise LoraSuiteError(
            "the converters are not installed", do="install the package: pip install -e . in the checkout"
        ) from error


def _plugins() -> list[Any]:
    return list(entry_points(group=ENTRY_POINTS))

"""The registry of converters: the built-in ones as a table, others by `register` or by an entry point.

A converter is a function ``config -> Architecture`` for one or more values of ``config.model_type``. Nothing here
imports torch, so that the command line can list the families at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from ..compat import current_config, installed_names
from ..errors import LoraSuiteError
from .spec import Architecture

Converter = Callable[[Any], Architecture]


class UndescribedLayoutError(LoraSuiteError):
    """Raised by a converter for a layout of its model type that it does not describe: it is as if it had none."""


class BuiltIn(NamedTuple):
    """A built-in model type: the module of `peft_lorasuite.converters` that registers it, and a one-line summary."""

    module: str
    summary: str


BUILT_IN = {
    "bloom": BuiltIn("bloom", "q+k+v by head; biases; MHA; ALiBi; LayerNorm"),
    "cohere2": BuiltIn("cohere2", "not fused; optional q, k, v, o biases; GQA; rotary; LayerNorm"),
    "falcon": BuiltIn("falcon", "q+k+v by group; optional biases; GQA; rotary or ALiBi; LayerNorm"),
    "gemma": BuiltIn("gemma", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "gemma2": BuiltIn("gemma2", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "gemma3": BuiltIn("gemma3", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "gemma3_text": BuiltIn("gemma3", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "gemma4": BuiltIn("gemma4", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "gemma4_text": BuiltIn("gemma4", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "glm4": BuiltIn("glm4", "gate+up by part; optional q, k, v biases; GQA; rotary; RMSNorm"),
    "gpt2": BuiltIn("gpt2", "q+k+v by part; biases; MHA; learned; LayerNorm"),
    "gpt_oss": BuiltIn("gpt_oss", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "gpt_neox": BuiltIn("gpt_neox", "q+k+v by head; MLP biases, others optional; MHA; rotary; LayerNorm"),
    "gptj": BuiltIn("gptj", "not fused; up, down biases; MHA; rotary; LayerNorm"),
    "granite": BuiltIn("granite", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "llama": BuiltIn("llama", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "llava": BuiltIn("multimodal", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "minicpm": BuiltIn("minicpm", "not fused; no biases; GQA; rotary; RMSNorm"),
    "ministral": BuiltIn("llama", "not fused; no biases; GQA; rotary; RMSNorm"),
    "mistral": BuiltIn("llama", "not fused; no biases; GQA; rotary; RMSNorm"),
    "mistral3": BuiltIn("multimodal", "not fused; no biases; GQA; rotary; RMSNorm"),
    "mixtral": BuiltIn("mixtral", "not fused; no biases; GQA; rotary; RMSNorm"),
    "olmo2": BuiltIn("olmo2", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "olmo3": BuiltIn("olmo2", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "opt": BuiltIn("opt", "not fused; optional biases; MHA; learned; LayerNorm"),
    "phi": BuiltIn("phi", "not fused; biases; GQA; rotary; LayerNorm"),
    "phi3": BuiltIn("phi3", "q+k+v by part, gate+up by part; no biases; GQA; rotary; RMSNorm"),
    "qwen2": BuiltIn("qwen2", "not fused; q, k, v biases; GQA; rotary; RMSNorm"),
    "qwen2_5_vl": BuiltIn("multimodal", "not fused; q, k, v biases; GQA; rotary; RMSNorm"),
    "qwen2_vl": BuiltIn("multimodal", "not fused; q, k, v biases; GQA; rotary; RMSNorm"),
    "qwen3": BuiltIn("qwen3", "not fused; optional q, k, v, o biases; GQA; rotary; RMSNorm"),
    "qwen3_5": BuiltIn("qwen3_5", "q+q_gate by head; optional q, k, v, o, q_gate biases; GQA; rotary; RMSNorm"),
    "qwen3_5_text": BuiltIn("qwen3_5", "q+q_gate by head; optional q, k, v, o, q_gate biases; GQA; rotary; RMSNorm"),
    "smollm3": BuiltIn("smollm3", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "qwen3_moe": BuiltIn("qwen3_moe", "not fused; optional biases; GQA; rotary; RMSNorm"),
    "stablelm": BuiltIn("stablelm", "not fused; optional q, k, v biases; GQA; rotary; LayerNorm"),
    "starcoder2": BuiltIn("starcoder2", "not fused; optional biases; GQA; rotary; LayerNorm"),
}
"""``model_type`` -> converter. A summary says, in this order: fused projections and the order of their rows, biases,
attention heads (GQA where the config has a number of key/value heads), positions, norm."""

CONVERTERS = "peft_lorasuite.converters"
"""Package of the built-in converters, and group of the entry points of other packages."""


class Family(NamedTuple):
    """A supported model type: a one-line summary, empty if it has none, and the origin of its converter."""

    summary: str
    origin: str


@dataclass(frozen=True)
class Entry:
    """A registered converter."""

    converter: Converter
    origin: str
    summary: str = ""


_registered: dict[str, Entry] = {}
_hidden: set[str] = set()


def register(*model_types: str, summary: str = "") -> Callable[[Converter], Converter]:
    """Register a function ``config -> Architecture`` for one or more values of ``config.model_type``.

    Args:
        model_types: The values of ``config.model_type``.
        summary: One line about the layers, for ``peft-lorasuite families``.

    Raises:
        LoraSuiteError: If another converter is registered for one of the model types.
    """

    def decorate(converter: Converter) -> Converter:
        origin = f"{converter.__module__}.{getattr(converter, '__qualname__', converter)}"
        for model_type in model_types:
            _check_origin(model_type, origin)
        _registered.update({model_type: Entry(converter, origin, summary) for model_type in model_types})
        return converter

    return decorate


def _check_origin(model_type: str, origin: str) -> None:
    """Raise an error if the converter of a model type comes from elsewhere."""
    built_in, entry = BUILT_IN.get(model_type), _registered.get(model_type)
    other = None
    if built_in and not origin.startswith(f"{CONVERTERS}.{built_in.module}."):
        other = f"{CONVERTERS}.{built_in.module}"
    elif entry and entry.origin != origin:
        other = entry.origin
    if other:
        raise LoraSuiteError(
            f"two converters for model type {model_type!r}",
            got=f"{origin} and {other}",
            do="register another model type, or uninstall one of the packages",
        )


def families() -> dict[str, Family]:
    """Return every supported model type in alphabetical order, without importing a converter."""
    found = {point.name: Family("", point.value) for point in _entry_points()}
    found |= {model_type: Family(entry.summary, entry.origin) for model_type, entry in _registered.items()}
    found |= {model_type: Family(one.summary, f"{CONVERTERS}.{one.module}") for model_type, one in BUILT_IN.items()}
    return dict(sorted(found.items()))


def has_converter(model_type: str) -> bool:
    """Whether a model type has a converter."""
    if model_type in _hidden:
        return False
    return model_type in BUILT_IN or model_type in _registered or any(p.name == model_type for p in _entry_points())


@contextmanager
def without_converters(*model_types: str) -> Iterator[None]:
    """Treat model types as if they had no converter while the context lasts, to compare both roads.

    Backbones that were opened before keep the architecture that they have read.
    """
    added = set(model_types) - _hidden
    _hidden.update(added)
    try:
        yield
    finally:
        _hidden.difference_update(added)


def architecture(config: Any) -> Architecture:
    """Return the architecture of a backbone.

    Args:
        config: The backbone's config: any object with ``model_type`` and the attributes that its converter reads.

    Raises:
        LoraSuiteError: If the model type has no converter or two, or if the converter cannot read the config or does
            not describe its layout.
    """
    config = current_config(config)
    model_type = getattr(config, "model_type", None) or ""
    converter = _converter(model_type)
    try:
        return installed_names(converter(config))
    except LoraSuiteError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = "lacks a value" if isinstance(error, AttributeError) else "has an invalid value"
        raise LoraSuiteError(
            f"the config {what}: {error}", where=model_type, do="check the backbone's config.json"
        ) from error


def _converter(model_type: str) -> Converter:
    points = [] if model_type in _hidden else [point for point in _entry_points() if point.name == model_type]
    origins = [f"entry point {point.value}" for point in points]
    origins += [f"{CONVERTERS}.{BUILT_IN[model_type].module}"] if model_type in BUILT_IN else []
    if len(origins) > 1:
        raise LoraSuiteError(
            f"two converters for model type {model_type!r}",
            got=" and ".join(origins),
            do="uninstall one of the packages",
        )
    if model_type not in _registered or model_type in _hidden:
        if model_type in BUILT_IN and model_type not in _hidden:
            _import_built_in(BUILT_IN[model_type].module)
        elif points:
            _load(points[0])
        else:
            raise LoraSuiteError(
                f"no converter for model type {model_type!r}",
                wanted=f"one of {', '.join(families())}",
                do="keep the model_type in config.json: the layers of another type have other names and layouts; to add"
                " a converter with peft_lorasuite.register, see docs/add-a-family.md",
            )
    return _registered[model_type].converter


def _import_built_in(module: str) -> None:
    try:
        import_module(f"{CONVERTERS}.{module}")
    except ModuleNotFoundError as error:
        if error.name != CONVERTERS:
            raise
        raise LoraSuiteError(
            "the converters are not installed", do="run pip install -e . in the root of the repository"
        ) from error


def _load(point: EntryPoint) -> None:
    """Load the converter of an entry point; one that its module registers itself keeps its summary."""
    converter = point.load()
    if point.name not in _registered:
        register(point.name)(converter)


def _entry_points() -> tuple[EntryPoint, ...]:
    return _entry_points_on(tuple(sys.path))


@lru_cache(maxsize=1)
def _entry_points_on(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of the packages on a path; all metadata there are read, which takes .02 s."""
    del path
    return tuple(entry_points(group=CONVERTERS))

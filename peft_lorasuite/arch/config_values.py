"""The values of a config that a converter reads: with them its architecture can be checked without the backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from ..compat import current_config, model_type
from ..errors import LoraSuiteError
from .registry import UndescribedLayoutError, architecture, has_converter
from .spec import OPTIONAL, Architecture

SCALE_ROUNDING = 2.0**-8
"""Relative difference of an embedding scale that is rounded to another 16-bit dtype (Gemma)."""


def read_config_values(config: Any) -> dict[str, Any]:
    """Return the values that the registered converter reads from a config, by their names.

    Values of a nested config have dotted names: ``text_config.hidden_size``.

    Returns:
        JSON values; empty if they do not determine the architecture, such as for a converter that calls a method of
        the config, or if no converter describes it.
    """
    if not has_converter(model_type(config)):
        return {}
    values: dict[str, Any] = {}
    try:
        wanted = architecture(_Recorder(current_config(config), values))
    except UndescribedLayoutError:
        return {}
    try:
        return values if architecture(_Stored(values)) == wanted else {}
    except LoraSuiteError:
        return {}


def check_architecture(arch: Architecture, values: Mapping[str, Any]) -> None:
    """Check that an architecture is the one that the registered converter gives for the values of a config.

    Raises:
        LoraSuiteError: If it is another one, with the first field that differs, or if it cannot be checked.
    """
    if not isinstance(values.get("model_type"), str):
        raise LoraSuiteError(
            "the architecture cannot be checked without its backbone, because its converter does not only read values",
            do="pass the backbone",
        )
    given = architecture(_Stored(values))
    if difference := first_difference(arch, given):
        raise LoraSuiteError(
            f"the architecture is not the one that the converter of {values['model_type']!r} gives",
            got=f"{difference.name} {difference.wanted!r}", wanted=repr(difference.got),
        )  # fmt: skip


class Difference(NamedTuple):
    """The first field in which two architectures differ, such as ``sites[0].path``, and its two values."""

    name: str
    wanted: Any
    got: Any


def first_difference(wanted: Architecture, got: Architecture) -> Difference | None:
    """Return the first field in which two architectures differ; None if they describe the same backbone.

    A checkpoint with ``runs_as`` is the same backbone as its loaded model, which has the model type of ``runs_as``.
    The head is compared by its name in the checkpoint, since its name in the model depends on the version of
    transformers.
    """
    left, right = ({**OPTIONAL, **one.to_dict()} for one in (wanted, got))
    for values in (left, right):
        values["head"] = dict(values["disk"]).get(values["head"], values["head"])
        values["disk"] = tuple(pair for pair in values["disk"] if pair[1] != values["head"])
    if bool(wanted.runs_as) != bool(got.runs_as):
        for values in (left, right):
            runs_as = dict(values.pop("runs_as"))
            values["family"] = runs_as.get("model_type") if runs_as else values["family"]
            del values["activation_floor"]  # the loaded model has it in its activation function, not in its config
    if math.isclose(wanted.embedding_scale, got.embedding_scale, rel_tol=SCALE_ROUNDING):
        right["embedding_scale"] = left["embedding_scale"]
    return _compare("", left, right)


def _compare(name: str, wanted: Any, got: Any) -> Difference | None:
    """Compare two values of the same type field by field, and others as a whole."""
    if isinstance(wanted, dict) and isinstance(got, dict) and set(wanted) == set(got):
        pairs = [(f"{name}.{key}" if name else key, wanted[key], got[key]) for key in wanted]
    elif isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got):
        pairs = [(f"{name}[{number}]", *both) for number, both in enumerate(zip(wanted, got, strict=True))]
    else:
        return None if wanted == got else Difference(name, wanted, got)
    return next((found for pair in pairs if (found := _compare(*pair))), None)


class _Recorder:
    """A config that records the values that are read from it."""

    def __init__(self, config: Any, values: dict[str, Any], prefix: str = "") -> None:
        self._config, self._values, self._prefix = config, values, prefix

    def __getattr__(self, name: str) -> Any:
        value, key = getattr(self._config, name), self._prefix + name
        if hasattr(value, "to_dict"):
            return _Recorder(value, self._values, f"{key}.")
        with suppress(TypeError):  # a method, or another object: read_config_values finds out whether it matters
            self._values[key] = _plain(value)
        return value


class _Stored:
    """A config with stored values."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def __getattr__(self, name: str) -> Any:
        key = self._prefix + name
        if key in self._values:
            return self._values[key]
        if any(known.startswith(f"{key}.") for known in self._values):
            return _Stored(self._values, f"{key}.")
        raise AttributeError(key)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; a dtype is its name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    raise TypeError(type(value))

"""Schemas of this package's own files, which are dataclasses written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .schema import FLAG, NAME, NULL, PLAIN, Kind, ListOf, Record, either, integer, number, table_of


def record_of(cls: Any, **overrides: Kind) -> Record:
    """Return the schema of a dataclass, by the annotations of its fields.

    Args:
        cls: The dataclass; a field without a default is required.
        overrides: Field -> kind, where the annotation says too little.
    """
    hints = get_type_hints(cls)
    kinds = {one.name: overrides.get(one.name) or _kind_of(hints[one.name]) for one in fields(cls)}
    required = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
    return Record(fields=kinds, required=required)


def _kind_of(hint: Any) -> Kind:
    simple = {int: integer(), float: number(), str: NAME, bool: FLAG, type(None): NULL, Any: PLAIN}
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        return record_of(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return either(*map(_kind_of, arguments))
    if origin is not None and issubclass(origin, Mapping):
        return table_of(_kind_of(arguments[1]))
    if origin is tuple and arguments[-1] is not ...:  # values of one type each, such as a pair
        return ListOf(item=either(*map(_kind_of, arguments)), fewest=len(arguments), most=len(arguments))
    return ListOf(item=_kind_of(arguments[0]))

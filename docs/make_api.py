"""Write docs/api.md from the docstrings of what the package makes public: ``python docs/make_api.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import peft_lorasuite
from peft_lorasuite.methods import base as methods

TITLES = {
    "upgrading": "Upgrading an adapter",
    "model": "Loading an upgraded adapter",
    "upgrade_map": "Upgrade maps",
    "choice": "Choosing a method",
    "methods.base": "Methods",
    "finetuning": "Light fine-tuning",
    "evaluation": "Evaluation",
    "hub": "The Hub",
    "many": "Collections",
    "inspection": "Reports as HTML",
    "planning": "Costs beforehand",
    "backbone": "Backbones",
    "registry": "Families",
    "spec": "The description of a family",
    "adapter": "Adapters",
    "lowrank": "Low-rank updates",
    "report": "Pictures",
    "errors": "Errors",
}
"""Module -> heading, in the order of the page; a module that is not named comes last under its own name."""
MORE = {
    "adapter": ("Adapter",),
    "choice": ("pick", "Choice", "predict", "Prediction"),
    "evaluation": ("compare", "markdown_table", "comparison_table", "published_rows"),
    "hub": ("push_map",),
    "inspection": ("inspect", "Drawn"),
    "lowrank": ("LowRank",),
    "many": ("plan_many", "find_adapters", "Outcome", "Planned"),
    "methods.base": ("Job", "Draft"),
    "planning": ("plan", "Plan"),
    "report": ("layer_map_figure",),
    "upgrade_map": ("LayerPair",),
}
"""What is public beside the names of the package itself: named in the guides, imported from its module."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
HEAD = """# API reference

Written from the docstrings by `python docs/make_api.py`; do not edit. Names under `peft_lorasuite` are imported from
the package itself, others from the module that is shown.
"""


def render() -> str:
    """Return the page."""
    homes: dict[str, list[str]] = {name: [] for name in TITLES}
    for name in sorted(peft_lorasuite.__all__):
        if name in peft_lorasuite._HOMES:
            homes.setdefault(peft_lorasuite._HOMES[name], []).append(name)
    for home, names in MORE.items():
        homes.setdefault(home, []).extend(name for name in names if name not in homes[home])
    lines = [HEAD]
    for home, names in homes.items():
        lines += [f"## {TITLES.get(home, home)}", ""] if names else []
        for name in names:
            place = "peft_lorasuite" if name in peft_lorasuite.__all__ else f"peft_lorasuite.{home}"
            lines += _entry(f"{place}.{name}", getattr(import_module(f"peft_lorasuite.{home}"), name), "###")
    lines += ["## Options of the methods", ""]
    for name in sorted(methods.BUILT_IN):
        found = methods.find(name)
        lines += [f"### `{name}`", "", _inline(found.summary), ""]
        lines += _dataclass_rows(found.options)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _entry(title: str, thing: Any, level: str) -> Iterator[str]:
    yield from (f"{level} `{title}`", "")
    is_class = inspect.isclass(thing)
    plain = is_class and not dataclasses.is_dataclass(thing) and thing.__init__ is object.__init__
    if not (plain or (is_class and issubclass(thing, Exception | dict))) and title.rpartition(".")[2] != "PeftModel":
        yield from ("```text", _signature(title.rpartition(".")[2], thing), "```", "")
    yield from _markdown(inspect.getdoc(thing) or "")
    if not is_class:
        return
    for name, member in vars(thing).items():
        if name.startswith("_") or name == "from_upgraded":
            continue
        target = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(target, property):
            yield f"- `{name}` (property): {_first(target.fget)}"
        elif inspect.isfunction(target):
            told = " ".join(_signature(name, target).split()).replace("( ", "(").replace(", )", ")")
            yield f"- `{told}`: {_first(target)}"
    yield ""


def _first(function: Any) -> str:
    text = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return _inline(" ".join(text.split()))


def _signature(name: str, thing: Any) -> str:
    """Return the call on one line if it fits, else with a line a parameter; annotations as they stand in the source."""
    target = thing.__init__ if inspect.isclass(thing) else thing
    words, starred = [], False
    for parameter in inspect.signature(target).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words, starred = [*words, "*"], True
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        words.append(_parameter(parameter))
    line = f"{name}({', '.join(words)})"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {word}," for word in words), ")"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{kind}"
    return f"{stars}{parameter.name}{kind} = {_default(parameter.default)}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__name__
    return "..." if "factory" in repr(value) else repr(value)


def _dataclass_rows(options: Any) -> Iterator[str]:
    docs = [inspect.getdoc(kind) or "" for kind in reversed(options.__mro__) if dataclasses.is_dataclass(kind)]
    told = dict(pair for doc in docs for pair in _attributes(doc))
    rows = dataclasses.fields(options)
    if not rows:
        yield from ("No options.", "")
        return
    yield from ("| option | default | |", "|---|---|---|")
    for field in rows:
        factory = field.default_factory
        default = factory() if callable(factory) else field.default
        yield f"| `{field.name}` | `{default}` | {_inline(told.get(field.name, ''), cell=True)} |"
    yield ""


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    inside, name, words = False, "", []
    for line in [*doc.splitlines(), "End:"]:
        entry = re.match(r"^    (\w+): (.*)$", line)
        if name and (entry or not line.startswith("     ")):
            yield name, " ".join(words)
            name = ""
        if SECTION.match(line) or line == "End:":
            inside = line == "Attributes:"
        elif inside and entry:
            name, words = entry[1], [entry[2]]
        elif name:
            words.append(line.strip())


def _markdown(doc: str) -> Iterator[str]:
    """Turn a docstring in google's style into Markdown: sections become lists."""
    section, literal = "", False
    for line in doc.splitlines():
        if SECTION.match(line):
            section, literal = line[:-1], False
            yield from (f"**{section}**", "")
        elif section and (entry := re.match(r"^    ([\w, .*]+?): (.*)$", line)) and section != "Returns":
            yield f"- `{entry[1]}`: {_inline(entry[2])}"
        elif section and line.startswith("    "):
            yield _inline(line.strip()) if section in ("Returns", "Yields") else f"  {_inline(line.strip())}"
        elif literal and line.startswith("    "):
            yield line
        else:
            section = "" if line.strip() else section
            literal = line.endswith("::") or (literal and not line.strip())
            yield _inline(line.replace("::", ":"))
    yield ""


def _inline(text: str, *, cell: bool = False) -> str:
    """Write code marks as Markdown does, and, in a table's cell, bars."""
    plain = re.sub(r"``([^`]+)``", r"`\1`", text)
    return plain.replace("|", r"\|") if cell else plain


if __name__ == "__main__":
    target = Path(__file__).parent / "api.md"
    target.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"wrote {target.name}\n")

"""Ask the bare backbone, the upgraded adapter and, if wanted, the old pair the same thing; answers side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.loading import adapter_folder, add_adapter
from ..adapters.reading import base_model_of
from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone
from ..models.generation import answer
from ..text.examples import Example, format_example
from ..text.templates import check_template, check_text

LEAST = 24
"""Characters of a column below which answers are set one under the other."""
GAP = " | "


@dataclass(frozen=True)
class Speaker:
    """Someone who answers.

    Attributes:
        name: Heading of the column.
        model: The model.
        backbone: Its backbone, for the tokenizer.
        bare: Whether the adapter is switched off while it answers.
    """

    name: str
    model: Any
    backbone: Backbone
    bare: bool = False

    @torch.inference_mode()
    def answer(self, prompt: str, length: int) -> str:
        """Answer greedily with at most ``length`` tokens."""
        off: AbstractContextManager[Any] = self.model.disable_adapter() if self.bare else nullcontext()
        with off:
            (turn,) = answer(self.model, self.backbone, [prompt], length=length)
        return turn.response.strip()


def speakers(
    base: Any,
    adapter: str,
    *,
    revision: str | None = None,
    old_base: Any = None,
    old_adapter: str | None = None,
    old_revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
) -> list[Speaker]:
    """Load the models: one of the new backbone for both its columns, and one of the old pair.

    Args:
        base: The new backbone: folder, Hub id or `Backbone`.
        adapter: The upgraded adapter: folder or Hub id.
        revision: Its revision on the Hub.
        old_base: The old backbone; by default the one that the old adapter's config names.
        old_adapter: The old adapter; without it there is no third column.
        old_revision: Its revision on the Hub.
        dtype: In which the models run.
        device_map: As in transformers.

    Raises:
        LoraSuiteError: When a place holds no adapter, or a model cannot be loaded.
    """
    if old_base is not None and old_adapter is None:
        raise LoraSuiteError("an old backbone without its adapter says nothing", do="name the old adapter (--old)")
    new = Backbone.open(base)
    model = _adapted(new, adapter, revision, dtype, device_map)
    found = [Speaker("base", model, new, bare=True), Speaker("upgraded", model, new)]
    if old_adapter is not None:
        old = old_base if old_base is not None else _named_base(old_adapter, old_revision)
        old = Backbone.open(old)
        found.append(Speaker("old + adapter", _adapted(old, old_adapter, old_revision, dtype, device_map), old))
    return found


def ask(found: Sequence[Speaker], text: str, *, template: str | None = None, length: int = 128) -> dict[str, str]:
    """Put one question to everyone.

    Args:
        found: Who answers.
        text: The question.
        template: Prompt with ``{instruction}``; without one the text is the prompt.
        length: Tokens of an answer at most.

    Returns:
        Name of the column -> answer.
    """
    check_text(text, "the question")
    prompt = text if template is None else format_example(Example(text), template)
    return {speaker.name: speaker.answer(prompt, length) for speaker in found}


def side_by_side(answers: Mapping[str, str], width: int) -> str:
    """Set answers out in columns of a terminal, or one under the other where it is too narrow for columns.

    Args:
        answers: Heading -> text; what a terminal would obey (control characters) is shown as a dot.
        width: Of the terminal, in characters.
    """
    columns = (width - len(GAP) * (len(answers) - 1)) // max(len(answers), 1)
    if columns < LEAST:
        blocks = [[f"[{name}]", *_wrapped(text, max(width, 1))] for name, text in answers.items()]
        return "\n\n".join("\n".join(block) for block in blocks)
    cells = [[name, "-" * columns, *_wrapped(text, columns)] for name, text in answers.items()]
    height = max(len(cell) for cell in cells)
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return "\n".join(GAP.join(_padded(text, columns) for text in row).rstrip() for row in rows)


def check_chat(template: str | None, length: int, prompt: str | None = None) -> None:
    """Refuse a template without a place for the question, or a question that is no text, before a model is loaded."""
    if prompt is not None:
        check_text(prompt, "--prompt")
    if template is not None:
        check_template(template)
    if length < 1:
        raise LoraSuiteError("an answer needs at least one token", got=length)


def _adapted(backbone: Backbone, adapter: str, revision: str | None, dtype: Any, device_map: Any) -> Any:
    """Load a backbone with an adapter through PEFT's own loader, as production would."""
    source = Source(str(adapter), "adapter", revision)
    folder = adapter_folder(source)
    model = backbone.load(dtype=dtype, device_map=device_map)
    return add_adapter(model, folder, source, base=repr(backbone)).eval()


def _named_base(adapter: str, revision: str | None) -> Backbone:
    source = Source(str(adapter), "adapter", revision)
    name, own = base_model_of(source, do="name it (--old-base)")
    return Backbone.open(name, revision=own, hub_only=source.folder is None)


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` terminal cells, at spaces where there are any."""
    return [line for paragraph in text.split("\n") for line in _lines(_shown(paragraph), width)]


def _lines(paragraph: str, width: int) -> Iterator[str]:
    line = ""
    for word in paragraph.split(" "):
        joined = f"{line} {word}" if line else word
        if _cells(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        line = word
        while _cells(line) > width:
            count = next(end for end in range(len(line), 0, -1) if _cells(line[:end]) <= width or end == 1)
            yield line[:count]
            line = line[count:]
    yield line


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " if letter == "\t" else "·" for letter in text)


def _cells(text: str) -> int:
    """Terminal cells of a text: wide letters take two, marks on other letters none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))

"""Asking the new backbone, the upgraded adapter and the old adapter the same question, and showing their answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.chat_template import read_chat_template
from ..adapters.loading import adapter_folder, add_adapter, old_backbone_loader
from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone
from ..models.extended import ExtendedBackbone, TableRows
from ..models.generation import Turn, answer, fits_context
from ..text.chat import NO_TEMPLATE, OLD_TEMPLATE, Chat
from ..text.chat_options import ChatOptions
from ..text.conversations import ASSISTANT, USER, Conversation, Message
from ..text.examples import Example, format_example
from ..text.templates import check_template, check_text

MIN_COLUMN = 24
"""Smallest width of a column in characters; on a narrower terminal answers are shown one below the other."""
SEPARATOR = " | "


@dataclass(frozen=True)
class ChatModel:
    """A model that answers.

    Attributes:
        name: Heading of its column.
        model: The PEFT model.
        backbone: Its backbone, for the tokenizer.
        disable_adapter: Whether it answers without its adapter.
        chat: Renders the conversation by a chat template; without one a question is the whole prompt.
        history: The earlier turns of the conversation with this model.
    """

    name: str
    model: Any
    backbone: Backbone
    disable_adapter: bool = False
    chat: Chat | None = None
    history: list[Message] = field(default_factory=list)

    @torch.inference_mode()
    def answer(self, prompt: str, length: int) -> str:
        """Answer by greedy decoding, with at most ``length`` tokens, without regard to earlier turns."""
        return self._generate(prompt, length, ()).response.strip()

    @torch.inference_mode()
    def reply(self, question: str, length: int) -> str:
        """Answer a user turn of the conversation with this model; the oldest turns that do not fit are left out."""
        if self.chat is None:
            return self.answer(question, length)
        user = {"role": USER, "content": question}
        while True:
            talk = Conversation((*self.history, user), where="the question")
            prompt = self.chat.write(talk)
            if not self.history or fits_context(self.backbone, prompt, length):
                break
            del self.history[:2]
        ends = self.chat.turn_ends(talk)
        turn = self._generate(prompt, length, () if ends is None else (ends.end,))
        text = turn.response.strip()
        self.history.extend([user, {"role": ASSISTANT, "content": text}])
        return text

    def _generate(self, prompt: str, length: int, stops: Collection[int]) -> Turn:
        context: AbstractContextManager[Any] = self.model.disable_adapter() if self.disable_adapter else nullcontext()
        with context:
            (turn,) = answer(self.model, self.backbone, [prompt], length=length, stops=stops)
        return turn


def load_models(
    base: Any | None,
    adapter: str,
    *,
    revision: str | None = None,
    old_base: Any = None,
    old_adapter: str | None = None,
    old_revision: str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    chat: ChatOptions | None = None,
    access: Mapping[str, Any] | None = None,
) -> list[ChatModel]:
    """Load the new backbone with the upgraded adapter, for two columns, and the old backbone with the old adapter.

    Args:
        base: The new backbone: folder, Hub id or `Backbone`; by default the base model of the adapter's config.
        adapter: Folder or Hub id of the upgraded adapter.
        revision: Revision of the upgraded adapter on the Hub.
        old_base: The old backbone; by default the base model of the old adapter's config.
        old_adapter: The old adapter; without it there is no third column.
        old_revision: Revision of the old adapter on the Hub.
        dtype: Dtype of the models.
        device_map: As in transformers.
        chat: How conversations are rendered; by default each adapter's own template is used, else its backbone's.
        access: Keyword arguments of `Backbone.open` for both backbones.

    Raises:
        LoraSuiteError: If a folder or repository has no adapter, or a model cannot be loaded.
    """
    if old_base is not None and old_adapter is None:
        raise LoraSuiteError("the old backbone is of no use without its adapter", where="--old-base", do="add --old")
    source = Source(str(adapter), "adapter", revision)
    new = old_backbone_loader(source, base, None, dict(access or {}), do="pass it (--base)")()
    model, extended = _load_with_adapter(new, adapter, revision, dtype, device_map)
    options = chat or ChatOptions()
    own = _template(options.new_template, adapter, revision)
    models = [
        ChatModel("base", model, new, disable_adapter=True, chat=_chat(new, own, options)),
        ChatModel("upgraded", model, extended, chat=_chat(extended, own, options)),
    ]
    if old_adapter is not None:
        source = Source(str(old_adapter), "adapter", old_revision)
        old = old_backbone_loader(source, old_base, None, dict(access or {}), do="pass it (--old-base)")()
        old_model, old = _load_with_adapter(old, old_adapter, old_revision, dtype, device_map)
        own = _template(options.old_template, old_adapter, old_revision)
        models.append(ChatModel("old + adapter", old_model, old, chat=_chat(old, own, options)))
    return models


def _template(given: Any, adapter: str, revision: str | None) -> str | None:
    """Return the template that was given, else that beside the adapter; None for the backbone's own."""
    if given not in (None, OLD_TEMPLATE):
        return str(given)
    return read_chat_template(Source(str(adapter), "adapter", revision))


def _chat(backbone: Any, template: str | None, options: ChatOptions) -> Chat | None:
    """Return how a model's conversations are rendered; None where there is no template."""
    if template == NO_TEMPLATE or (template is None and not backbone.tokenizer.chat_template):
        return None
    return Chat(repr(backbone), backbone.tokenizer, template, dict(options.template_kwargs), options.system)


def ask(models: Sequence[ChatModel], text: str, *, template: str | None = None, length: int = 128) -> dict[str, str]:
    """Ask all models one question.

    Args:
        models: The models.
        text: The question.
        template: Prompt template with ``{instruction}``; without one the question is the next turn of a conversation,
            or the prompt of a model without a chat template.
        length: Maximum number of tokens of an answer.

    Returns:
        Heading of the column -> answer.
    """
    check_text(text, "the question")
    if template is None:
        return {model.name: model.reply(text, length) for model in models}
    prompt = format_example(Example(text), template)
    return {model.name: model.answer(prompt, length) for model in models}


def format_columns(answers: Mapping[str, str], width: int) -> str:
    """Format answers in columns, or one below the other if the terminal is too narrow.

    Args:
        answers: Heading -> text; control characters, which a terminal would obey, become dots.
        width: Width of the terminal in characters.
    """
    column = (width - len(SEPARATOR) * (len(answers) - 1)) // max(len(answers), 1)
    if column < MIN_COLUMN:
        blocks = [[f"[{name}]", *_wrap(text, max(width, 1))] for name, text in answers.items()]
        return "\n\n".join("\n".join(block) for block in blocks)
    cells = [[name, "-" * column, *_wrap(text, column)] for name, text in answers.items()]
    height = max(len(cell) for cell in cells)
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return "\n".join(SEPARATOR.join(_pad(text, column) for text in row).rstrip() for row in rows)


def check_chat(template: str | None, length: int, prompt: str | None = None) -> None:
    """Check template, length and question before a model is loaded."""
    if prompt is not None:
        check_text(prompt, "--prompt")
    if template is not None:
        check_template(template)
    if length < 1:
        raise LoraSuiteError("must be at least 1", where="--length", got=length)


def _load_with_adapter(
    backbone: Backbone, adapter: str, revision: str | None, dtype: Any, device_map: Any
) -> tuple[Any, Backbone]:
    """Load a backbone with an adapter through PEFT's own loader; return it with the backbone that it became."""
    source = Source(str(adapter), "adapter", revision)
    folder = adapter_folder(source)
    model = backbone.load(dtype=dtype, device_map=device_map)
    adapted = add_adapter(model, folder, source, base=repr(backbone), arch=lambda: backbone.arch).eval()
    rows = len(adapted.get_input_embeddings().weight)
    if adapted.adapter_tokenizer is None and rows == backbone.arch.vocabulary:
        return adapted, backbone
    return adapted, ExtendedBackbone(backbone, adapted.adapter_tokenizer or backbone.tokenizer, TableRows(rows, {}))


def _wrap(text: str, width: int) -> list[str]:
    """Wrap a text at spaces to lines of at most ``width`` terminal cells; longer words are cut."""
    return [
        line
        for paragraph in text.split("\n")
        for line in _wrap_paragraph(_replace_control_characters(paragraph), width)
    ]


def _wrap_paragraph(paragraph: str, width: int) -> Iterator[str]:
    line = ""
    for word in paragraph.split(" "):
        joined = f"{line} {word}" if line else word
        if _cell_count(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        line = word
        while _cell_count(line) > width:
            count = next(end for end in range(len(line), 0, -1) if _cell_count(line[:end]) <= width or end == 1)
            yield line[:count]
            line = line[count:]
    yield line


def _replace_control_characters(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " if letter == "\t" else "·" for letter in text)


def _cell_count(text: str) -> int:
    """Return the number of terminal cells of a text: two for a wide letter, none for a combining mark."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _cell_count(text))

"""Loading of tokenizers, with a check that they can encode a text."""

from __future__ import annotations

import json
import re
from typing import Any

from ..compat import check_tokenizer, tokenizer_error
from ..errors import LoraSuiteError, short_message
from ..io.schema import LOOSE, ListOf, check
from ..io.source import Source

FILES, SAMPLE = ("tokenizer_config.json", "special_tokens_map.json"), "A cat."


def open_tokenizer(source: Source, location: str, *, do: str, where: str | None = None, **options: Any) -> Any:
    """Load a tokenizer with transformers.

    Args:
        source: The folder or repository of the tokenizer.
        location: Its folder or Hub id, as transformers takes it.
        do: What the error advises.
        where: Place for the error message; by default the source.
        options: Keyword arguments of ``AutoTokenizer.from_pretrained``.

    Raises:
        LoraSuiteError: If a file is missing or malformed, or the tokenizer cannot encode a text.
    """
    from transformers import AutoTokenizer

    for name in FILES:
        if source.fetch(name) is not None:
            check_tokenizer(source.read_json(name), where=source.full_name(name))
    _check_added_tokens(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        tokenizer.decode(tokenizer(SAMPLE)["input_ids"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare and panic exceptions for files it cannot read
        if newer := tokenizer_error(error, where=where or repr(source)):
            raise newer from error
        raise LoraSuiteError(
            f"the tokenizer cannot be loaded: {short_message(error)}", where=where or repr(source), do=do
        ) from error
    return tokenizer


def _check_added_tokens(source: Source) -> None:
    """Check the names of options in tokenizer.json, of which the library prints those that it does not know.

    Only this part is parsed: the file can have tens of megabytes.
    """
    path = source.fetch("tokenizer.json")
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    for found in re.finditer(r'"added_tokens"\s*:\s*(?=\[)', text):
        try:
            tokens, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):  # the library says what is wrong
            return
        check(tokens, ListOf(item=LOOSE), where=f"{source.name}/tokenizer.json, added_tokens")

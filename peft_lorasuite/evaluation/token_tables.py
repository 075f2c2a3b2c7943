"""The token tables of a model while lm-evaluation-harness runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..text.vocabulary import check_token_rows


@contextmanager
def checked_tables(model: Any, tokenizer: Any, where: str) -> Iterator[None]:
    """Check every token for a row in the embedding, and leave tables that an adapter wraps as they are.

    The harness ties the weights of a model once more, which fails where an adapter wraps the embedding of a tied model.

    Args:
        model: The loaded model, plain or PEFT.
        tokenizer: Its tokenizer.
        where: Name of the model, for error messages.
    """
    rows = model.config.get_text_config().vocab_size
    check = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: check_token_rows(tokenizer, [int(args[0].max())], rows, where)
    )
    inner = model.get_base_model() if hasattr(model, "peft_config") else None
    if inner is not None:
        vars(inner)["tie_weights"] = lambda *args, **settings: None
    try:
        yield
    finally:
        check.remove()
        if inner is not None:
            del vars(inner)["tie_weights"]

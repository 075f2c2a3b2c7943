"""Every difference between the supported versions of libraries, with the version that no longer has it.

What an installed version cannot do is an error that names the version that can. A branch here can be deleted once the
floor in setup.cfg reaches the version that it names.
"""

from __future__ import annotations

from .calls import (
    body,
    body_name,
    cache_argument,
    check_tokenizer,
    check_vera,
    converts_to_lora,
    mismatched_weights,
    output_cache,
    tokenizer_error,
    training_arguments,
    unsaved_biases,
)
from .configs import current_config, first_version, installed_names, model_type, require_model_type, spell_scaling
from .hub import missing_file_error, resolve_commit, transport_error_type, unreachable_errors
from .versions import has, installed, needs_version, require, version_numbers

__all__ = [
    "body",
    "body_name",
    "cache_argument",
    "check_tokenizer",
    "check_vera",
    "converts_to_lora",
    "current_config",
    "first_version",
    "has",
    "installed",
    "installed_names",
    "mismatched_weights",
    "missing_file_error",
    "model_type",
    "needs_version",
    "output_cache",
    "require",
    "require_model_type",
    "resolve_commit",
    "spell_scaling",
    "tokenizer_error",
    "training_arguments",
    "transport_error_type",
    "unreachable_errors",
    "unsaved_biases",
    "version_numbers",
]

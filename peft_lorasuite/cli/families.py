"""What there is to choose from, told without importing torch: methods with a line each, families with their layout."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from ..arch.registry import architecture, known
from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from .common import Output, add_command

ORDERS = {
    "part head dim": "part after part",
    "head part dim": "head by head",
    "group part dim": "per key/value group",
}


NEVER_GROUPED = ("bloom", "gpt2", "gpt_neox")
"""Families whose configs know no key/value heads; our sample would give them some."""
OURS = "peft_lorasuite.converters."


@dataclass(frozen=True)
class Family:
    """A row of the table of families; ``by config`` where the checkpoint's config decides.

    Attributes:
        model_types: The ``config.model_type`` values, of one converter function and one layout.
        fused: Fused projections and the order of their rows; empty if there are none.
        biased: Parts that have a bias.
        grouped: Whether query heads share key/value heads.
        parts: The parts that an adapter can be carried on.
        positions: ``rotary``, ``alibi`` or ``learned``.
        norm: ``rms`` or ``layer``.
        origin: Where the converter comes from.
    """

    model_types: tuple[str, ...]
    fused: str
    biased: str
    grouped: str
    parts: tuple[str, ...]
    positions: str
    norm: str
    origin: str

    @property
    def tested(self) -> str:
        """What our tests prove of it; nothing for a converter of a third party."""
        return "layers, planted, pairs" if self.origin.startswith(OURS) else "-"


def families() -> list[Family]:
    """Describe every known model type; types with the same converter and layout share a row."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for model_type, origin in known().items():
        rows.setdefault((*_facts(model_type), origin), []).append(model_type)
    return [Family(tuple(types), *facts) for facts, types in rows.items()]


def _facts(model_type: str) -> tuple[Any, ...]:
    """Describe two configs, every switch off and every switch on: what differs is the config's choice."""
    try:
        off, on = (architecture(_config(model_type, switch=switch)) for switch in (False, True))
    except (LoraSuiteError, AttributeError, TypeError, KeyError):  # a plugin that reads what our sample lacks
        return ("by config",) * 3 + ((), "by config", "by config")
    biased = _either(_biased(off), _biased(on))
    groups = [arch.heads.group > 1 and model_type not in NEVER_GROUPED for arch in (off, on)]
    grouped = _either(*("yes" if group else "no" for group in groups))
    positions = off.positions if off.positions == on.positions else f"{off.positions} or {on.positions}"
    return _fused(on), biased, grouped, on.parts, positions, on.norm


def _either(off: str, on: str) -> str:
    return on if off == on else f"{on} by config" if off in ("no", "none") else f"{off}; {on} by config"


def _biased(arch: Architecture) -> str:
    held = [part for site in arch.sites if site.bias for part in site.parts]
    return "all" if len(held) == len(arch.parts) else ", ".join(held) or "none"


def _fused(arch: Architecture) -> str:
    return "; ".join(f"{'+'.join(site.parts)} {ORDERS[site.rows]}" for site in arch.sites if site.fused)


def _config(model_type: str, *, switch: bool) -> Any:
    """Return a small config with the names that any family reads."""
    rope = {"rope_theta": 10000.0}
    values = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "ffn_hidden_size": 64,
        "n_inner": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if switch else None,
        "num_kv_heads": 2 if switch else 4,
        "num_ln_in_parallel_attn": None,
        "head_dim": None,
        "dtype": None,
        "hidden_act": "gelu",
        "hidden_activation": "gelu",
        "activation": "gelu",
        "activation_function": "gelu",
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {**rope, "sliding_attention": rope, "full_attention": rope},
    }
    switches = (
        "alibi",
        "attention_bias",
        "bias",
        "mlp_bias",
        "multi_query",
        "new_decoder_architecture",
        "parallel_attn",
        "qk_layernorm",
        "tie_word_embeddings",
        "use_parallel_residual",
        "use_qkv_bias",
    )
    config = SimpleNamespace(**values, **dict.fromkeys(switches, switch))
    config.text_config = SimpleNamespace(**vars(config))
    return config


def add(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "families", "list the supported model families and the layout of their projections")


def run(args: Namespace) -> Output:
    """List the families."""
    rows = families()
    head = ("model type", "fused", "bias", "grouped heads", "positions", "norm", "tested")
    cells = [
        (", ".join(f.model_types), f.fused or "-", f.biased, f.grouped, f.positions, f.norm, f.tested) for f in rows
    ]
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)
    ]
    foot = (
        "fused: parts that one projection holds, and the order of its rows. by config: the checkpoint decides.\n"
        "tested: layers against the model's own, planted upgrades, every pair of families."
    )
    values = {"families": [{**asdict(row), "tested": row.tested} for row in rows]}
    return values, "\n".join([*lines, "", foot])

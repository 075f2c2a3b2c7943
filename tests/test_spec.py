"""Facts about a family check themselves: what cannot be is refused with what was found and what would fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pico import PICO, pico_config

from peft_lorasuite import Architecture, Heads, LoraSuiteError, Site, architecture
from peft_lorasuite.arch.layout import head_rows


@pytest.mark.parametrize("model_type", sorted(PICO))
def test_an_architecture_survives_json(model_type):
    arch = architecture(pico_config(model_type))
    assert Architecture.from_dict(arch.to_dict()) == arch


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Heads(6, 4, 8), "head counts do not fit together .got 6 query heads, 4 key/value heads of 8"),
        (lambda: Heads(0, 1, 8), "head counts do not fit together"),
        (lambda: Heads.of(SimpleNamespace(num_attention_heads=5, hidden_size=32)), "no multiple of the head count"),
        (lambda: Site("attn.qkv", ("q", "k", "v"), rows="dim head part"), "attn.qkv: unknown fused layout"),
        (lambda: Site("mlp.gate_up", ("gate", "up"), rows="head part dim"), "only a fused q, k, v has rows ordered"),
        (lambda: Site("attn.q", ("q", "q")), "no, doubled or unknown parts"),
        (lambda: Site("attn.x", ("x",)), "no, doubled or unknown parts"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(LoraSuiteError, match=message):
        build()


def test_rows_by_head_need_a_key_for_every_query():
    values = architecture(pico_config("llama")).to_dict()
    fused = {**values["sites"][0], "parts": ("q", "k", "v"), "rows": "head part dim", "path": "attn.qkv"}
    arch = Architecture.from_dict({**values, "sites": (fused, *values["sites"][3:])})
    with pytest.raises(LoraSuiteError, match=r"as many key/value heads as query heads .got 4 query and 2 key/value"):
        head_rows(arch.site("q"), arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "a size is not positive"),
        ({"rope_thetas": (1.0, 2.0)}, "the rotary bases fit no layer count"),
        ({"colour": "red"}, "other fields than this version knows .got .'colour'.."),
    ],
)
def test_a_record_that_does_not_hold_together_is_refused(change, message):
    with pytest.raises(LoraSuiteError, match=message):
        Architecture.from_dict({**architecture(pico_config("llama")).to_dict(), **change})

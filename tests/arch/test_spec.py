"""The records of `arch.spec`: JSON, and errors for values that cannot be right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pico import PICO, pico_config, pico_model

from peft_lorasuite import Architecture, Heads, LoraSuiteError, Site, architecture
from peft_lorasuite.arch.layout import head_rows

POSITIONS = ("wpe.weight", "embed_positions.weight")


@pytest.mark.parametrize("model_type", sorted(PICO))
def test_an_architecture_survives_json(model_type):
    arch = architecture(pico_config(model_type))
    assert Architecture.from_dict(arch.to_dict()) == arch


@pytest.mark.parametrize("model_type", sorted(set(PICO) - {"gemma3"}))  # gemma3 also has a vision model
def test_parameter_count_is_that_of_the_models_matrices(model_type):
    names = dict(pico_model(model_type).named_parameters())
    shapes = [weight.shape for name, weight in names.items() if weight.ndim == 2 and not name.endswith(POSITIONS)]
    assert architecture(pico_config(model_type)).parameter_count() == sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Heads(6, 4, 8), "inconsistent attention heads .got 6 query heads, 4 key/value heads of 8"),
        (lambda: Heads(0, 1, 8), "inconsistent attention heads"),
        (
            lambda: Heads.of(SimpleNamespace(num_attention_heads=5, hidden_size=32)),
            "must be a multiple of the number of heads",
        ),
        (lambda: Site("attn.qkv", ("q", "k", "v"), rows="dim head part"), "attn.qkv: unknown order of rows"),
        (
            lambda: Site("mlp.gate_up", ("gate", "up"), rows="head part dim"),
            "mlp.gate_up: this order of rows needs a fused projection of heads",
        ),
        (lambda: Site("attn.q", ("q", "q")), "attn.q: invalid parts of a site"),
        (lambda: Site("attn.x", ("q", "x")), "attn.x: invalid parts of a site"),
        (lambda: Site("attn.none", ()), "attn.none: invalid parts of a site"),
    ],
)
def test_an_invalid_value_is_an_error(build, message):
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
        ({"hidden": 0}, "sizes must be positive"),
        ({"rope_thetas": (1.0, 2.0)}, "wrong number of rotary bases .got 2, wanted 1 or 3"),
        ({"color": "red"}, "unknown or missing fields in an architecture record .got .'color'.."),
    ],
)
def test_an_invalid_record_is_an_error(change, message):
    with pytest.raises(LoraSuiteError, match=message):
        Architecture.from_dict({**architecture(pico_config("llama")).to_dict(), **change})

"""Regular expressions of adapter configs: those that take very long to match are refused, all others are not."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
from command_fixtures import Pair, refused
from patience import limit

from peft_lorasuite.io.patterns import find_fault

pair = command_fixtures.pair

SLOW = [
    "(.*)*(.*)*x", "(a+)+$", "(x+x+)+y", "(a|a)*b", "(a|ab)*c", "(a?){25}a{25}", "(.+)+\\.q_proj", "((a*)*)*b",
    "(?:[a-z_.]+)*x", ".*.*.*.*.*.*.*.*x", "(\\w+\\.?)+\\d", "(.*?,){25}x", "a?" * 40 + "a" * 40, "(.*)\\1*x",
    "(a|aa)" * 40 + "b", "(?=(.*)*x).*", "(?P<a>x*)*(?P=a)y", "(.{1,50}){1,50}x", "[" + "a" * 30_000 + "]",
]  # fmt: skip
REAL = [
    "q_proj", "model.layers.0.self_attn.q_proj", r".*\.(q_proj|v_proj)", r".*self_attn.*(q|k|v|o)_proj$",
    r"^(?!.*(?:vision|patch_embed)).*(?:up_proj|down_proj).*", r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
    r".*q_proj|.*v_proj", r"\d+|\w+", r".*(?:q|k)_proj|.*mlp1\.[13]",
    r"(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(custom_text_proj).*$)",
    r"^(language_model|aligner)(?!.*(lm_head|output|emb|wte|shared)).*", r"layers\.(1|2|10|11|20)\.self_attn\.\w+_proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_e_a_pattern_that_backtracks_for_minutes(pattern: str) -> None:
    start = time.perf_counter()
    assert find_fault([pattern])
    assert time.perf_counter() - start < limit(0.5)


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_as_people_write_them_are_accepted(pattern: str) -> None:
    assert find_fault([pattern]) is None
    re.compile(pattern)


def test_many_patterns_share_one_limit() -> None:
    assert find_fault([f"layers.{number}.q_proj" for number in range(10_000)]) is None
    assert find_fault([f".*{number}.*.*.*x" for number in range(1000)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", "(.*)*(.*)*x"), ("exclude_modules", "(.*)*(.*)*x"), ("alpha_pattern", {"(.*)*(.*)*x": 8}),
        ("rank_pattern", {"(.*)*(.*)*x": 4}), ("modules_to_save", ["(.*)*(.*)*x"]), ("layers_pattern", "(.*)*(.*)*x"),
    ],
)  # fmt: skip
def test_e_a_config_with_a_slow_pattern(
    name: str, value: Any, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT matches these entries, so the config is refused before PEFT reads it, by every command."""
    folder = Path(shutil.copytree(pair.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    out = tmp_path / "place" / "out"
    for call in (
        ["upgrade", folder, "--to", pair.new, "--map", pair.map, "-o", out],
        ["finetune", folder, "--data", pair.data, "-o", out],
    ):
        info = refused(tmp_path, capsys, *call)
        assert f"adapter_config.json, {name}" in info
        assert "the pattern can take very long to match" in info

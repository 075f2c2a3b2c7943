"""What `check` says of adapters as PEFT saves them, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
from command_fixtures import Pair
from served import adapter, backbone

from peft_lorasuite import LoraSuiteError, check
from peft_lorasuite.adapters.peft_format import CONFIG
from peft_lorasuite.cli.main import main

pair = command_fixtures.pair
FOUND = [
    ("vllm", "dora", "refused", "self_attn.q_proj.lora_magnitude_vector"),
    ("vllm", "adalora", "refused", "mlp.down_proj.lora_A"),
    ("vllm", "lora bias", "refused", "self_attn.q_proj.lora_B.bias"),
    ("vllm", "tokens", "refused", "embed_tokens.token_adapter.trainable_tokens_delta"),
    ("vllm", "full table", "refused", "lm_head.weight"),
    ("vllm", "loha", "refused", "hada_w1_a"),
    ("sglang", "tokens", "dropped", "embed_tokens.token_adapter.trainable_tokens_delta"),
    ("sglang", "rslora", "dropped", "use_rslora True"),
    ("sglang", "ranks", "refused", "self_attn.q_proj of rank 9, r 2"),
    ("lorax", "dora", "dropped", "self_attn.q_proj.lora_magnitude_vector"),
    ("tgi", "lora", "refused", "lora_bias False"),
    ("llama.cpp", "ranks", "dropped", "alpha_pattern of q_proj"),
    ("mlx", "lora", "refused", "adapter_model.safetensors"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("served") / "base")


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(("engine", "kind", "effect", "name"), FOUND)
def test_what_is_refused_or_dropped_is_named(engine, kind, effect, name, base, tmp_path) -> None:
    checked = check(adapter(tmp_path, base, kind), engine=engine)
    assert not checked.passed
    assert any(name in shown for finding in checked.findings if finding.effect == effect for shown in finding.names)
    assert not checked.start


@pytest.mark.parametrize(("engine", "kind"), [("vllm", "ranks"), ("vllm", "rslora"), ("llama.cpp", "one layer")])
def test_what_is_loaded_as_it_is_passes(engine, kind, base, tmp_path) -> None:
    assert check(adapter(tmp_path, base, kind), engine=engine).passed


def test_a_backbone_that_it_does_not_fit_is_found(base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, "lora")
    other = backbone(tmp_path / "other", num_hidden_layers=2)
    checked = check(source, engine="vllm", base=other)
    assert "model.layers.2.mlp.down_proj.lora_A.weight of (4, 48)" in str(checked)


def test_without_the_backbone_only_rules_that_depend_on_it_fail(base, tmp_path) -> None:
    source = adapter(tmp_path, base, "lora")
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert check(source, engine="vllm").passed
    with pytest.raises(LoraSuiteError, match="not found"):
        check(source, engine="lorax")


def test_an_unknown_engine_is_named(base, tmp_path) -> None:
    with pytest.raises(LoraSuiteError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        check(adapter(tmp_path, base, "lora"), engine="vlm")


def test_the_commands(base, tmp_path, capsys) -> None:
    source = adapter(tmp_path / "adapter", base, "one layer")
    assert run("check", source, "--for", "tgi", "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert run("export", source, "--for", "tgi", "-o", tmp_path / "out") == 0
    assert "TGI (as of 2025) loads it whole" in capsys.readouterr().out
    assert run("check", tmp_path / "out", "--for", "tgi") == 0
    assert f"--lora-adapters out={tmp_path / 'out'}" in capsys.readouterr().out
    assert run("export", source, "--for", "tgi", "-o", tmp_path / "out") == 1
    assert "is not empty" in capsys.readouterr().err


def test_an_upgrade_is_written_for_a_program(pair: Pair, tmp_path, capsys) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--method", "lorasuite"]
    assert run(*call, "--for", "lorax", "--base-model", "org/new", "-o", tmp_path / "out", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["check"]["passed"]
    assert values["check"]["facts"]["modules"] == 3 * 4
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/new"
    assert (tmp_path / "out" / "lorasuite_report.json").is_file()
    assert run(*call, "--save-dtype", "float16", "--base-model", "org/new", "-q", "-o", tmp_path / "plain") == 0
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["base_model_name_or_path"] == "org/new"
    whole, half = ((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("out", "plain"))
    assert half < 0.6 * whole


def test_a_push_of_mlx_files_is_refused_before_the_work(pair: Pair, tmp_path, capsys) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--for", "mlx", "-o", tmp_path / "out"]
    assert run(*call, "--push", "me/lora", "--base-model", "org/new") == 1
    assert "--for mlx and --push" in capsys.readouterr().err

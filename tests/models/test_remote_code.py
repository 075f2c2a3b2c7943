"""A backbone whose model is code of its repository: nothing runs without leave, and every command passes it on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from command_fixtures import WORDS, Pair
from pico import pico_model, pico_tokenizer, save_backbone
from transformers import AutoModelForCausalLM, dynamic_module_utils

from peft_lorasuite import Backbone, LoraSuiteError, PeftModel
from peft_lorasuite.cli.main import main

pair = command_fixtures.pair
CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

with (Path({place!r}) / "ran").open("a") as log:
    log.write("ran")


class OwletConfig(LlamaConfig):
    model_type = "owlet"


class OwletForCausalLM(LlamaForCausalLM):
    config_class = OwletConfig
"""


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep transformers from copying the code to the home folder."""
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        patch.setattr(sys, "path", [*sys.path, place])
        yield


@pytest.fixture(scope="module")
def owlet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the backbone; its code leaves a file beside it."""
    home = tmp_path_factory.mktemp("owlet")
    folder = save_backbone(home / "base", pico_model("llama", 3, max_position_embeddings=512), pico_tokenizer(WORDS))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwletConfig", "AutoModelForCausalLM": "own.OwletForCausalLM"}
    config |= {"model_type": "owlet", "architectures": ["OwletForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(place=str(home)))
    return folder


@pytest.fixture(scope="module")
def lora(owlet: Path) -> Path:
    """An adapter of it, with an effect."""
    model = peft.get_peft_model(pico_model("llama", 3), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.peft_config["default"].base_model_name_or_path = str(owlet)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(owlet.parent / "lora", save_embedding_layers=False)
    return owlet.parent / "lora"


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def calls(lora: Path, owlet: Path, pair: Pair, out: Path) -> list[tuple[Any, ...]]:
    """Commands that load the backbone."""
    small = ("--prompts", pair.data, "--set", "length=4")
    return [
        ("finetune", lora, "--data", pair.data, "-o", out / "tuned"),
        ("chat", "--adapter", lora, "--prompt", "the red", "--length", 4),
        ("upgrade", lora, "--to", pair.new, "--method", "transplant", "-o", out / "to", *small),
        ("upgrade", pair.adapter, "--to", owlet, "--method", "distill", "-o", out / "from", *small),
        ("families", owlet),
    ]


def test_code_runs_only_with_leave(
    lora: Path, owlet: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in calls(lora, owlet, pair, tmp_path):
        assert run(*words) == 1, words
        error = capsys.readouterr().err.splitlines()[-1]
        assert "'owlet'" in error
        assert "--trust-remote-code" in error
    with pytest.raises(LoraSuiteError, match="runs only if you trust it"):
        PeftModel.from_upgraded(pair.new, lora)
    assert not (owlet.parent / "ran").exists()
    assert not list(tmp_path.iterdir())


def test_every_command_passes_the_leave_on(
    lora: Path, owlet: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in calls(lora, owlet, pair, tmp_path):
        assert run(*words, "--trust-remote-code") == 0, capsys.readouterr().err
    assert (owlet.parent / "ran").exists()
    printed = capsys.readouterr().out
    assert "not measured; transplant and distill run the model" in printed
    assert "upgraded" in printed
    base = AutoModelForCausalLM.from_pretrained(owlet, trust_remote_code=True)
    for name in ("tuned", "from"):
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / name))
        loaded.unload()
    assert Backbone.open(str(owlet), trust_remote_code=True).arch.layers == 3


def test_evaluate_passes_the_leave_on(
    lora: Path, owlet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    items = [{"instruction": f"the {word}? Answer format: true/false", "answer": "true"} for word in WORDS[:2]]
    (tmp_path / "boolq_test.json").write_text(json.dumps([one | {"input": "", "output": ""} for one in items]))
    words = ("--suite", "boolq", "--data", tmp_path, "--scoring", "likelihood")
    assert run("evaluate", lora, *words) == 1
    assert run("evaluate", owlet, "--adapter", lora, "--trust-remote-code", *words) == 0
    assert "BoolQ" in capsys.readouterr().out


def test_a_failure_of_the_code_is_one_line(owlet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in owlet.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "own.py").write_text("raise ValueError('no such luck')\n")
    with pytest.raises(LoraSuiteError, match=r"cannot read the config: .*no such luck"):
        Backbone.open(str(folder), trust_remote_code=True).arch  # noqa: B018

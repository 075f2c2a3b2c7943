"""Base models as configs of adapters name them: quantized, on another machine, or none (D14)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
from command_fixtures import Pair, refused
from hub_fixtures import ask_client
from hub_server import HubServer
from pico import pico_model

from peft_lorasuite import LoraSuiteError, PeftModel, upgrade
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.models.quantized import quantization, unquantized_name

pair = command_fixtures.pair
NAMES = {
    "unsloth/llama-3-8b-bnb-4bit": "unsloth/llama-3-8b",
    "unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit": "unsloth/Qwen2.5-7B-Instruct",
    "unsloth/mistral-7b-v0.3-bnb-4bit/": "unsloth/mistral-7b-v0.3",
    "TheBloke/Llama-2-7B-GPTQ": "TheBloke/Llama-2-7B",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct-AWQ": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-8B-FP8": "Qwen/Qwen3-8B",
    "org/model-quantized.w8a8": None,
    "meta-llama/Llama-3.1-8B": None,
    "org/awq": None,
    "-4bit": None,
}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("name", NAMES)
def test_d14_the_unquantized_checkpoint_of_a_quantized_name(name: str) -> None:
    assert unquantized_name(name) == NAMES[name]


METHODS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    (BNB, "bitsandbytes"),
    ({"quant_method": "gguf"}, None),
    ({"quant_method": "fp8", "dequantize": True}, None),
    ({"bits": 4}, "unknown"),
]


@pytest.mark.parametrize(("values", "method"), METHODS)
def test_a_quantization_config_says_whether_the_weights_are_plain(values: dict[str, Any], method: str | None) -> None:
    config = pico_model("llama").config
    config.quantization_config = values
    assert quantization(config) == method


def with_base(pair: Pair, folder: Path, base: str | None) -> Path:
    """Copy the adapter with another base model in its config."""
    shutil.copytree(pair.adapter, folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": base}))
    return folder


def quantized(folder: Path, pair: Pair) -> Path:
    """Copy the old backbone with the config of a checkpoint that bitsandbytes quantized."""
    shutil.copytree(pair.old, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": BNB}))
    return folder


def test_d14_a_quantized_base_names_the_checkpoint_to_pass(pair: Pair, tmp_path: Path, capsys: Any) -> None:
    base = quantized(tmp_path / "llama-3-8b-bnb-4bit", pair)
    adapter = with_base(pair, tmp_path / "adapter", str(base))
    error = refused(tmp_path, capsys, "upgrade", adapter, "--to", pair.new, "-o", tmp_path / "place" / "out")
    assert "the weights are quantized (got bitsandbytes)" in error
    assert f"probably {tmp_path}/llama-3-8b (old: --from, source_model=" in error


def test_d14_the_unquantized_checkpoint_is_the_base_of_a_quantized_one(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = with_base(pair, tmp_path / "adapter", "unsloth/old-bnb-4bit")
    upgraded = upgrade(adapter, pair.map, method="lorasuite", old=pair.old)
    assert "named_base" not in upgraded.report.facts
    assert "make sure that they are the same" not in caplog.text


def test_d14_a_quantized_model_without_its_packages_says_what_else_to_pass(pair: Pair, tmp_path: Path) -> None:
    base = quantized(tmp_path / "old-GPTQ", pair)
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        LoraSuiteError, match=r"the model cannot be loaded: .*; install the packages .*probably .*/old "
    ):
        Backbone.open(base).load()


def test_d14_a_base_on_another_machine_or_none_mentions_from(pair: Pair, tmp_path: Path, capsys: Any) -> None:
    wanted = {
        "/home/else/models/llama": "backbone not found; it is the base model in the config of",
        "./outputs/merged": "backbone not found; it is the base model in the config of",
        None: "the adapter's config has no base_model_name_or_path",
        "": "the adapter's config has no base_model_name_or_path",
    }
    for number, (base, message) in enumerate(wanted.items()):
        adapter = with_base(pair, tmp_path / f"adapter-{number}", base)
        error = refused(tmp_path, capsys, "upgrade", adapter, "--to", pair.new, "-o", tmp_path / "place" / "out")
        assert message in error
        assert "pass the old backbone (--from, source_model=)" in error
        with pytest.raises(LoraSuiteError, match=r"source_model="):
            PeftModel.from_upgraded(pair.new, adapter)
        assert PeftModel.from_upgraded(pair.new, adapter, source_model=pair.old, method="copy").peft_config


def test_d14_a_base_that_the_hub_does_not_have_mentions_from(hub: HubServer, pair: Pair, tmp_path: Path) -> None:
    adapter = with_base(pair, tmp_path / "adapter", "someone/private-base")
    program = """
from peft_lorasuite import LoraSuiteError, PeftModel
import json
try:
    PeftModel.from_upgraded(NEW, LORA)
except LoraSuiteError as error:
    print(json.dumps(str(error)))
"""
    error = ask_client(hub, program, tmp_path / "home", {"NEW": str(pair.new), "LORA": str(adapter)})
    assert "backbone someone/private-base: not found" in error
    assert error.endswith("or pass the old backbone (--from, source_model=)")


def checkpoints(pair: Pair, folder: Path, *, final: bool) -> Path:
    """Write the output folder of a training with the Trainer: checkpoints and, if it ended, the adapter itself."""
    for step in (500, 1000, 1500):
        shutil.copytree(pair.adapter, folder / f"checkpoint-{step}")
    if final:
        shutil.copytree(pair.adapter, folder, dirs_exist_ok=True)
    return folder


def test_d14_checkpoints_of_a_training_are_named(pair: Pair, tmp_path: Path, capsys: Any) -> None:
    folder = checkpoints(pair, tmp_path / "run", final=False)
    call = [
        "upgrade",
        folder,
        "--to",
        pair.new,
        "--map",
        pair.map,
        "--method",
        "copy",
        "-o",
        tmp_path / "place" / "out",
    ]
    error = refused(tmp_path, capsys, *call)
    assert "wanted checkpoint-1500 or checkpoint-1000 or checkpoint-500); select one (--adapter-name" in error
    error = refused(tmp_path, capsys, *call, "--adapter-name", "checkpoint-7")
    assert "has no adapter of that name (got checkpoint-7, wanted checkpoint-1500" in error
    upgrade(folder, pair.map, method="copy", adapter_name="checkpoint-500")


def test_a_checkpoint_beside_the_final_adapter_is_selected_by_its_name(pair: Pair, tmp_path: Path) -> None:
    folder = checkpoints(pair, tmp_path / "run", final=True)
    chosen = upgrade(folder, pair.map, method="copy", adapter_name="checkpoint-1000")
    assert chosen.report.adapter == "checkpoint-1000"
    assert upgrade(folder, pair.map, method="copy").report.adapter == "run"
    with pytest.raises(LoraSuiteError, match=r"has no adapter of that name \(got checkpoint-7, wanted checkpoint-1500"):
        upgrade(folder, pair.map, method="copy", adapter_name="checkpoint-7")

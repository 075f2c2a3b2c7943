"""Flags of the command line beyond the plain calls: plan, sections, kinds, distillation, publishing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_fixtures
import hub_fixtures
import hub_pair
import peft
import pytest
import torch
from command_fixtures import Pair
from hub_fixtures import ask_client
from hub_pair import LORA, NEW, TOOLS
from hub_server import HubServer
from pico import pico_model

from peft_lorasuite.cli.main import main
from peft_lorasuite.hub.card import PICTURES
from peft_lorasuite.mapping.upgrade_map import UpgradeMap

command_pair = command_fixtures.pair
hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return command_pair.__wrapped__(tmp_path_factory)


def test_a_plan_is_printed_and_nothing_is_written(home: Pair, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("map", home.old, home.new, "--plan") == 0
    output = capsys.readouterr().out
    assert "3 layers matched" in output
    assert "lorasuite: the map" in output
    assert run("map", home.old, home.new, "--plan", "--json", "--layer-map", "last") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory"] > 0
    assert not list(tmp_path.iterdir())


def test_a_map_without_output_or_plan_is_a_wrong_call(home: Pair, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run("map", home.old, home.new)
    assert left.value.code == 2
    assert "one of the arguments -o/--output --plan is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--map", ""], "--map: must not be empty"),
        (["--from", " "], "--from: must not be empty"),
        (["--finetune", ""], "--finetune: must not be empty"),
        (["--push", ""], "--push: must not be empty"),
        (["--prompts", ""], "--prompts: must not be empty"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--seed", "4294967296"], "--seed: must be at most 4294967295"),
        (["--rank", "abc"], "--rank: expected an integer, got 'abc'"),
        (["--rank", "0"], "--rank: must be at least 1, got 0"),
    ],
)
def test_an_argument_that_says_nothing_is_a_wrong_call(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run("upgrade", "adapter", "--to", "new", "-o", tmp_path / "out", *words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.replace("argument ", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "inf"], "learning_rate: must be above 0 and at most 1"),
        (["--warmup", "nan"], "warmup: must be a fraction of the steps"),
        (["--batch-size", "4", "--micro-batch-size", "3"], "micro_batch_size: must divide"),
    ],
)
def test_training_that_cannot_run_is_refused_before_anything_is_carried(
    words: list[str], message: str, home: Pair, tmp_path: Path, capsys
) -> None:
    call = ["upgrade", "no/such", "--to", "no/such", "--finetune", home.data, "-o", tmp_path / "out", *words]
    assert run(*call) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_name_that_a_terminal_cannot_show_is_no_failure(words: list[str], home: Pair, tmp_path: Path) -> None:
    call = ["upgrade", home.adapter, "--to", home.new, "--map", home.map, "--method", "copy", "-o", tmp_path / "ü"]
    done = subprocess.run(
        [sys.executable, "-m", "peft_lorasuite", *map(str, call), *words], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "\\xfc" in done.stdout or json.loads(done.stdout)["output"] == str(tmp_path / "ü")


def test_a_map_takes_sections_of_methods(home: Pair, tmp_path: Path, capsys) -> None:
    call = ["map", home.old, home.new, "-o", tmp_path / "map", "--layer-map", "proportional", "--json"]
    assert run(*call, "--methods", " cross-lora ") == 0
    output = json.loads(capsys.readouterr().out)
    kept = UpgradeMap.load(tmp_path / "map").sections
    assert sorted(kept) == sorted(output["sections"])
    assert kept.keys() == {"svd"}
    out = ["upgrade", home.adapter, "--to", home.new, "--map", tmp_path / "map", "-o", tmp_path / "out", "--quiet"]
    assert run(*out, "--method", "cross-lora") == 0


def test_a_map_states_what_each_of_its_files_takes_on_disk(home: Pair, tmp_path: Path, capsys) -> None:
    call = ["map", home.old, home.new, "--layer-map", "proportional", "--methods", "cross-lora"]
    assert run(*call, "-o", tmp_path / "one", "--json") == 0
    output = json.loads(capsys.readouterr().out)["bytes"]
    assert output == {path.stem: path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors")}
    assert run(*call, "-o", tmp_path / "two") == 0
    line = capsys.readouterr().out
    assert all(f"{name} {size / 1e6:.2f} MB" in line for name, size in output.items())
    assert output.keys() == {"core", "svd"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("lorasuite", "the method 'lorasuite' has no section in a map"), ("cross-lorra", "did you mean 'cross-lora'")],
)
def test_a_method_that_keeps_nothing_in_a_map_is_refused(home: Pair, tmp_path: Path, name, message, capsys) -> None:
    assert run("map", home.old, home.new, "-o", tmp_path / "map", "--methods", name) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "map").exists()


def test_a_dora_stays_one_or_becomes_a_lora(home: Pair, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(pico_model("llama"), config)
    model.peft_config["default"].base_model_name_or_path = str(home.old)
    model.save_pretrained(tmp_path / "dora")
    call = ["upgrade", tmp_path / "dora", "--to", home.new, "--map", home.map, "--method", "lorasuite", "--quiet"]
    for kind, dora in (("same", True), ("lora", False)):
        assert run(*call, "--output-type", kind, "-o", tmp_path / kind) == 0
        assert json.loads((tmp_path / kind / "adapter_config.json").read_text())["use_dora"] is dora


def test_one_of_several_adapters_is_chosen_by_name(home: Pair, tmp_path: Path, capsys) -> None:
    (tmp_path / "many" / "mine").mkdir(parents=True)
    for file in home.adapter.iterdir():
        (tmp_path / "many" / "mine" / file.name).write_bytes(file.read_bytes())
    call = ["upgrade", tmp_path / "many", "--to", home.new, "--map", home.map, "--method", "lorasuite", "--quiet"]
    assert run(*call, "-o", tmp_path / "out") == 1
    assert "wanted mine" in capsys.readouterr().err
    assert run(*call, "--adapter-name", "mine", "-o", tmp_path / "out") == 0


def test_distill_is_upgrade_by_that_method(home: Pair, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("the red cat\nthe blue dog\nthe bird and the\n")
    call = ["distill", home.adapter, "--to", home.new, "--map", home.map, "--prompts", tmp_path / "prompts.txt"]
    small = ["--set", "epochs=1", "--set", "length=6", "--set", "top=8", "--set", "extra=8"]
    assert run(*call, *small, "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"]["method"]["name"] == "distill"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit):
        run("distill", home.adapter, "--to", home.new, "-o", tmp_path / "other")
    assert "--prompts" in capsys.readouterr().err


def test_what_only_makes_sense_with_push_needs_it(home: Pair, tmp_path: Path, capsys) -> None:
    call = ["upgrade", home.adapter, "--to", home.new, "--map", home.map, "-o", tmp_path / "out"]
    assert run(*call, "--private") == 1
    assert "nothing to push" in capsys.readouterr().err
    assert run(*call, "--push", "not a name") == 1
    assert not (tmp_path / "out").exists()


PUSH = (
    TOOLS
    + """
import contextlib, io
from peft_lorasuite.cli.main import main
call = ["upgrade", LORA, "--to", NEW, "--map", MAP, "--method", "lorasuite", "--json"]
def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*call, *words])
    return code, out.getvalue(), err.getvalue()
first = said("-o", OUT + "1", "--push", "me/new-lora", "--private")
pull = said("-o", OUT + "2", "--rank", "6", "--push", "me/new-lora", "--create-pr")
absent = said("-o", OUT + "3", "--push", "me/absent", "--create-pr")
files = sorted(api.list_repo_files("me/new-lora"))
from huggingface_hub import hf_hub_download
card = Path(hf_hub_download("me/new-lora", "README.md")).read_text()
print(json.dumps({"card": card, "first": first, "pull": pull, "absent": absent, "files": files,
                  "private": api.model_info("me/new-lora").private, "kept": Path(OUT + "3").is_dir()}))
"""
)


def test_upgrade_pushes_with_card_and_picture(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    hub_pair.publish(stocked, made / "map")
    names = {"LORA": LORA, "NEW": NEW, "MAP": hub_pair.MAP, "OUT": str(tmp_path / "out")}
    results = ask_client(stocked, PUSH, tmp_path / "home", names)
    assert results["first"][0] == 0, results["first"][2]
    assert json.loads(results["first"][1])["pushed"]["repo_id"] == "me/new-lora"
    assert results["private"] is True
    pictures = set(PICTURES) - {"gap.png"}  # nothing was measured yet
    assert {"README.md", "adapter_model.safetensors", "lorasuite_report.json", *pictures} <= set(results["files"])
    assert {name for name in PICTURES if f"]({name})" in results["card"]} == pictures
    assert results["pull"][0] == 0, results["pull"][2]
    assert json.loads(results["pull"][1])["pushed"]["pull_request"]
    code, _, error = results["absent"]
    assert code == 1
    assert "the adapter itself was written to" in error
    assert results["kept"] is True

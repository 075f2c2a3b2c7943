"""The command line, as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from any_model import other_backbone
from command_fixtures import Pair
from patience import limit
from transformers import AutoModelForCausalLM

from peft_lorasuite.arch import registry
from peft_lorasuite.cli.main import main
from peft_lorasuite.mapping.upgrade_map import UpgradeMap
from peft_lorasuite.methods import registry as base

pair = command_fixtures.pair


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    "words", [["--help"], ["upgrade", "--help"], ["map", "--help"], ["families"], ["families", "--json"], ["--version"]]
)
def test_what_needs_no_model_starts_without_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom peft_lorasuite.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    call, longest = [sys.executable, "-c", code, *words], limit(60)
    done = subprocess.run(call, capture_output=True, text=True, timeout=longest, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_module_runs_as_the_script_does() -> None:
    call = [sys.executable, "-m", "peft_lorasuite", "--version"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.startswith("peft-lorasuite 0.")


def test_help_lists_every_method_with_its_line() -> None:
    assert base.summaries() == {name: base.find(name).summary for name in base.names()}


def test_families_lists_every_model_type_with_its_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register("owl", summary="no gate projection")(lambda config: config)
    registry.register("eagle_owl")(lambda config: config)
    assert run("families", "--json") == 0
    rows = {row.pop("model_type"): row for row in json.loads(capsys.readouterr().out)["families"]}
    assert rows == {name: family._asdict() for name, family in registry.families().items()}
    assert run("families") == 0
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())  # a long summary goes on in the next line
    assert all(f" {name} {one.summary}" in text for name, one in registry.BUILT_IN.items())
    assert " owl no gate projection" in text
    assert " eagle_owl (no summary; from test_cli." in text
    assert max(map(len, lines)) <= 80


def test_families_tells_what_one_model_gets(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("families", pair.new, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model_type"], found["methods"]) == ("llama", ["all"])
    assert run("families", pair.new) == 0
    assert "layers, hidden size" in capsys.readouterr().out
    assert run("families", other_backbone(tmp_path / "new", "exaone4")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "model type exaone4" in text
    assert "methods distill, transplant: they run the model;" in text
    assert run("families", pair.adapter) == 1
    assert "the backbone has no config.json" in capsys.readouterr().err


def test_map_writes_a_map_that_loads(pair: Pair) -> None:
    built = UpgradeMap.load(pair.map)
    assert built.options.tokens == 512
    assert len(built.pairs) == 3


def test_map_takes_every_choice(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["--hidden-map", "polar", "--layer-map", "proportional", "--head-map", "index", "--dtype", "float32"]
    assert run("map", pair.old, pair.new, "-o", tmp_path / "map", "--json", *choices) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["output"] == str(tmp_path / "map")
    options = UpgradeMap.load(tmp_path / "map").options
    assert (options.hidden_map, options.layer_map, options.head_map) == ("polar", "proportional", "index")


def logits(base_folder: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()(torch.tensor([[5, 9, 30]])).logits


def test_upgrade_writes_a_plain_peft_folder_and_says_so(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "--set", "gain=2", "--method", "lorasuite"]
    assert run(*call, "-o", tmp_path / "out", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["report"] == json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert output["report"]["method"]["options"]["gain"] == 2
    assert output["report"]["coverage"] == 1
    plain = AutoModelForCausalLM.from_pretrained(pair.new, dtype=torch.float32)(torch.tensor([[5, 9, 30]])).logits
    assert not torch.allclose(logits(pair.new, tmp_path / "out"), plain, atol=1e-3)


def test_upgrade_needs_no_map_and_can_be_silent(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--from", pair.old, "--rank", 6, "-o", tmp_path / "out"]
    call += ["--method", "lorasuite"]
    assert run(*call, "--quiet") == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6
    assert run(*call, "--overwrite") == 0
    assert "of rank 6 by lorasuite, 100% of the adapter's tensors transferred" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base_model", "warning"),
    [
        ("some/model", "the adapter's base model is some/model, and the map was built for old"),
        ("someone/old@v2", None), ("someone/old@", None), ("/else@where/old", None), ("/elsewhere/old", None),
        (None, None),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_model_than_the_map_is_a_warning(
    base_model: str | None,
    warning: str | None,
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: Any,
) -> None:
    shutil.copytree(pair.adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base_model}))
    call = ["upgrade", tmp_path / "adapter", "--to", pair.new, "--map", pair.map, "-o", tmp_path / "out"]
    call += ["--from", pair.old, "--method", "lorasuite"]
    assert run(*call) == 0
    facts = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())["facts"]
    assert facts.get("named_base") == warning
    assert [record.getMessage() for record in caplog.records if "base model is" in record.getMessage()] == (
        [f"{warning}: make sure that they are the same"] if warning else []
    )
    caplog.clear()
    assert run(*call, "--overwrite", "-q") == 0
    assert not caplog.records


def test_upgrade_and_fine_tuning_in_one_go(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "out", "--quiet"]
    assert run(*call, "--finetune", pair.data, "--samples", 5, "--template", "{instruction}") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorasuite_report.json", "lorasuite_finetune.json",
    }  # fmt: skip
    record = json.loads((tmp_path / "out" / "lorasuite_finetune.json").read_text())
    assert (record["used"], len(record["new_modules"])) == (5, 3)  # one new layer matches no old one
    again = ["finetune", tmp_path / "out", "--data", pair.data, "-o", tmp_path / "more", "--template", "{instruction}"]
    assert run(*again, "--epochs", 1) == 0
    assert "trained on 8 samples" in capsys.readouterr().out
    assert not torch.equal(logits(pair.new, tmp_path / "out"), logits(pair.new, tmp_path / "more"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["upgrade", "a", "-o", "b"], "--to"),
        (["upgrade", "a", "--to", "b"], "-o/--output"),
        (["upgrade", "a", "--to", "b", "-o", "c", "--set", "gain"], "expected KEY=VALUE, got 'gain'"),
        (["upgrade", "a", "--to", "b", "-o", "c", "--rank", "0"], "must be at least 1, got 0"),
        (["map", "a", "b", "-o", "c", "--layer-map", "best"], "invalid choice"),
    ],
)
def test_a_wrong_call_is_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err

"""What is upgraded works in code that knows nothing of us: the examples of docs/existing-code.md, run and compared."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import hub_fixtures
import hub_pair
import pytest
from doc_blocks import blocks
from hub_fixtures import ask_client
from hub_server import HubServer
from safetensors import safe_open

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked

PAGE = Path(__file__).parents[2] / "docs" / "existing-code.md"
EXAMPLES = """
import warnings
warnings.simplefilter("ignore")
import torch
names = {}
for number, block in enumerate(BLOCKS):
    exec(compile(block, f"block {number}", "exec"), names)
    if "from_upgraded(" in block:
        ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
        with torch.no_grad():
            wanted = names["model"](ids).logits
            with names["model"].disable_adapter():
                effect = (names["model"](ids).logits - wanted).norm()
@torch.no_grad()
def error(model):
    return float((model.eval()(ids).logits - wanted).norm() / effect)
made = {name: error(names[name]) for name in ("auto", "swapped", "merged", "backbone")}
made["pipeline"] = error(names["writer"].model)
print(json.dumps({"errors": made, "effect": float(effect / wanted.norm()), "active": names["auto"].active_adapter,
                  "peft layers left": any("lora" in name for name, _ in names["merged"].named_modules()),
                  "text": names["answer"][0]["generated_text"]}))
"""


def test_the_loaders_of_others_give_the_same_model(stocked: HubServer, pair: Path, tmp_path: Path) -> None:
    stocked.add_repo("me/my-lora", pair / "lora")
    results = ask_client(stocked, EXAMPLES, tmp_path / "home", {"BLOCKS": [block.code for block in blocks(PAGE)]})
    assert results["effect"] > 0.01, "the adapter does something"
    assert max(results["errors"].values()) < 1e-4, results["errors"]
    assert results["active"] == "mixed"
    assert not results["peft layers left"]
    assert results["text"].startswith("the cat sat on")


TRAIN = """
import warnings
warnings.simplefilter("ignore")
names = {}
head, train = BLOCK.rsplit("trainer.train()", 1)[0], "trainer.train()"
exec(compile(head, "page", "exec"), names)
factors = lambda: {n: p.detach().clone() for n, p in names["trainer"].model.named_parameters() if p.requires_grad}
before = factors()
exec(train, names)
after = factors()
print(json.dumps({"trained": sorted({name.split(".")[-3] for name in before}),
                  "moved": sum(not before[name].equal(after[name]) for name in before) / len(before),
                  "class": type(names["trainer"].model).__name__, "loss": names["trainer"].state.log_history[-1]}))
"""


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_goes_on_training_it(stocked: HubServer, pair: Path, tmp_path: Path) -> None:
    stocked.add_repo("me/my-lora", pair / "lora")
    match = re.search(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None
    work = tmp_path / "work"
    work.mkdir()
    code = f"import os\nos.chdir({str(work)!r})\n" + TRAIN
    results = ask_client(stocked, code, tmp_path / "home", {"BLOCK": match[1]})
    assert results["class"].startswith("PeftModel")
    assert results["trained"] == ["lora_A", "lora_B"], "the backbone stays as it is"
    assert results["moved"] == 1.0
    assert results["loss"]["train_loss"] > 0


def test_the_files_are_what_serving_engines_expect(made: Path) -> None:
    config = json.loads((made / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["r"] == config["lora_alpha"] == 4
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["modules_to_save"] is None
    with safe_open(made / "out" / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no dict)
    modules = {name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for name in shapes}
    assert sorted(modules) == config["target_modules"], (
        "in one order always; every target module has its factors, and there are no others"
    )
    for name, shape in shapes.items():
        assert re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.[\w.]+\.lora_[AB]\.weight", name)
        assert shape[0 if "lora_A" in name else 1] == 4

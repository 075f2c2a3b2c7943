"""A token that was added to a tokenizer whose model was not resized is named in one sentence (B9 of real_inputs)."""

from __future__ import annotations

import json
import re

import added
import pytest
from added import TOKENS, Base, grown, identity_map
from command_fixtures import refused
from pico import save_backbone

from peft_lorasuite import LoraSuiteError, finetune, upgrade
from peft_lorasuite.cli import chat_session
from peft_lorasuite.evaluation.harness import evaluate
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.text.examples import Example
from peft_lorasuite.training.scoring import score

SENTENCE = "the token '<tool>' has no row in the embedding (got id 81, wanted below 81); resize the model"
SMALL = {"transplant": {"extra": 50, "length": 4}, "distill": {"extra": 50, "length": 4, "epochs": 1}}
EXAMPLE = {"instruction": "<tool> the cat", "output": "the dog"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two backbones whose tokenizers have a token more than their tables, as a padding token as well."""
    home = tmp_path_factory.mktemp("pair")
    made = []
    for side in ("old", "new"):
        base = added.base(home / f"plain-{side}")
        tokenizer, _ = grown(base.tokenizer, TOKENS[:1])
        tokenizer.pad_token = TOKENS[0]
        made.append(Base(save_backbone(home / side, base.model(), tokenizer), base.rows, tokenizer))
    adapter = home / "adapter"
    added.train_with(adapter, added.base(home / "plain"), added.plain_lora(), rows=81, base=str(made[0].folder))
    for path in adapter.glob("*token*"):
        path.unlink()
    identity_map(*made).save(home / "map")
    return adapter, *made, home / "map"


def sentence(call, *args, **settings) -> None:
    with pytest.raises(LoraSuiteError, match=re.escape(SENTENCE)):
        call(*args, **settings)


@pytest.mark.parametrize("method", SMALL)
def test_b9_in_prompts(method, pair):
    adapter, old, new, upgrade_map = pair
    prompts = ["the cat sat on <tool>", "the dog ran to"] * 4
    settings = {"method": method, "options": SMALL[method], "old": old.folder, "new": new.folder}
    sentence(upgrade, adapter, upgrade_map, prompts=prompts, **settings)
    upgrade(adapter, upgrade_map, prompts=["the cat sat on", "the dog ran to the"] * 4, **settings)


def test_b9_in_the_tokenizer_beside_the_adapter(tmp_path):
    """The tokens were added to the tokenizer alone, and no row was saved."""
    old, new = (added.base(tmp_path / side) for side in ("old", "new"))
    added.train_with(tmp_path / "adapter", old, added.plain_lora(), rows=81, grow=False)
    grown(old.tokenizer)[0].save_pretrained(tmp_path / "adapter")
    settings = {"method": "transplant", "options": SMALL["transplant"], "old": old.folder, "new": new.folder}
    upgrade_map = identity_map(old, new)
    sentence(upgrade, tmp_path / "adapter", upgrade_map, prompts=["the cat <tool>", "the dog"] * 4, **settings)
    made = upgrade(tmp_path / "adapter", upgrade_map, prompts=["the cat sat", "the dog"] * 4, **settings)
    assert made.report.facts["added_tokens"]["lost"] == dict.fromkeys(TOKENS, "it has no row in the embedding")


def test_b9_in_a_chat(pair):
    adapter, old, _, _ = pair
    models = chat_session.load_models(old.folder, str(adapter))
    sentence(chat_session.ask, models, "<tool> the cat")
    assert chat_session.ask(models, "the cat", length=2)


def test_b9_on_the_command_line(pair, tmp_path, capsys):
    adapter, old, _, _ = pair
    call = ["chat", "--base", old.folder, "--adapter", adapter, "--prompt", "the cat <tool>"]
    assert SENTENCE in refused(tmp_path, capsys, *call)


def test_b9_in_examples(pair):
    adapter, old, _, _ = pair
    sentence(finetune, str(adapter), [EXAMPLE], base=old.folder)
    finetune(str(adapter), [EXAMPLE | {"instruction": "the cat"}, EXAMPLE | {"instruction": "cat"}], base=old.folder)
    backbone = Backbone.open(old.folder)
    sentence(score, backbone.load(), backbone.tokenizer, [Example("<tool> the cat", "the dog")])


def test_b9_in_the_calibration_text(pair):
    _, old, new, _ = pair
    from peft_lorasuite import UpgradeMap

    sentence(
        UpgradeMap.build, old.folder, new.folder, calibration=["the cat sat on the <tool> mat and the dog ran"] * 8
    )


def test_b9_in_items_of_a_benchmark(pair, tmp_path):
    adapter, old, _, _ = pair
    item = {
        "instruction": "Is the cat <tool> red? Answer format: true/false",
        "input": "",
        "output": "",
        "answer": "true",
    }
    (tmp_path / "boolq_test.json").write_text(json.dumps([item, item]))
    settings = {"suite": "boolq", "data": tmp_path, "template": "{instruction}"}
    sentence(evaluate, str(old.folder), adapter=str(adapter), **settings)
    plain = item | {"instruction": "Is the cat red? Answer format: true/false"}
    longer = item | {"instruction": "Is the big cat red and the dog? Answer format: true/false"}
    (tmp_path / "boolq_test.json").write_text(json.dumps([plain, longer]))
    assert evaluate(str(old.folder), adapter=str(adapter), scoring="likelihood", **settings).tasks[0].n == 2

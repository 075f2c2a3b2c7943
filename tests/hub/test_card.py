"""Model cards: untrusted text is shown and never interpreted, and the card says what was converted and what was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hub_pair
import pytest
import yaml
from hub_pair import NEW, OLD

from peft_lorasuite import UpgradeCheck, UpgradeMap
from peft_lorasuite.checking.page import Line, weights_hash
from peft_lorasuite.evaluation.scores import Evaluation, TaskScore
from peft_lorasuite.hub import card
from peft_lorasuite.hub.card_check import read_check

pair, made = hub_pair.pair, hub_pair.made

UNTRUSTED = [
    "a\n---\nlicense: mit",
    "`</code><script>alert(1)</script>",
    "![x](http://evil)",
    "[me](javascript:1)",
    "a | b\r\n# h",
    "{{ 191 * 7 }}",
    "{% for n in range(1337) %}{{ n }}{% endfor %}",
    "{% raw %}",
    "{# evil",
    "",
]
REPORT = {
    "adapter": "me/old-lora", "old": OLD, "new": NEW, "method": {"name": "copy"}, "rank": 4, "coverage": 1.0,
    "energy_kept": 1.0, "version": "1", "tensors": {"b": "transferred"}, "revisions": {},
}  # fmt: skip


@pytest.mark.parametrize("text", UNTRUSTED)
def test_untrusted_text_is_shown_as_code(text: str) -> None:
    report = {
        "adapter": text, "old": text, "new": text, "method": {"name": text, "options": {text: text}}, "rank": 4,
        "coverage": 0.5, "energy_kept": 1.0, "version": text, "tensors": {text: text, "b": "transferred"},
        "revisions": {"old": text}, "verdict": text,
        "facts": {"samples": [dict.fromkeys(("prompt", "base", "upgraded", "old"), text)] * 4},
    }  # fmt: skip
    task = TaskScore(text, ("a", "b"), (1.0, 0.0), metric=text)
    evaluation = Evaluation(model="m", adapter="a", scoring=text, settings={}, tasks=(task,))
    readme = card.adapter_card(
        "me/new", NEW, report, license={"license": "other", "license_name": text}, evaluation=evaluation
    )
    _, front, body = readme.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["base_model"], meta["license"], meta["license_name"]) == (NEW, "other", card.clean(text))
    assert meta["lorasuite"]["source_adapter"]["name"] == card.clean(text)
    assert "---\n" not in body.replace("| --- | --- |\n", "").replace("| --- | --- | --- | --- |\n", "")
    assert body.count(f"| {card.code(text)} | {card.code(text)} | {card.code(text)} | {card.code(text)} |") == 3
    assert body.count(card.code(text)) >= 8, "in full, and as code"
    assert "1337" not in body.replace(card.code(text), "").replace(card.clean(text), ""), "it was evaluated"
    outside = "".join(part for number, part in enumerate(body.replace("```", "").split("`")) if number % 2 == 0)
    for forbidden in ("<", "evil", "javascript", "# h\n", "{"):
        assert forbidden not in outside


def test_untrusted_names_in_a_map_are_shown_as_code(made: Path) -> None:
    built = UpgradeMap.load(made / "map")
    text = "{{ 191 * 7 }}\n---\n[me](javascript:1)"
    built = replace(built, old=replace(built.old, name=text, revision="main"), facts={text: text})
    readme = card.map_card("me/map", built, pictures=["layer_map.png", "absent.png"])
    _, front, body = readme.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["base_model"] == [card.clean(text)]
    assert meta["lorasuite"]["facts"] == {card.clean(text): card.clean(text)}
    assert f"from {card.code(text)} to `new`" in body
    assert "1337" not in body
    assert body.count("![") == 1


def test_a_card_lists_ten_tensors_that_were_not_transferred() -> None:
    tensors = {f"model.layers.{n}.lora_A": "not transferred: no such module" for n in range(13)} | {"b": "transferred"}
    report = {
        "adapter": "me/old-lora", "old": OLD, "new": NEW, "method": {"name": "copy"}, "rank": 4, "coverage": 1 / 14,
        "energy_kept": 1.0, "version": "1", "tensors": tensors, "revisions": {"adapter": "0123456789abcdef"},
    }  # fmt: skip
    readme = card.adapter_card("me/new", NEW, report, training={"steps": 5, "note": "x"})
    assert readme.count("not transferred: no such module") == 10
    assert "- and 3 more, listed in `lorasuite_report.json`" in readme
    assert "[`me/old-lora`](https://huggingface.co/me/old-lora) at `0123456789ab`" in readme
    assert "and then fine-tuned." in readme
    assert yaml.safe_load(readme.split("---\n")[1])["lorasuite"]["fine_tuning"] == {"steps": 5}
    assert "states no license. The licenses of both backbones also apply.\n" in readme
    assert not {"## Evaluation", "## Figures"} & set(readme.splitlines())


def test_an_unreadable_card_has_no_license(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for text in ("", "no metadata", "---\na: [\n---\n", "---\nlicense: [1, 2]\n---\n", "---\n- a\n---\n"):
        readme.write_text(text)
        assert card.read_license(readme) == {}
    readme.write_text("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n")
    assert card.read_license(readme) == {"license": "other", "license_name": "x"}


def test_a_card_has_the_check_of_these_weights_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    lines = (Line.of("gap recovered", False, "3.0% | <b>", "at least 80%", 0.03), Line.skipped("GGUF", "no converter"))
    found = UpgradeCheck("new", "base", "old-lora", "old", lines, weights_hash(tmp_path), {"prompts": 3})
    found.save(tmp_path)
    readme = card.adapter_card("me/new", NEW, REPORT, check=read_check(tmp_path))
    assert "## Check\n\nThe adapter failed a check against `old-lora` on `old`.\n" in readme
    assert "| `gap recovered` | fail | `3.0% / <b>` | `at least 80%` |" in readme
    assert "| `GGUF` | not checked | `no converter` | `-` |" in readme
    assert "## Check" not in card.adapter_card("me/new", NEW, REPORT)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert read_check(tmp_path) is None
    (tmp_path / "check.json").write_text('{"lines": 3}')
    assert read_check(tmp_path) is None
    assert [record.getMessage()[:24] for record in caplog.records] == ["the card has no check: c"] * 2

"""A collection that is gone on with: what counts as done, and what each adapter of a mixed list needs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import hub_pair
import peft
import pytest
from datasets import Dataset
from pico import pico_model

from peft_lorasuite import LoraSuiteError, upgrade_many

pair, made = hub_pair.pair, hub_pair.made
COLLECTION = Path(__file__).parents[2] / "hub_scripts" / "upgrade_collection.py"


def rank_in(folder: Path) -> int:
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def test_the_result_itself_says_what_it_was_made_with(made: Path, tmp_path: Path) -> None:
    def run(rank: int, shard: tuple[int, int] | None = None) -> str:
        (outcome,) = upgrade_many([made / "lora"], made / "map", tmp_path, rank=rank, shard=shard)
        assert rank_in(tmp_path / "lora") == rank == outcome.facts["rank"]
        return outcome.status

    assert [run(2), run(2)] == ["done", "kept"]
    assert [run(3, (0, 2)), run(3, (0, 2))] == ["done", "kept"]
    assert [run(2), run(2), run(3), run(3)] == ["done", "kept", "done", "kept"]
    (tmp_path / "lora" / "lorasuite_report.json").unlink()
    (tmp_path / "lora" / "adapter_config.json").unlink()
    (outcome,) = upgrade_many([made / "lora"], made / "map", tmp_path, rank=3)
    assert outcome.status == "failed", "a folder without a report is not known to be ours"


def test_other_prompts_in_a_long_column_are_other_settings(made: Path, tmp_path: Path) -> None:
    texts = [f"name a cat of {number}" for number in range(20)]
    rows = Dataset.from_dict({"text": texts})
    other = Dataset.from_dict({"text": [*texts[:9], "another", *texts[10:]]})
    prompts = [rows["text"], rows["text"], list(texts), other["text"]]
    statuses = [upgrade_many([made / "lora"], made / "map", tmp_path, prompts=one)[0].status for one in prompts]
    assert statuses == ["done", "kept", "kept", "done"]


@pytest.fixture
def mixed(made: Path, tmp_path: Path) -> Path:
    """A list of two adapters of the old backbone's folder, one of them a DoRA, and of one without weights."""
    old = str(made / "old")
    hub_pair.make_lora(tmp_path / "plain", pico_model("llama", seed=1), base=old)
    model = pico_model("llama", seed=1)
    model.config._name_or_path = model.name_or_path = old
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "dora", save_embedding_layers=False)
    hub_pair.make_lora(tmp_path / "empty", pico_model("llama", seed=1), base=old)
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path / name}\n" for name in ("plain", "dora", "empty")))
    return tmp_path / "list.txt"


def test_a_dora_in_the_list_gets_both_backbones(mixed: Path, made: Path, tmp_path: Path, capsys) -> None:
    program = runpy.run_path(str(COLLECTION))["main"]
    words = ["--list", mixed, "--from", made / "old", "--to", made / "new", "--map", made / "map", "-o"]
    assert program([str(word) for word in (*words, tmp_path / "out", "--method", "lorasuite")]) == 1
    printed = capsys.readouterr()
    assert "2 upgraded, 0 kept from before" in printed.out
    assert printed.err.count("failed: ") == 1
    assert "empty: the adapter has no weights" in printed.err
    assert json.loads((tmp_path / "out" / "dora" / "adapter_config.json").read_text())["use_dora"]


@pytest.mark.parametrize("to", ["absent", "old"])
def test_the_new_backbone_is_the_maps(to: str, mixed: Path, made: Path, tmp_path: Path, capsys) -> None:
    """Also where no adapter and no method reads it."""
    mixed.write_text(f"{tmp_path / 'plain'}\n")
    program = runpy.run_path(str(COLLECTION))["main"]
    words = ["--list", mixed, "--from", made / "old", "--to", made / to, "--map", made / "map", "-o", tmp_path / "out"]
    assert program([str(word) for word in (*words, "--method", "lorasuite")]) == 1
    message = {"absent": "backbone not found", "old": "the upgrade map was built for another new backbone"}
    assert message[to] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def collection(made: Path, *words: object) -> int:
    given = ["--from", made / "old", "--to", made / "new", "--map", made / "map", *words]
    return runpy.run_path(str(COLLECTION))["main"]([str(word) for word in given])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda place: (place / "list.txt").write_bytes("# gr\u00fcn\n".encode("latin-1")),
            "the list cannot be read: ",
        ),
        (lambda place: (place / "out").write_text(""), "the output is a file"),
        (lambda place: (place / "out").symlink_to(place / "list.txt" / "below"), "a parent of the output is a file"),
        (lambda place: (place / "out" / "journal.jsonl").mkdir(parents=True), "the journal must be a file"),
    ],
    ids=["Latin-1", "file", "below a file", "journal"],
)
def test_what_stops_a_collection_is_reported_first(spoil: Any, message: str, made: Path, mixed: Path, capsys) -> None:
    spoil(mixed.parent)
    assert collection(made, "--list", mixed, "-o", mixed.parent / "out", "--dry-run") == 1
    heard = capsys.readouterr()
    assert message in heard.err
    assert (heard.out, heard.err.count("\n")) == ("", 1)


def test_a_list_with_a_mark_and_a_journal_in_another_encoding(made: Path, mixed: Path, tmp_path: Path, capsys) -> None:
    """The backbone is named by another path to the same folder, too."""
    (tmp_path / "linked").symlink_to(made)
    mixed.write_text(f"\ufeff{tmp_path / 'plain'}\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").write_bytes(b'\xff\xfe\nnull\n5\n{"adapter": 1}\n')
    words = ["--list", mixed, "-o", tmp_path / "out", "--from", tmp_path / "linked" / "old"]
    assert collection(made, *words) == 0
    assert "1 of 1 adapters sit on" in capsys.readouterr().out


def test_a_single_name_is_no_list_and_a_generator_of_prompts_serves_all(
    made: Path, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoraSuiteError, match=r"adapters must be a list of names.*put a single adapter in a list"):
        upgrade_many(str(tmp_path / "plain"), made / "map", tmp_path / "out")
    prompts = (text for text in ["the cat sat on a mat", "the dog ran to the sun"])
    outcomes = upgrade_many(
        [tmp_path / "plain", tmp_path / "dora"], made / "map", tmp_path / "out", method="distill", prompts=prompts,
        options={"epochs": 1}, old=made / "old", new=made / "new",
    )  # fmt: skip
    assert [outcome.error for outcome in outcomes] == [None, None]


def test_prompts_may_stand_in_a_file(made: Path, tmp_path: Path) -> None:
    texts = ["the cat sat on a mat", "the dog ran to the sun"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    given = [texts, tmp_path / "prompts.txt", [{"prompt": text} for text in texts], texts[::-1]]
    statuses = [upgrade_many([made / "lora"], made / "map", tmp_path / "out", prompts=one)[0].status for one in given]
    assert statuses == ["done", "kept", "kept", "done"]


def test_two_results_under_one_repository_name_are_refused(made: Path, tmp_path: Path, capsys) -> None:
    places = [tmp_path / owner / "lora" for owner in ("alice", "bob")]
    for place in places:
        hub_pair.make_lora(place, pico_model("llama", seed=1), base=str(made / "old"))
    (tmp_path / "list.txt").write_text("".join(f"{place}\n" for place in places))
    words = ["--list", tmp_path / "list.txt", "--from", made / "old", "--to", made / "new", "--push-to", "me"]
    program = runpy.run_path(str(COLLECTION))["main"]
    assert program([str(word) for word in (*words, "-o", tmp_path / "out")]) == 1
    assert "me/lora-upgraded: two adapters would be pushed to one repository (got " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

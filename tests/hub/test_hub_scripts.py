"""The programs of hub_scripts/ against the loopback Hub, and upgrades of many adapters with one map."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import hub_fixtures
import hub_pair
import pytest
from datasets import Dataset
from hub_fixtures import ask_client
from hub_pair import LORA, MAP, NEW, OLD, TOOLS, config_of
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load, save

from peft_lorasuite import LoraSuiteError, upgrade_many
from peft_lorasuite.hub.card import PICTURES
from peft_lorasuite.upgrading.adapter_list import plan_many
from peft_lorasuite.upgrading.collection import open_collection
from peft_lorasuite.upgrading.inputs import open_inputs

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked

SCRIPTS = Path(__file__).parents[2] / "hub_scripts"
RUN = (
    TOOLS
    + """
import contextlib, io, runpy
def run(script, *words):  # exit code and what was printed
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = runpy.run_path(f"{SCRIPTS}/{script}.py")["main"](list(words))
    return [code, out.getvalue(), err.getvalue()]
pair = ["--from", OLD, "--to", NEW]
"""
)
FLOW = (
    RUN
    + """
ran = {"map": run("publish_map", OLD, NEW, "--push", MAP, "--picture")}
ran["one"] = run("upgrade_and_push", LORA, "--to", NEW, "--map", MAP, "--push", "me/new-lora", "--private",
                 "--picture", "--rows", ROWS)
ran["without map"] = run("upgrade_and_push", LORA, "--to", NEW, "--push", "me/other-lora")
ran["taken"] = run("upgrade_and_push", LORA, "--to", NEW, "--map", MAP, "--push", MAP)
every = ["--user", "many", *pair, "-o", "out", "--push-to", "me"]
ran["dry"] = run("upgrade_collection", *every, "--dry-run")
ran["out exists"] = Path("out").exists()
ran["first"] = run("upgrade_collection", *every)
ran["second"] = run("upgrade_collection", *every)
ran["with map"] = run("upgrade_collection", "--user", "many", *pair, "-o", "mapped", "--map", MAP)
print(json.dumps(ran))
"""
)


def add_collection(hub: HubServer, lora: Path) -> None:
    """Add a user with five adapters, one with non-finite weights, and one of another backbone."""
    hub.add_user("many")
    files = {path.name: path.read_bytes() for path in lora.iterdir()}
    card = f"---\nbase_model: {OLD}\nbase_model_relation: adapter\nlibrary_name: peft\n---\n".encode()
    tensors = load(files["adapter_model.safetensors"])
    for number in range(5):
        hub.add_repo(f"many/lora-{number}", files | {"README.md": card})
    spoilt = save({name: tensor * float("nan") for name, tensor in tensors.items()})
    hub.add_repo("many/spoilt", files | {"README.md": card, "adapter_model.safetensors": spoilt})
    other = json.dumps(json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": NEW}).encode()
    hub.add_repo("many/elsewhere", files | {"README.md": card, "adapter_config.json": other})


def write_results(folder: Path) -> Path:
    """Write measured results for the figure of the gap."""
    folder.mkdir()
    for name, nll in (("base", 3.0), ("lorasuite", 2.0), ("full", 1.0)):
        measured = {"row": name, "nll": nll, "accuracy": 0.5, "interval": [0.4, 0.6], "items": 90}
        (folder / f"{name}.json").write_text(json.dumps(measured))
    return folder


def method_of(hub: HubServer, repo_id: str) -> str:
    return json.loads(hub.files(repo_id)["lorasuite_report.json"])["method"]["name"]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_publish_a_map_push_an_upgrade_and_continue_a_collection(
    stocked: HubServer, made: Path, tmp_path: Path
) -> None:
    hub = stocked
    add_collection(hub, made / "lora")
    work = tmp_path / "work"
    work.mkdir()
    rows = write_results(tmp_path / "rows")
    names = {"OLD": OLD, "NEW": NEW, "LORA": LORA, "MAP": MAP, "SCRIPTS": str(SCRIPTS), "ROWS": str(rows)}
    ran = ask_client(hub, f"import os\nos.chdir({str(work)!r})\n" + FLOW, tmp_path / "home", names)

    assert [ran[name][0] for name in ("map", "one", "without map")] == [0, 0, 0], ran
    assert "layer_map.png" in hub.files(MAP)
    assert set(PICTURES) <= set(hub.files("me/new-lora"))
    shown = hub.files("me/new-lora")["README.md"].decode()
    assert all(f"]({name})" in shown for name in PICTURES)
    assert hub.api.repos["me/new-lora"].private
    assert config_of(hub, "me/new-lora")["base_model_name_or_path"] == NEW
    assert (method_of(hub, "me/new-lora"), method_of(hub, "me/other-lora")) == ("lorasuite", "transplant"), (
        "without a map the old backbone is there anyway, and auto may run it"
    )
    assert ran["taken"][0] == 1
    assert "has other content" in ran["taken"][2]

    code, listed, _ = ran["dry"]
    assert (code, ran["out exists"]) == (0, False)
    assert listed.count("upgrade  many/") == 6
    assert f"skip     many/elsewhere: its base model is {NEW}" in listed
    assert "-> out/many__lora-0 and me/lora-0-upgraded" in listed
    code, text, errors = ran["first"]
    assert (code, "5 upgraded, 0 kept" in text) == (1, True), ran["first"]
    assert "failed: many/spoilt" in errors
    assert "not finite" in errors
    assert "failed: many/elsewhere" in errors
    code, text, _ = ran["second"]
    assert (code, "0 upgraded, 5 kept" in text) == (1, True)
    assert (ran["with map"][0], "5 upgraded, 0 kept" in ran["with map"][1]) == (1, True)
    assert sorted(name for name in hub.api.repos if name.endswith("-upgraded")) == [
        f"me/lora-{number}-upgraded" for number in range(5)
    ]
    for name in (OLD, NEW):
        weights = len(hub.files(name)["model.safetensors"])
        assert hub.bytes_sent(f"^GET /cdn/{name}/") == weights, "each backbone is downloaded once"
    lines = journal(work / "out")
    assert [line["status"] for line in lines] == ["done"] * 5 + ["failed"] * 2, "what failed is tried again"
    assert lines[0]["facts"]["repo"] == "me/lora-0-upgraded"
    methods = [{line["facts"].get("method") for line in journal(work / out)[:5]} for out in ("out", "mapped")]
    assert methods == [{"transplant"}, {"lorasuite"}], "the same methods as for a single adapter"
    assert hub.token not in json.dumps([ran, lines])


@pytest.mark.parametrize(
    ("method", "mapped", "needed"),
    [
        ("auto", True, False), ("lorasuite", True, False), ("cross-lora", True, True), ("distill", True, True),
        ("auto", False, True), ("lorasuite", False, True),
    ],
)  # fmt: skip
def test_a_collection_opens_the_old_backbone_as_a_single_upgrade_does(
    method: str, mapped: bool, needed: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    lora, new, given = tmp_path / "lora", made / "new", made / "map" if mapped else None
    shutil.copytree(made / "lora", lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(made / "old")}))
    single = open_inputs(lora, new, old=None if mapped else made / "old", upgrade_map=given, method=method).old
    many = open_collection([str(lora)], made / "old", new, upgrade_map=given, method=method)[1]
    assert (single is not None, many is not None) == (needed, needed)


HUNDRED = (
    TOOLS
    + """
from peft_lorasuite import upgrade_many
outcomes = upgrade_many([f"many/lora-{n}" for n in range(100)], FOLDER, OUT)
print(json.dumps([outcome.status for outcome in outcomes]))
"""
)


def test_a_hundred_adapters_read_no_backbone_when_the_map_is_there(hub: HubServer, made: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (made / "lora").iterdir()}
    for number in range(100):
        hub.add_repo(f"many/lora-{number}", files)
    names = {"FOLDER": str(made / "map"), "OUT": str(tmp_path / "out")}
    assert ask_client(hub, HUNDRED, tmp_path / "home", names) == ["done"] * 100
    assert not hub.requests("backbone")
    size = len(files["adapter_model.safetensors"]) + len(files["adapter_config.json"])
    assert hub.bytes_sent("^GET .*lora-7/") - hub.bytes_sent("^GET /api/") < size + 2000


@pytest.mark.parametrize("name", ["publish_map", "upgrade_and_push", "upgrade_collection"])
def test_help_shows_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(SCRIPTS / f"{name}.py"))
    with pytest.raises(SystemExit) as stopped:
        program["main"](["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"python hub_scripts/{name}.py" in text
    with pytest.raises(SystemExit) as stopped:
        program["main"](["--push", "me/x", "--no-such-word"])
    assert stopped.value.code == 2


def test_a_new_run_continues_the_last_one(made: Path, tmp_path: Path) -> None:
    out, lora = tmp_path / "out", made / "lora"
    copies = [tmp_path / "a" / "lora", tmp_path / "b" / "lora"]
    for copy in copies:
        copy.mkdir(parents=True)
        for path in lora.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    rows = Dataset.from_dict({"adapter": [str(lora), *map(str, copies), str(tmp_path / "absent")]})
    seen: list[str] = []

    def then(name: str, upgraded: object) -> dict[str, str]:
        seen.append(name)
        if len(seen) == 2:
            raise LoraSuiteError("the Hub is full")
        return {"note": "pushed"}

    first = upgrade_many(rows, made / "map", out, then=then)
    assert [outcome.status for outcome in first] == ["done", "failed", "done", "failed"]
    assert (first[1].error, first[0].facts["note"]) == ("the Hub is full", "pushed")
    assert len({outcome.folder for outcome in first}) == 4, (
        "two adapters with the same folder name have different outputs"
    )
    with (out / "journal.jsonl").open("a") as file:
        file.write('{"adapter": "cut off by a cra')  # a crash while the line was written
    second = upgrade_many(rows["adapter"], made / "map", out)
    assert [outcome.status for outcome in second] == ["kept", "done", "kept", "failed"]
    third = upgrade_many(rows["adapter"], made / "map", out, rank=3)
    assert [outcome.status for outcome in third] == ["done", "done", "done", "failed"], "other settings, other results"
    shares = [upgrade_many(rows["adapter"], made / "map", tmp_path / "two", shard=(n, 2)) for n in range(2)]
    assert [[outcome.adapter for outcome in share] for share in shares] == [rows["adapter"][::2], rows["adapter"][1::2]]
    assert {path.name for path in (tmp_path / "two").glob("journal*")} == {"journal-0.jsonl", "journal-1.jsonl"}
    again = upgrade_many(rows["adapter"], made / "map", tmp_path / "two")
    assert [outcome.status for outcome in again] == ["kept", "kept", "kept", "failed"]
    with pytest.raises(LoraSuiteError, match="no such column"):
        upgrade_many(rows, made / "map", out, column="name")
    plans = plan_many(rows, out, base=OLD)
    assert [(plan.done, plan.rank, plan.problem is None) for plan in plans] == [(True, 4, True)] * 3 + [
        (False, None, False)
    ]


def test_a_folder_with_other_files_is_not_overwritten(made: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").write_text("mine")
    (outcome,) = upgrade_many([made / "lora"], made / "map", tmp_path)
    assert (outcome.status, "not empty" in str(outcome.error)) == ("failed", True)
    assert (tmp_path / "lora" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("role", ["old", "new"])
def test_a_backbone_of_another_pair_is_refused_before_the_first_adapter(role: str, made: Path, tmp_path: Path) -> None:
    other = {"old": "new", "new": "old"}[role]
    with pytest.raises(LoraSuiteError, match=f"the upgrade map was built for another {role} backbone"):
        upgrade_many([made / "lora"], made / "map", tmp_path / "out", **{role: made / other})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("upgrade_collection", ["--list", "absent.txt", "--from", "a/b", "--to", "a/c", "-o", "out"]),
        ("upgrade_and_push", ["a/b@", "--to", "a/c", "--push", "not an id"]),
        ("publish_map", ["--map", "absent.d/map/x", "--push", "a/b"]),
    ],
)
def test_an_error_is_one_line(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"](words) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"{name}: ")
    assert list(tmp_path.iterdir()) == []

"""Push upgraded adapters and maps with the real client: one commit, a correct card, nothing partial after a fault."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import hub_fixtures
import hub_pair
import yaml
from hub_fixtures import ask_client
from hub_pair import CALIBRATION, LORA, MAP, NEW, OLD, TOOLS, config_of
from hub_server import HubServer
from safetensors.torch import load

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked

PUSH = (
    TOOLS
    + """
from peft_lorasuite.hub.push import check_push, push_map
built = UpgradeMap.build(OLD, NEW, calibration=CALIBRATION)
shared = push_map(built, MAP)
done = upgrade(LORA, MAP)
done.save(OUT)
first = push_upgraded(done, "me/new-lora", evaluation=SCORES, picture=PNG)
again = push_upgraded(OUT, "me/new-lora", evaluation=SCORES, picture=PNG)
from pathlib import Path
from peft_lorasuite.checking.page import Line, UpgradeCheck
from peft_lorasuite.checking.page import weights_hash
lines = (Line.of("gap recovered", True, "97.0%", "at least 80%"),)
UpgradeCheck("out", NEW, LORA, OLD, lines, weights_hash(Path(OUT))).save(OUT)
push_upgraded(OUT, "me/checked")
model = PeftModel.from_upgraded(NEW, LORA, upgrade_map=MAP, adapter_name="mine")
push_upgraded(model, "me/from-model", private=True)
other = lambda **more: error_of(lambda: push_upgraded(FOLDER, "me/new-lora", base_model=NEW, **more))
refused = {"other": other(), "public": other(private=True, overwrite=True)}
pull = push_upgraded(FOLDER, "me/new-lora", base_model=NEW, create_pr=True, commit_message="try this")
replaced = push_upgraded(FOLDER, "me/new-lora", base_model=NEW, overwrite=True, license="mit")
refused |= {
    "folder": error_of(lambda: push_upgraded(FOLDER, "me/x")),
    "name": error_of(lambda: push_upgraded(FOLDER, "../x", base_model=NEW)),
    "dashes": error_of(lambda: push_map(built, "me/a--to--b")),
    "bare": error_of(lambda: push_upgraded(FOLDER, "x", base_model=NEW)),
    "no pr": error_of(lambda: push_upgraded(FOLDER, "me/absent", base_model=NEW, create_pr=True)),
    "early": [error_of(lambda: check_push("me/x", base)) for base in (NEW, "org/nowhere", OUT, "a/b/c")],
    "no base": error_of(lambda: push_upgraded(FOLDER, "me/x", base_model="org/nowhere")),
    "not mine": error_of(lambda: push_upgraded(FOLDER, "org/x", base_model=NEW)),
    "no report": error_of(lambda: push_upgraded(LORA_FOLDER, "me/x")),
    "map over adapter": error_of(lambda: push_map(built, "me/new-lora")),
}
print(json.dumps({"first": vars(first), "again": again.commit, "pull": vars(pull), "map": vars(shared),
                  "base": done.base, "replaced": replaced.commit, "refused": refused}))
"""
)


def png() -> bytes:
    """The smallest picture: one grey pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def scores(folder: Path) -> Path:
    tasks = [{"task": "boolq", "items": ["a", "b"], "outcomes": [1.0, 0.0], "answered": 1.0, "metric": "accuracy"}]
    values = {"version": 1, "model": "m", "adapter": "a", "scoring": "generate", "settings": {}, "tasks": tasks}
    (folder / "scores.json").write_text(json.dumps(values))
    return folder / "scores.json"


def test_push_and_read_back(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    hub = stocked
    hub.add_repo("org/x", {"config.json": b"{}"})
    (tmp_path / "map.png").write_bytes(png())
    names = {
        "OLD": OLD, "NEW": NEW, "LORA": LORA, "MAP": MAP, "CALIBRATION": CALIBRATION, "OUT": str(tmp_path / "out"),
        "FOLDER": str(made / "out"), "LORA_FOLDER": str(made / "lora"), "PNG": str(tmp_path / "map.png"),
        "SCORES": str(scores(tmp_path)),
    }  # fmt: skip
    result = ask_client(hub, PUSH, tmp_path / "home", names)
    heads = {name: hub.api.repos[name].at("main").oid for name in (OLD, NEW, LORA)}

    commit = result["first"]["commit"]
    files = hub.files("me/new-lora", commit)
    assert set(files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "layer_map.png",
        "lorasuite_report.json",
    }  # fmt: skip
    assert result["again"] == commit, "pushing the same adapter again makes no commit"
    assert files["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    config = config_of(hub, "me/new-lora", commit)
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (NEW, 4, 4)

    readme = files["README.md"].decode()
    meta = yaml.safe_load(readme.split("---\n")[1])
    assert (meta["base_model"], meta["base_model_relation"], meta["library_name"]) == (NEW, "adapter", "peft")
    assert meta["license"] == "cc-by-4.0"
    block = meta["lorasuite"]
    assert block["source_adapter"] == {"name": LORA, "revision": heads[LORA]}
    assert block["old_backbone"] == {"name": OLD, "revision": heads[OLD]}
    assert block["new_backbone"] == {"name": NEW, "revision": heads[NEW]}
    assert set(block["versions"]) == {"peft_lorasuite", "peft", "transformers"}
    assert block["coverage"] == 1.0
    assert 0 < block["energy_kept"] <= 1
    (scored,) = meta["model-index"][0]["results"]
    assert (scored["dataset"]["name"], scored["metrics"][0]["value"]) == ("boolq", 0.5)
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/new-lora")' in readme
    assert "layer_map.png" in readme
    assert "| `boolq` | 50.0% |" in readme
    assert "`cc-by-4.0`, as stated in the model card of the source adapter." in readme
    assert "Source tensors transferred | 100.0%" in readme
    assert "Not transferred" not in readme

    checked = hub.files("me/checked")
    assert "| `gap recovered` | pass | `97.0%` | `at least 80%` |" in checked["README.md"].decode()
    assert json.loads(checked["check.json"])["verdict"] == "pass: 1 checked, 0 not checked"
    assert "## Check" not in readme

    assert hub.api.repos["me/from-model"].private
    from_model = load(hub.files("me/from-model")["adapter_model.safetensors"])
    assert from_model.keys() == load(files["adapter_model.safetensors"]).keys()

    assert result["pull"]["pull_request"] == "refs/pr/1"
    assert hub.history("me/new-lora", "refs/pr/1")[0] == "try this"
    assert len(hub.history("me/new-lora")) == 3  # created, pushed, replaced
    replaced = hub.files("me/new-lora")
    assert hub.api.repos["me/new-lora"].at("main").oid == result["replaced"]
    assert "layer_map.png" not in replaced, "a picture of the replaced adapter would be wrong"
    card_text = replaced["README.md"].decode()
    assert yaml.safe_load(card_text.split("---\n")[1])["license"] == "mit"
    assert "License of this adapter: `mit`. " in card_text, "the license does not come from the source adapter"
    assert config_of(hub, "me/new-lora")["base_model_name_or_path"] == NEW

    refused = result["refused"]
    assert "has other content already" in refused["other"]
    assert "--overwrite" in refused["other"]
    assert "public" in refused["public"]
    assert "not a valid Hub id" in refused["name"]
    assert "not a valid Hub id" in refused["dashes"]
    assert "not a valid Hub id" in refused["bare"]
    assert "not on the Hub" in refused["folder"], "the map was built from folders: the adapter has no Hub id"
    assert "does not exist" in refused["no pr"]
    assert "org/nowhere: the new backbone is not on the Hub" in refused["no base"]
    early = refused["early"]
    assert early[0] == "ok"
    assert ["not on the Hub" in early[1], "is a folder" in early[2], "not a valid Hub id" in early[3]] == [True] * 3
    assert "has other content" in refused["not mine"]
    assert "lorasuite_report.json" in refused["no report"]
    assert "has other content" in refused["map over adapter"]
    assert "me/x" not in hub.api.repos

    assert set(hub.files(MAP)) == {".gitattributes", "README.md", "core.safetensors", "map.json"}
    map_text = hub.files(MAP)["README.md"].decode()
    map_meta = yaml.safe_load(map_text.split("---\n")[1])
    assert (map_meta["base_model"], map_meta["tags"]) == ([OLD, NEW], ["lorasuite", "upgrade-map"])
    assert map_meta["lorasuite"]["new"] == {"name": NEW, "revision": heads[NEW]}
    assert f'upgrade("me/old-lora", "{MAP}")' in map_text
    assert f"from `{OLD}` to `{NEW}`" in map_text
    texts = [data for name in hub.api.repos for path, data in hub.files(name).items() if path.endswith((".md", "json"))]
    private = (hub.token.encode(), str(tmp_path).encode(), str(made).encode(), str(Path.home()).encode() + b"/")
    assert not [text for text in texts if any(word in text for word in private)]


FAULTS = (
    TOOLS
    + """
import io
stream = io.StringIO()
logging.basicConfig(level=logging.INFO, stream=stream)
def push(name, **more):
    return error_of(lambda: push_upgraded(FOLDER, f"me/{name}", base_model=NEW, **more))
outcome = {name: push(name) for name in NAMES}
outcome["pr"] = error_of(lambda: push_upgraded(FOLDER, "org/target", base_model=NEW, create_pr=True))
outcome["revoked"] = push("revoked", token=REVOKED)
outcome["foreign"] = error_of(lambda: push_upgraded(FOLDER, "org/closed", base_model=NEW, overwrite=True))
outcome["leak"] = error_of(lambda: push_upgraded(LEAK, "me/leak", base_model=NEW))
print(json.dumps(outcome | {"log": stream.getvalue()}))
"""
)


def test_faults_leave_a_whole_commit_or_nothing(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    hub = stocked
    for name in ("org/closed", "org/target"):
        hub.add_repo(name, {"config.json": b"{}"})
    revoked = hub.add_user("ex")
    hub.revoke(revoked)
    names = ["busy", "down", "drop", "lost", "stop", "gone", "spoilt", "created"]
    hub.fault(429, "^POST .*me/busy/commit", retry_after=0)
    hub.fault(503, "^POST .*me/down/commit", retry_after=0)
    hub.fault("drop", "^POST .*me/drop/commit")
    hub.fault("lost", "^POST .*me/lost/commit")
    hub.fault("cut", "^PUT .*me/stop/", after=100)
    hub.fault(403, "^POST .*me/gone/commit", times=None)
    hub.fault("corrupt", "^GET /cdn/me/spoilt/", times=None, after=2000)
    hub.fault("lost", "^POST /api/repos/create", times=1)
    hub.fault("lost", "^POST .*org/target/commit")
    leak = tmp_path / "leak"
    leak.mkdir()
    for path in (made / "out").iterdir():
        (leak / path.name).write_bytes(path.read_bytes())
    report = json.loads((leak / "lorasuite_report.json").read_text())
    (leak / "lorasuite_report.json").write_text(json.dumps(report | {"facts": {"note": hub.token}}))
    given = {"FOLDER": str(made / "out"), "NEW": NEW, "NAMES": names, "REVOKED": revoked, "LEAK": str(leak)}
    result = ask_client(hub, FAULTS, tmp_path / "home", given)

    for name in ("busy", "down", "drop", "lost", "stop", "created", "pr"):
        assert result[name] == "ok", (name, result[name])
    for name in ("busy", "down", "drop", "lost", "stop", "created"):
        assert len(hub.history(f"me/{name}")) == 2, f"{name}: one commit beside the first"
        assert (
            hub.files(f"me/{name}")["adapter_model.safetensors"]
            == (made / "out" / "adapter_model.safetensors").read_bytes()
        )
    assert set(hub.api.repos["org/target"].refs) == {"main", "refs/pr/1"}, "the pull request is not made twice"
    assert "the token has no permission" in result["gone"]
    assert "damaged" in result["spoilt"]
    assert "does not accept the token" in result["revoked"]
    assert "the token has no permission" in result["foreign"]
    assert "access token" in result["leak"]
    assert not {"me/gone", "me/revoked", "me/leak"} & set(hub.api.repos), "what came to nothing is taken back"
    assert hub.history("org/closed") == ["initial commit"]
    for secret in (hub.token, revoked):
        assert secret not in json.dumps(result)

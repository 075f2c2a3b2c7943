"""Adapters, backbones and maps from the Hub: what goes over the wire, what is refused, what a fault leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_fixtures
import hub_pair
import pytest
from hub_fixtures import PRELUDE, ask_client, client_env, run_client
from hub_pair import LORA, MAP, NEW, OLD, TOOLS, publish
from hub_server import HubServer
from patience import limit
from safetensors.torch import load_file

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.io.source import Source

hub, pair, made, stocked = hub_fixtures.hub, hub_pair.pair, hub_pair.made, hub_pair.stocked

WIRE = (
    TOOLS
    + """
import io
from peft_lorasuite.io import source
source.LARGE_DOWNLOAD = 1000
stream = io.StringIO()
logging.basicConfig(level=logging.INFO, stream=stream)
done = upgrade(LORA, f"{MAP}@main")
stage("model")
model = PeftModel.from_upgraded(NEW, LORA, upgrade_map=MAP)
stage("again")
again = PeftModel.from_upgraded(NEW, LORA, upgrade_map=MAP)
stage("offline")
cached = PeftModel.from_upgraded(NEW, LORA, upgrade_map=MAP, local_files_only=True)
stage("pinned")
pinned = error_of(lambda: PeftModel.from_upgraded(NEW, LORA, upgrade_map=MAP, model_revision=OTHER))
same = [name for name, value in model.state_dict().items() if not value.equal(cached.state_dict()[name])]
print(json.dumps({"base": [done.base, done.revision], "coverage": model.upgrade_report.coverage, "other": same,
                  "revisions": dict(model.upgrade_report.revisions), "pinned": pinned, "log": stream.getvalue()}))
"""
)


def stages(hub: HubServer) -> dict[str, list[Any]]:
    """The server's log, cut at the marks."""
    found: dict[str, list[Any]] = {"first": []}
    for request in hub.log:
        if "/stage/" in request.path:
            found[request.path.rsplit("/", 1)[-1]] = []
        else:
            found[list(found)[-1]].append(request)
    return found


def sent(requests: list[Any]) -> dict[str, int]:
    """Bytes of files that went out, by repository."""
    totals: dict[str, int] = {}
    for request in requests:
        if (
            request.method == "GET"
            and ("/resolve/" in request.path or request.path.startswith("/cdn/"))
            and (request.status != 302)
        ):
            repo = "/".join(request.path.removeprefix("/cdn").split("/")[1:3])
            totals[repo] = totals.get(repo, 0) + (request.sent if request.status in (200, 206) else 0)
    return totals


def test_a_published_map_moves_adapter_and_map_and_no_weights_of_the_old_backbone(
    stocked: HubServer, made: Path, tmp_path: Path
) -> None:
    hub = stocked
    publish(hub, made / "map")
    other = hub.add_repo(NEW, {**hub.files(NEW), "model.safetensors": b"else"}, revision="other")
    names = {"LORA": LORA, "MAP": MAP, "NEW": NEW, "OTHER": "other"}
    error_of = ask_client(hub, WIRE, tmp_path / "home", names)
    parts = stages(hub)
    adapter = sum(len(hub.files(LORA)[name]) for name in ("adapter_config.json", "adapter_model.safetensors"))
    core = sum(len(hub.files(MAP)[name]) for name in ("map.json", "core.safetensors"))
    assert sent(parts["first"]) == {LORA: adapter, MAP: core}
    assert not [request for request in hub.log if OLD in request.path], "the old backbone is not asked for"
    second = sent(parts["model"])
    weights = len(hub.files(NEW)["model.safetensors"])
    assert set(second) == {NEW}
    assert weights < second[NEW] <= sum(map(len, hub.files(NEW).values())) + 1
    assert sum(r.sent for r in parts["model"] if r.path.startswith("/cdn/org/new-backbone/")) == weights
    assert sum(sent(parts["again"]).values()) == 0
    assert parts["offline"] == []
    heads = {role: hub.api.repos[name].at("main").oid for role, name in (("adapter", LORA), ("old", OLD), ("new", NEW))}
    assert error_of["revisions"] == heads
    assert error_of["base"] == [NEW, heads["new"]]
    assert (error_of["coverage"], error_of["other"]) == (1.0, [])
    assert "another new backbone" in error_of["pinned"]
    assert other != heads["new"]
    line = next(line for line in error_of["log"].splitlines() if "downloading" in line and NEW in line)
    assert heads["new"] in line
    assert "GB" in line
    assert error_of["log"].index("downloading") < len(error_of["log"])
    assert hub.token not in json.dumps(error_of)


FAULTS = (
    TOOLS
    + """
import io, os
from peft_lorasuite.cli.main import main
from peft_lorasuite.io.source import Source
stream = io.StringIO()
logging.basicConfig(level=logging.DEBUG, stream=stream)
def pull(name, upgrade_map=FOLDER, **more):
    return error_of(lambda: upgrade(name, upgrade_map, **more))
def base(name):
    return error_of(lambda: PeftModel.from_upgraded(NEW, name))
outcome = {name: pull(f"me/{name}") for name in NAMES}
outcome["spoilt again"] = pull("me/spoilt")
outcome["big"] = error_of(lambda: Source("org/big", "backbone").require("model.safetensors"))
outcome["gated"] = pull("org/gated")
outcome["absent"] = pull("org/absent")
outcome["revoked"] = pull("me/private", token=REVOKED)
outcome["revision"] = pull(LORA, revision="r9")
outcome["escape"] = pull("../../etc/passwd")
outcome["map is none"] = pull(LORA, upgrade_map="org/absent")
outcome["pickle"] = pull("me/pickle")
os.makedirs("here/backbone")
for name in PLANTED:
    outcome[name] = base(name)
outcome["index"] = error_of(lambda: PeftModel.from_upgraded("org/index", LORA, upgrade_map=FOLDER))
outcome["code"] = error_of(lambda: PeftModel.from_upgraded("org/code", LORA, upgrade_map=FOLDER))
outcome["exit"] = main(["upgrade", "me/short", "--to", NEW, "--map", FOLDER, "-o", "out"])
print(json.dumps(outcome | {"log": stream.getvalue(), "left": sorted(os.listdir("."))}))
"""
)
SPY = b"from pathlib import Path\nPath('ran').write_text('')\n"


def test_faults_and_traps_of_a_pull(stocked: HubServer, made: Path, tmp_path: Path) -> None:
    hub, lora = stocked, made / "lora"
    names = ["cut", "busy", "down", "reset", "spoilt", "short", "truncate"]
    for name in [*names, "private"]:
        hub.add_repo(f"me/{name}", lora, private=name == "private")
    revoked = hub.add_user("ex")
    hub.revoke(revoked)
    hub.add_repo("org/gated", lora, gated=True)
    hub.add_repo("org/big", {"model.safetensors": bytes(15 << 20)})
    files = {path.name: path.read_bytes() for path in lora.iterdir()}
    config = json.loads(files["adapter_config.json"])
    hub.add_repo("me/pickle", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80\x04."})
    paths = {"me/absolute": str(made / "old"), "me/dots": "../old", "me/relative": "here/backbone", "me/home": "~/old"}
    for name, path in paths.items():
        trap = json.dumps(config | {"base_model_name_or_path": path}).encode()
        hub.add_repo(name, files | {"adapter_config.json": trap})
    new = {path.name: path.read_bytes() for path in (made / "new").iterdir()}
    index = {"weight_map": dict.fromkeys(load_file(made / "new" / "model.safetensors"), "../../secret.safetensors")}
    stolen = {name: data for name, data in new.items() if name != "model.safetensors"}
    hub.add_repo("org/index", stolen | {"model.safetensors.index.json": json.dumps(index).encode()})
    auto = {"AutoModelForCausalLM": "modeling_spy.Spy", "AutoConfig": "configuration_spy.Spy"}
    code = json.dumps(json.loads(new["config.json"]) | {"auto_map": auto}).encode()
    hub.add_repo("org/code", new | {"config.json": code, "modeling_spy.py": SPY, "configuration_spy.py": SPY})

    hub.fault("cut", "^GET /cdn/me/cut/", after=500)
    hub.fault("cut", "^GET /cdn/org/big/", after=12 << 20)
    hub.fault(429, "^GET .*me/busy/resolve", times=2, retry_after=0)
    hub.fault(503, "^GET /cdn/me/down/", retry_after=0)
    hub.fault("cut", "^GET /cdn/me/reset/", after=100, reset=True)
    hub.fault("corrupt", "^GET /cdn/me/spoilt/", after=4000)
    hub.fault("short", "^GET /cdn/me/short/", times=None, after=1000)
    hub.fault("truncate", "^GET /cdn/me/truncate/", times=None, after=1000)
    given = {"FOLDER": str(made / "map"), "NEW": NEW, "LORA": LORA, "NAMES": names, "REVOKED": revoked,
             "PLANTED": list(paths)}  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    error_of = ask_client(hub, f"import os\nos.chdir({str(work)!r})\n" + FAULTS, tmp_path / "home", given)

    assert {name: error_of[name] for name in ("cut", "busy", "down", "reset", "big")} == dict.fromkeys(
        ("cut", "busy", "down", "reset", "big"), "ok"
    )
    assert "bytes=10485760-" in [request.range for request in hub.requests("^GET /cdn/org/big/")], "resumed, not anew"
    assert "damaged" in error_of["spoilt"]
    assert error_of["spoilt again"] == "ok"
    for name in ("short", "truncate"):
        assert "transfer failed" in error_of[name], error_of[name]
    assert "https://huggingface.co/org/gated" in error_of["gated"]
    assert "neither as a folder nor as a repository" in error_of["absent"]
    assert "does not accept the token" in error_of["revoked"]
    assert "no revision 'r9'" in error_of["revision"]
    assert "adapter not found" in error_of["escape"]
    assert "neither as a folder nor as a repository" in error_of["map is none"]
    assert "pickle" in error_of["pickle"]
    assert all("Hub" in error_of[name] and "backbone" in error_of[name] for name in paths), [
        error_of[name] for name in paths
    ]
    assert "outside" in error_of["index"]
    assert error_of["code"] == "ok", "the family is known: its own code is neither needed nor fetched"
    assert not hub.requests("_spy.py")
    assert error_of["exit"] == 1
    assert error_of["left"] == ["here"], "nothing half-written, nothing run"
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    signed = [request.path.split("/")[4] for request in hub.requests("^GET /cdn/me/")]
    for secret in (hub.token, revoked, *signed):
        assert secret not in json.dumps({name: text for name, text in error_of.items() if name != "log"})
    for secret in (hub.token, revoked):
        assert secret not in error_of["log"]


LIGHT = """
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.io.source import Source
def error_of(work):
    try:
        work()
    except LoraSuiteError as error:
        return str(error)
    return "ok"
fetch = lambda name, file: error_of(lambda: Source(name, "backbone").require(file))
"""


def test_two_processes_fill_one_cache_and_it_serves_without_a_network(stocked: HubServer, tmp_path: Path) -> None:
    hub, home = stocked, tmp_path / "home"
    hub.fault("slow", "^GET /cdn/", times=None, delay=0.02, every=2000)
    code = PRELUDE + LIGHT + f"print(json.dumps(fetch({NEW!r}, 'model.safetensors')))"
    work = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=client_env(hub, home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in work:
        out, err = process.communicate(timeout=limit(280))
        assert out.splitlines()[-1:] == [b'"ok"'], err.decode()[-2000:]
    weights = hub.files(NEW)["model.safetensors"]
    assert hub.bytes_sent(f"^GET /cdn/{NEW}/.*model.safetensors") in (len(weights), 2 * len(weights))
    assert not list(home.rglob("*.incomplete"))
    kept = [path.read_bytes() for path in home.rglob("model.safetensors")]
    assert kept == [weights]

    alone = f"print(json.dumps([fetch({NEW!r}, 'model.safetensors'), fetch('me/absent', 'model.safetensors')]))"
    for setting in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        hub.log.clear()
        done = run_client(hub, PRELUDE + LIGHT + alone, home=home, env=setting, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        first, second = json.loads(done.stdout.splitlines()[-1])
        assert first == "ok"
        assert "the Hub is not reachable" in second
        assert hub.log == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x"])
def test_a_file_name_never_leaves_its_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="outside"):
        Source("org/base", "backbone").fetch(name)
    with pytest.raises(LoraSuiteError, match="outside"):
        Source(str(tmp_path), "backbone").fetch(name)

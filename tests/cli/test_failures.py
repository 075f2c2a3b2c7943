"""What goes wrong outside: no space, a killed process, a Hub that refuses, no network; nothing half-written is left."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_fixtures
import peft
from command_fixtures import Pair
from hub_fixtures import run_client
from hub_server import HubServer
from patience import limit
from pico import pico_model

pair = command_fixtures.pair
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

LIMITED = """
import resource, signal, sys
from peft_lorasuite.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
codes = []
for call in CALLS:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    codes.append(main(call))
sys.exit(0 if codes == [1] * len(CALLS) else f"codes {codes}")
"""


def test_no_disk_space(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    shared = ["--map", str(pair.map), "--template", "{instruction}", "-q"]
    upgrade = ["upgrade", str(pair.adapter), "--to", str(pair.new), "-o", str(tmp_path / "place" / "out"), *shared]
    code = f"CALLS = {[upgrade, [*upgrade, '--finetune', str(pair.data)]]!r}\n{LIMITED}"
    call, longest = [sys.executable, "-c", code], limit(120)
    done = subprocess.run(call, capture_output=True, text=True, timeout=longest, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("peft-lorasuite: ")]
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert ": nothing was written: " in line
        assert "check the free space and the permissions, then run it again" in line
    assert list((tmp_path / "place").iterdir()) == []


FOREVER = """
import itertools, sys
from peft_lorasuite import upgrade
done = upgrade(ADAPTER, MAP)
print("ready", flush=True)
for number in itertools.count():
    done.save(f"{PLACE}/{number}")
"""


def test_a_killed_process_leaves_whole_adapters_or_none(pair: Pair, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    code = f"ADAPTER, MAP, PLACE = {str(pair.adapter)!r}, {str(pair.map)!r}, {str(place)!r}\n{FOREVER}"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    deadline = time.monotonic() + limit(20)
    while len(list(place.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    while not list(place.glob(".peft-lorasuite-*")) and time.monotonic() < deadline:
        pass  # until it is in the middle of one
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    whole = [path for path in place.iterdir() if not path.name.startswith(".")]
    assert len(whole) >= 2
    sizes = {tuple(sorted((file.name, file.stat().st_size) for file in path.iterdir())) for path in whole}
    assert len(sizes) == 1
    for path in whole[-2:]:
        peft.PeftModel.from_pretrained(
            pico_model("llama", 1, hidden_size=40, num_hidden_layers=4, intermediate_size=64), str(path)
        )
    rest = [path.name for path in place.iterdir() if path not in whole]
    assert all(name.startswith(".peft-lorasuite-") for name in rest)


HUB = """
import contextlib, io, json
from peft_lorasuite.cli.main import main
found = []
for call in CALLS:
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = main(call)
    found.append([code, heard.getvalue()])
print(json.dumps(found))
"""


def ask(hub: HubServer, tmp_path: Path, calls: list[list[str]], **env: str) -> list[str]:
    """Run commands against the loopback Hub; return their sentences after checking that each failed with one."""
    (tmp_path / "place").mkdir(exist_ok=True)
    whole = [[*call, "-o", str(tmp_path / "place" / "out"), "-q"] for call in calls]
    done = run_client(hub, f"CALLS = {whole!r}\n{HUB}", home=tmp_path / "home", token="", env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for code, sentence in results:
        assert code == 1, sentence
        assert sentence.count("\n") == 1, sentence
    assert list((tmp_path / "place").iterdir()) == []
    return [sentence for _, sentence in results]


def test_the_hub_has_no_such_thing_or_gives_it_to_nobody(hub: HubServer, pair: Pair, tmp_path: Path) -> None:
    hub.add_repo("org/new", pair.new)
    hub.add_repo("org/gated", pair.new, gated=True)
    hub.add_repo("org/empty", {"README.md": b"nothing"})
    hub.add_repo("me/pickle", {CONFIG: (pair.adapter / CONFIG).read_bytes(), "adapter_model.bin": pickle.dumps({})})
    hub.add_repo("me/damaged", pair.adapter)
    hub.add_repo("me/cut", pair.adapter)
    hub.fault("corrupt", "^GET .*me/damaged/.*safetensors", times=None, after=2000)
    hub.fault("truncate", "^GET .*me/cut/.*safetensors", times=None, after=2000)
    shared = ["--map", str(pair.map)]
    calls = [
        ["map", str(pair.old), "org/missing"],
        ["map", str(pair.old), "org/gated"],
        ["map", str(pair.old), "org/new@v9"],
        ["map", str(pair.old), "org/empty"],
        ["map", str(pair.old), str(tmp_path / "nowhere")],
        ["upgrade", "me/missing", "--to", "org/new", *shared],
        ["upgrade", "me/pickle", "--to", "org/new", *shared],
        ["upgrade", "me/damaged", "--to", "org/new", *shared],
        ["upgrade", "me/cut", "--to", "org/new", *shared],
        ["upgrade", str(pair.adapter), "--to", "org/new", "--map", "org/no-map"],
    ]
    errors = ask(hub, tmp_path, calls)
    assert "backbone org/missing: not found, neither as a folder nor as a repository on the Hub; check" in errors[0]
    assert (
        "backbone org/gated: the repository is gated; accept its license at https://huggingface.co/org/gated"
        in errors[1]
    )
    assert "backbone org/new@v9: the repository has no revision 'v9'; check the revision" in errors[2]
    assert "org/empty: the backbone has no config.json" in errors[3]
    assert "nowhere: backbone not found" in errors[4]
    assert "adapter me/missing: not found, neither as a folder nor as a repository on the Hub" in errors[5]
    assert "the weights are a pickle" in errors[6]
    assert f"adapter me/damaged: the download of {WEIGHTS} is damaged" in errors[7]
    assert "adapter me/cut: the transfer failed" in errors[8]
    assert "upgrade map org/no-map: not found, neither as a folder nor as a repository on the Hub" in errors[9]


def test_no_network(hub: HubServer, pair: Pair, tmp_path: Path) -> None:
    errors = ask(hub, tmp_path, [["map", str(pair.old), "org/new"]], HF_ENDPOINT="http://127.0.0.1:9")
    assert (
        "backbone org/new: not found as a folder or in the local cache, and the Hub is not reachable; check the network"
        in errors[0]
    )

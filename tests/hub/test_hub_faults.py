"""The faults of the loopback Hub, and what the real client makes of each: it is less careful than one would think."""

from __future__ import annotations

import hashlib
from pathlib import Path

import hub_fixtures
import pytest
from hub_faults import slice_file
from hub_fixtures import ADAPTER, WEIGHTS, ask_client
from hub_server import HubServer

hub = hub_fixtures.hub
MB = 1024 * 1024

DOWN = """
import time
def fetch(name):
    started, data = time.monotonic(), b""
    def work():
        nonlocal data
        data = Path(hf_hub_download(f"org/{name}", "model.safetensors")).read_bytes()
    outcome = attempt(work)
    return [outcome, len(data), time.monotonic() - started]
print(json.dumps({name: fetch(name) for name in NAMES}))
"""


def test_downloads_under_faults(hub: HubServer, tmp_path: Path) -> None:
    names = ["cut", "busy", "head", "down", "reset", "short", "corrupt", "truncate", "slow"]
    for name in names:
        hub.add_repo(f"org/{name}", {"model.safetensors": WEIGHTS})
    big = WEIGHTS * 1280  # 20 MB: the client resumes at whole pieces of 10 MB
    hub.add_repo("org/cut", {"model.safetensors": big})
    cut = hub.fault("cut", "^GET .*org/cut/", after=15 * MB)
    busy = hub.fault(429, "^GET .*org/busy/", times=2, retry_after=0)
    head = hub.fault(503, "^HEAD .*org/head/", times=2)
    hub.fault(503, "^GET .*org/down/")
    hub.fault("cut", "^GET .*org/reset/", after=100, reset=True)
    for kind in ("short", "corrupt", "truncate"):
        hub.fault(kind, f"^GET .*org/{kind}/", times=None, after=1000)
    hub.fault("slow", "^GET .*org/slow/", delay=0.2, every=5000)
    info = ask_client(hub, DOWN, tmp_path / "home", {"NAMES": names})
    assert {name: info[name][:2] for name in names} == {
        "cut": ["ok", len(big)],
        "busy": ["ok", len(WEIGHTS)],
        "head": ["ok", len(WEIGHTS)],
        "down": ["HfHubHTTPError", 0],  # the client does not retry a 503 on the file itself
        "reset": ["ReadError", 0],  # nor a reset connection
        "short": ["OSError", 0],
        "corrupt": ["ok", len(WEIGHTS)],  # nor does it check hashes
        "truncate": ["RemoteProtocolError", 0],
        "slow": ["ok", len(WEIGHTS)],
    }
    assert (cut.hits, busy.hits, head.hits) == (1, 2, 2)
    pieces = hub.requests("^GET .*org/cut/")
    assert [(r.range, r.status, r.sent) for r in pieces] == [
        (None, 200, 15 * MB),
        (f"bytes={10 * MB}-", 206, 10 * MB),
    ]
    assert info["slow"][2] > 0.8
    blobs = tmp_path / "home" / "hub"
    assert not list(blobs.rglob("*.incomplete"))
    assert [p.parent.parent.name for p in blobs.glob("*/blobs/*")].count("models--org--short") == 0
    saved = next((blobs / "models--org--corrupt" / "blobs").iterdir())
    assert hashlib.sha256(saved.read_bytes()).hexdigest() != saved.name


UP = """
for name in NAMES:
    api.create_repo(f"me/{name}")
print(json.dumps({name: attempt(lambda: api.upload_folder(repo_id=f"me/{name}", folder_path=f"{FOLDER}/{name}"))
                  for name in NAMES}))
"""


def test_uploads_under_faults_leave_a_whole_commit_or_none(hub: HubServer, tmp_path: Path) -> None:
    names = ["put", "stop", "busy", "drop", "half", "lost"]
    hub.fault(503, "^PUT .*me/put/")
    hub.fault("cut", "^PUT .*me/stop/", after=1000)
    hub.fault(429, "^POST .*me/busy/preupload", retry_after=0)
    hub.fault("drop", "^POST .*me/drop/commit/")
    hub.fault("cut", "^POST .*me/half/commit/", after=300)
    hub.fault("lost", "^POST .*me/lost/commit/")
    for name in names:
        (tmp_path / name).mkdir()
        for path in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / path).write_bytes(ADAPTER[path])
    info = ask_client(hub, UP, tmp_path / "home", {"NAMES": names, "FOLDER": str(tmp_path)})
    failed = "RemoteProtocolError"  # a commit is never retried by the client
    assert info == {"put": "ok", "stop": "ok", "busy": "ok", "drop": failed, "half": failed, "lost": failed}
    assert len(hub.requests("^PUT .*me/put/")) == len(hub.requests("^PUT .*me/stop/")) == 2
    for name in names:
        whole = {".gitattributes", "adapter_config.json", "adapter_model.safetensors"}
        assert set(hub.files(f"me/{name}")) == ({".gitattributes"} if name in ("drop", "half") else whole)
    assert hub.files("me/stop")["adapter_model.safetensors"] == WEIGHTS


@pytest.mark.parametrize(
    ("header", "status", "body"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=5-99", 206, b"56789"),
        ("bytes=10-", 416, b""),
        ("bytes=0-1,3-4", 200, b"0123456789"),  # several ranges: the whole file, as the standard allows
    ],
)
def test_ranges(header: str | None, status: int, body: bytes) -> None:
    part = slice_file(b"0123456789", header, None)
    assert (part.status, part.body, part.promised) == (status, body, len(body))


def test_an_unknown_fault_is_refused(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="unknown fault 'explode'; known: a status number, slow, drop, lost, cut"):
        hub.fault("explode", "/")

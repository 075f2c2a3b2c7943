"""The ``hub`` fixture and the helper that runs client code against it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from patience import limit

PRELUDE = """
import json
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
def attempt(work):  # the name of the error, or "ok"
    try:
        work()
    except Exception as error:
        return type(error).__name__
    return "ok"
"""
CARD = "---\nbase_model: org/base\nbase_model_relation: adapter\nlibrary_name: peft\ntags: [lora]\n---\n# A card\n"
WEIGHTS = bytes(range(256)) * 64
ADAPTER = {  # the files of an adapter as the Hub sees them; the weights are no real ones
    "README.md": CARD.encode(),
    "adapter_config.json": b'{"base_model_name_or_path": "org/base", "peft_type": "LORA"}',
    "adapter_model.safetensors": WEIGHTS,
}
OWN_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_")  # the developer's own must not reach the client under test


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A fresh Hub whose user is ``me``; it fails the test when the server itself failed."""
    with HubServer() as server:
        yield server


def client_env(
    server: HubServer, home: Path, token: str | None = None, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a client process: endpoint, cache and token as a user would set them before any import.

    ``token`` None means the token of the server's user, "" means none at all.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OWN_SETTINGS) and not k.lower().endswith("_proxy")}
    mine = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # Xet has a protocol of its own; without it uploads are plain LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    login = server.token if token is None else token
    return kept | mine | ({"HF_TOKEN": login} if login else {}) | dict(env or {})


def run_client(
    server: HubServer,
    code: str,
    *,
    home: Path,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process that takes ``server`` for the Hub and ``home`` for its cache.

    Nothing is checked: the caller looks at ``returncode``, ``stdout`` and ``stderr``. subprocess.TimeoutExpired after
    ``timeout`` seconds of a usual machine.
    """
    environment = client_env(server, home, token, env)
    call, longest = [sys.executable, "-c", code], limit(timeout)
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=longest, check=False)


def ask_client(
    server: HubServer, code: str, home: Path, names: Mapping[str, object] | None = None, *, token: str | None = None
) -> Any:
    """Run code after ``PRELUDE`` with ``names`` defined; returns the JSON that it printed last.

    ``token`` is as in `client_env`.

    AssertionError with the client's stderr when it failed.
    """
    constants = "".join(f"{name} = {value!r}\n" for name, value in (names or {}).items())
    done = run_client(server, PRELUDE + constants + code, home=home, token=token)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])

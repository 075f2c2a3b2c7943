"""What every test shares."""

from __future__ import annotations

import gc
import logging
import os
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import safetensors.torch
import torch
from hub_fixtures import hub  # noqa: F401 (a fixture)

from peft_lorasuite.compat import has

if not has("safetensors", "0.8"):  # it writes into the old file, which a test that changes a file has mapped
    safetensors.torch.load_file = lambda file, device="cpu": safetensors.torch.load(Path(file).read_bytes())

ALWAYS = "tests/models/test_second_device.py"
"""Slow tests that no part leaves out: nothing else notices a tensor that was left on the CPU."""


def pytest_addoption(parser):
    parser.addoption("--all-pairs", action="store_true", help="run every pair of families and write the table of docs/")
    parser.addoption("--part", type=int, default=1, metavar="N", help="run one of N cases of the slow tests")


def pytest_collection_modifyitems(config, items):
    """Mark the tests of ``slow.txt`` as slow: they run for over about five seconds on two cores."""
    slow = set((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").split())
    part, dropped = config.getoption("part"), []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in slow:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") is None or name.startswith(ALWAYS):
            continue
        # a hash, since every N-th in a row could be the same change of each family
        if zlib.crc32(item.nodeid.encode()) % part:
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish():
    """Exclude the imported libraries from garbage collection, which takes .2 s with them, four times an upgrade."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _seeded_fixtures():
    """Start the random numbers of every module anew: its fixtures do not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    """The same for every test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_log_level():
    """Undo the level that a command of another test or fixture has set for the process, such as that of ``-q``."""
    logging.getLogger("peft_lorasuite").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _own_map_cache(tmp_path_factory, monkeypatch):
    """Give every test an empty cache of upgrade maps."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("hf_home")))

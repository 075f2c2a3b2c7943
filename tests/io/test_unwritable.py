"""Writes that are not what the user asked for: where they fail, the work goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import command_fixtures
import pytest
from command_fixtures import Pair
from huggingface_hub import constants

from peft_lorasuite import LoraSuiteError, UpgradeMap, upgrade_many
from peft_lorasuite.cli.main import main
from peft_lorasuite.mapping.upgrade_map import MapOptions
from peft_lorasuite.methods.sections import add_section
from peft_lorasuite.models import activations
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.planning.plan import Rates, measure_rates
from peft_lorasuite.progress import progress_bars
from peft_lorasuite.upgrading.map_cache import load_or_build_map

pair = command_fixtures.pair
JOURNAL_BYTES = 2**16


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files: writing beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", ["read-only", "a file", "full"])
def test_e_a_cache_that_cannot_be_written(
    kind: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Section E: a cache that cannot be written; the built map is used."""
    if kind == "read-only" and not Path("/sys/kernel").is_dir():
        pytest.skip("no read-only file system")
    home = Path("/sys") if kind == "read-only" else tmp_path / "home"
    if kind == "a file":
        home.write_text("mine")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    options = MapOptions(tokens=64)
    with largest_file(2**12 if kind == "full" else 2**30), caplog.at_level(logging.WARNING, "peft_lorasuite"):
        built = load_or_build_map(Backbone.open(pair.old), Backbone.open(pair.new), options, methods=["cross-lora"])
    assert (len(built.layers), list(built.sections)) == (3, ["svd"])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("the upgrade map is not cached, and the next run builds it again: ")
    if kind == "full":
        assert list(home.rglob("*.*")) == []


def test_e_a_journal_that_cannot_be_written(pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Section E: `upgrade_many` with a journal that cannot be written: one warning, and all results."""
    names = [tmp_path / f"adapter-{number}" for number in range(3)]
    for name in names:
        name.symlink_to(pair.adapter)
    out = tmp_path / "out"
    out.mkdir()
    line = json.dumps({"adapter": "x", "status": "failed", "folder": "x"})
    (out / "journal.jsonl").write_text((line + "\n").ljust(JOURNAL_BYTES - 1, " ") + "\n")
    with largest_file(JOURNAL_BYTES), caplog.at_level(logging.WARNING, "peft_lorasuite"):
        outcomes = upgrade_many(names, pair.map, out, method="lorasuite")
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    assert all((out / name.name / "adapter_model.safetensors").is_file() for name in names)
    warnings = [record.getMessage() for record in caplog.records if "journal cannot be written" in record.getMessage()]
    assert len(warnings) == 1
    assert [one.status for one in upgrade_many(names, pair.map, out, method="lorasuite")] == ["done"] * 3
    assert [one.status for one in upgrade_many(names, pair.map, out, method="lorasuite")] == ["kept"] * 3


def test_facts_that_are_no_json_do_not_stop_a_collection(pair: Pair, tmp_path: Path) -> None:
    (outcome,) = upgrade_many([pair.adapter], pair.map, tmp_path, method="lorasuite", then=lambda *_: {"at": tmp_path})
    assert outcome.status == "done"
    assert json.loads((tmp_path / "journal.jsonl").read_text())["facts"]["at"] == str(tmp_path)


def test_a_map_is_saved_where_files_cannot_be_linked(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = add_section(UpgradeMap.load(pair.map), "cross-lora", pair.old, pair.new)
    built.save(tmp_path / "map")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    UpgradeMap.load(tmp_path / "map").save(tmp_path / "map", overwrite=True)
    UpgradeMap.load(tmp_path / "map").sections["svd"].check()


def test_progress_that_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    with suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails
        monkeypatch.setattr(sys, "stderr", full)
        steps = [time.sleep(1.1) for _ in progress_bars("waiting", range(3))]
    assert len(steps) == 3


def test_standard_error_that_cannot_be_written(pair: Pair, tmp_path: Path) -> None:
    """As with a full disk for the log: bars of transformers, messages and warnings are lost, the result is not."""
    call = ["upgrade", str(pair.adapter), "--to", str(pair.new), "--method", "lorasuite", "-o", str(tmp_path / "out")]
    full = os.open("/dev/full", os.O_WRONLY)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "peft_lorasuite", *call]
    done = subprocess.run(words, stderr=full, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(full)
    assert done.returncode == 0
    assert "wrote" in done.stdout


def test_text_that_cannot_be_printed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text about an output may be lost; the result itself may not."""
    call = ["upgrade", str(pair.adapter), "--to", str(pair.new), "--map", str(pair.map), "--method", "lorasuite"]
    codes = []
    for words in ([*call, "-o", str(tmp_path / "out")], [*call, "-o", str(tmp_path / "json"), "--json"], ["families"]):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            codes.append(main(words))
    assert codes == [0, 1, 1]
    assert capsys.readouterr().err.count("the result cannot be printed: No space left on device") == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_no_space_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate goes on with the default; activations that do not fit in memory are an error, not a crash."""
    monkeypatch.setattr(activations, "BUDGET", 0)
    with largest_file(2**12):
        assert measure_rates().read == Rates().read
        with pytest.raises(LoraSuiteError, match=r"nothing was written: .*check the free space"):
            activations.allocate((2, 2**12), activations.torch.float32)

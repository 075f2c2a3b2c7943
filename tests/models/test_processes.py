"""Two processes give what one gives: maps, fine-tuning with DDP and FSDP, distillation, collections."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
import torch
from command_fixtures import ITEMS, Pair
from patience import limit
from processes import launched, program
from safetensors.torch import load_file

from peft_lorasuite import Backbone, PeftModel
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.cli.main import main
from peft_lorasuite.io.source import Source
from peft_lorasuite.upgrading.collection import upgrade_many

pair = command_fixtures.pair
CLOSE = 1e-6
"""What sums in another order may differ by, in float32."""
FSDP_ON_CPU = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft_lorasuite.cli.main import main

started = PartialState.__init__

def start(self, *words, **settings):
    started(self, *words, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = start
sys.exit(main(sys.argv[1:]))
"""
"""accelerate switches FSDP on for processes with GPUs alone; torch's own FSDP2 runs on the CPU as well."""
SUM_ON_ANOTHER_DEVICE = """
import torch
from accelerate import PartialState
from peft_lorasuite.models.distributed import runs_on_cpu, sum_across_processes

PartialState(cpu=runs_on_cpu()).device = torch.device("meta")
sum_across_processes(torch.ones(2, 3))
"""
"""nccl adds on GPUs alone. Without one, a device that holds no data says that the tensor was there to be added."""
COLLECTION = """
import sys
from peft_lorasuite import UpgradeMap
from peft_lorasuite.upgrading.collection import upgrade_many

*adapters, upgrade_map, out = sys.argv[1:]
for one in upgrade_many(adapters, upgrade_map, out, method="lorasuite"):
    sys.stdout.write(f"{one.status} {one.folder}\\n")
"""


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def largest_difference(left: Path, right: Path) -> float:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def call(*words: Any) -> None:
    assert main([str(word) for word in (*words, "-q")]) == 0


@pytest.fixture(scope="module")
def trained_alone(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter, fine-tuned in one process on batches of eight."""
    out = tmp_path_factory.mktemp("alone") / "out"
    call(*finetune(pair, out, 8))
    return out


def finetune(pair: Pair, out: Path, batch: int) -> list[Any]:
    data = out.parent / "data.json"
    data.write_text(json.dumps(ITEMS * 4))
    words = ["finetune", pair.adapter, "--data", data, "--samples", 24, "--epochs", 1, "--batch-size", batch]
    return [*words, "-o", out]


def test_a_map_is_the_same_to_the_last_bit_and_reported_once(pair: Pair, tmp_path: Path) -> None:
    words = ["map", pair.old, pair.new, "-o", tmp_path / "map", "--calibration", pair.text, "--tokens", 512]
    done = launched("-m", "peft_lorasuite", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    alone, both = (load_file(folder / "core.safetensors") for folder in (pair.map, tmp_path / "map"))
    assert alone.keys() == both.keys()
    assert all(bool((alone[name] == both[name]).all()) for name in alone)


def test_a_sum_goes_over_the_device_of_the_process(tmp_path: Path) -> None:
    done = launched(program(tmp_path, SUM_ON_ANOTHER_DEVICE))
    assert "Cannot copy out of meta tensor" in done.stderr


def test_an_error_is_reported_once(pair: Pair, tmp_path: Path) -> None:
    done = launched("-m", "peft_lorasuite", "map", pair.old, tmp_path / "nowhere", "-o", tmp_path / "map")
    assert done.returncode != 0
    assert done.stderr.count("peft-lorasuite: ") == 1
    assert "backbone not found" in done.stderr
    assert not (tmp_path / "map").exists()


def test_fine_tuning_with_ddp(pair: Pair, trained_alone: Path, tmp_path: Path) -> None:
    """Four samples in each of two processes are a step of eight."""
    done = launched("-m", "peft_lorasuite", *finetune(pair, tmp_path / "out", 4))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert largest_difference(trained_alone, tmp_path / "out") < CLOSE
    assert largest_difference(trained_alone, pair.adapter) > 100 * CLOSE


def test_fine_tuning_with_fsdp_writes_whole_weights(pair: Pair, trained_alone: Path, tmp_path: Path) -> None:
    done = launched(program(tmp_path, FSDP_ON_CPU), *finetune(pair, tmp_path / "out", 4), fsdp=True)
    assert done.returncode == 0, done.stderr
    assert largest_difference(trained_alone, tmp_path / "out") < CLOSE


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_distillation(fsdp: bool, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"Name a {item['output']}." for item in ITEMS))
    words = [
        "distill", pair.adapter, "--to", pair.new, "--map", pair.map, "--prompts", tmp_path / "prompts.txt",
        "--set", "length=6", "--set", "epochs=1", "--set", "extra=50",
    ]  # fmt: skip
    call(*words, "--set", "batch_size=4", "--set", "micro_batch_size=2", "-o", tmp_path / "alone")
    start = [program(tmp_path, FSDP_ON_CPU)] if fsdp else ["-m", "peft_lorasuite"]
    done = launched(*start, *words, "--set", "batch_size=2", "-o", tmp_path / "both", fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    arch = Backbone.open(pair.new).arch
    alone, both = (read_adapter(Source(str(tmp_path / name), "adapter"), arch).updates for name in ("alone", "both"))
    assert alone.keys() == both.keys()
    for key, update in alone.items():  # the factors themselves are free to turn
        assert (update.delta_weight() - both[key].delta_weight()).norm() < 1e-4 * update.delta_weight().norm(), key


def test_a_killed_collection_goes_on_where_it_stopped(pair: Pair, tmp_path: Path) -> None:
    names = [str(tmp_path / f"adapter-{number}") for number in range(40)]
    for name in names:
        Path(name).symlink_to(pair.adapter)
    out = tmp_path / "out"
    words = [sys.executable, program(tmp_path, COLLECTION), *names, pair.map, out]
    worker = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + limit(120)
    while not (journal.is_file() and journal.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    kept = journal.read_text().count('"done"')
    assert 3 <= kept < len(names)
    again = upgrade_many(names, pair.map, out, method="lorasuite")
    assert [one.status for one in again].count("kept") == kept
    assert [one.status for one in again].count("done") == len(names) - kept
    assert {largest_difference(out / names[0].rpartition("/")[2], out / one.folder) for one in again} == {0.0}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_through_the_public_calls(device_map: Any, pair: Pair, tmp_path: Path) -> None:
    if isinstance(device_map, str):
        words = ["map", pair.old, pair.new, "-o", tmp_path / "map", "--calibration", pair.text, "--tokens", 512]
        call(*words, "--device-map", device_map)
        alone, placed = (load_file(folder / "core.safetensors") for folder in (pair.map, tmp_path / "map"))
        assert all(bool((alone[name] == placed[name]).all()) for name in alone)
    ids = torch.tensor([[3, 4, 5]])
    logits = [
        PeftModel.from_upgraded(
            pair.new, pair.adapter, upgrade_map=pair.map, method="lorasuite", device_map=chosen
        )(ids).logits
        for chosen in (None, device_map)
    ]  # fmt: skip
    torch.testing.assert_close(*logits)


def test_a_collection_is_dealt_out_and_a_second_run_keeps_it(pair: Pair, tmp_path: Path) -> None:
    names = [tmp_path / f"adapter-{number}" for number in range(5)]
    for name in names:
        name.symlink_to(pair.adapter)
    words = [program(tmp_path, COLLECTION), *names, pair.map, tmp_path / "out"]
    done = launched(*words)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("done "))
    assert lines == [f"done adapter-{number}" for number in range(5)]
    journals = sorted(path.name for path in (tmp_path / "out").glob("journal*.jsonl"))
    assert journals == ["journal-0.jsonl", "journal-1.jsonl"]
    assert len((tmp_path / "out" / journals[0]).read_text().splitlines()) == 3
    again = upgrade_many(names, pair.map, tmp_path / "out", method="lorasuite")
    assert {one.status for one in again} == {"kept"}

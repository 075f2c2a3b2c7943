"""All computations on a second device, and that a tensor left on the CPU is an error there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_lorasuite

PACKAGE = Path(peft_lorasuite.__file__).parent
SUPPORT = Path(__file__).parents[1] / "support"


def run(device: str, package: Path = PACKAGE) -> subprocess.CompletedProcess[str]:
    """Run the steps in a process of their own: a device is registered once per process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(package.parent), str(SUPPORT)])}
    call = [sys.executable, "-W", "ignore", str(SUPPORT / "device_steps.py"), device]
    return subprocess.run(call, capture_output=True, text=True, env=env, check=False)


def test_every_step_gives_the_same_figures_on_a_second_device():
    found = {}
    for device in ("cpu", "second"):
        done = run(device)
        assert done.returncode == 0, done.stderr[-2000:]
        found[device] = json.loads(done.stdout.splitlines()[-1])
    assert found["second"] == pytest.approx(found["cpu"], rel=0.02)
    assert all(found["cpu"].values())


@pytest.mark.parametrize(
    ("module", "removed"),
    [("models/activations.py", ".to(model.device)"), ("training/scoring.py", ".to(model.device)")],
)
def test_a_tensor_that_stays_on_the_cpu_is_an_error(module, removed, tmp_path):
    package = tmp_path / "peft_lorasuite"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / module).read_text(encoding="utf-8")
    assert removed in text
    (package / module).write_text(text.replace(removed, ""), encoding="utf-8")
    done = run("second", package)
    assert done.returncode != 0
    assert "expected all tensors on one device" in done.stderr

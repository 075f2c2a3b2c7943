"""Killed while writing: the old output or the new one is in place, and the next run deletes what was left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.io.output import check_output
from peft_lorasuite.io.temporary import HOST, OTHER_HOST_DAYS, UNLOCKED, remove_leftovers, temporary_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SWEEP = """
import sys
from pathlib import Path
sys.path.insert(0, BENCHMARKS)
from killing import count_steps, finish, fork, kill_at
from peft_lorasuite.io import output

root = Path(ROOT)
place, log = root / "place", root / "log"
if TWO_RENAMES:
    output.exchange = lambda one, other: False  # as on a file system that cannot do it
names = {text: sorted(f"{text}{number}.txt" for number in range(2)) for text in ("one", "two")}

def write(text):
    with output.atomic_folder(place / "out", overwrite=True) as part:
        for name in names[text]:
            (part / name).write_text(text)
    output.write_file(place / "page.html", text)
    return 0

def listing():
    return sorted(path.name for path in (place / "out").iterdir()) if (place / "out").is_dir() else None

def run(work):
    assert finish(fork(work, log)) == 0, log.read_text()
    assert sorted(path.name for path in place.iterdir()) == ["out", "page.html"], list(place.iterdir())

place.mkdir()
run(lambda: write("one"))
steps, _ = count_steps(lambda: write("two"), place, log)
seen = []
for step in range(steps):
    new, old = ("one", "two") if step % 2 == 0 else ("two", "one")
    assert kill_at(step, lambda: write(new), place, log), step
    found = {None: "moved"} | {tuple(files): text for text, files in names.items()}
    states = [found[listing() and tuple(listing())], (place / "page.html").read_text()]
    seen.append(" ".join({old: "old", new: "new"}.get(state, state) for state in states))
    run(lambda: [output.check_output(place / "out", overwrite=True)] and 0)
    assert listing() == names[old if states[0] == "moved" else states[0]]
    run(lambda: write(new))
    assert listing() == names[new]
print(len(seen), *sorted(set(seen)), sep="\\n")
"""


@pytest.mark.parametrize("two_renames", [False, True], ids=["exchange", "two renames"])
def test_e_killed_before_any_step_of_writing_an_output(two_renames: bool, tmp_path: Path) -> None:
    """Section E: `--overwrite` killed between its two renames; temporary folders of killed runs."""
    values = f"ROOT, BENCHMARKS, TWO_RENAMES = {str(tmp_path)!r}, {str(BENCHMARKS)!r}, {two_renames}\n"
    done = subprocess.run([sys.executable, "-c", values + SWEEP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps, *seen = done.stdout.splitlines()
    assert int(steps) > 15
    assert seen == [*["moved old"] * two_renames, "new new", "new old", "old old"]


HOLD = """
import sys
from pathlib import Path
from peft_lorasuite.io.temporary import TemporaryFolder
folders = [TemporaryFolder(), *(TemporaryFolder(Path(place)) for place in sys.argv[1:])]
for folder in folders:
    (folder.path / "weights").write_text("half")
print("ready", flush=True)
sys.stdin.read()
"""


def test_e_temporary_folders_of_killed_runs_are_deleted_and_of_live_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to the output; in it, as after a run whose output was a folder inside this one; among temporary files."""
    out, scratch = tmp_path / "place" / "out", tmp_path / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    words = [sys.executable, "-c", HOLD, str(out.parent), str(out)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    with pytest.raises(LoraSuiteError, match="the output folder is not empty"):
        check_output(out)
    with temporary_folder():
        pass
    left = [len(list(place.glob("*peft-lorasuite-*/new/weights"))) for place in (out.parent, out, scratch)]
    assert left == [1, 1, 1]
    holder.kill()
    holder.communicate()
    check_output(out)
    with temporary_folder():
        pass
    assert sorted(tmp_path.rglob("*")) == [out.parent, out, scratch]


def leftover(place: Path, name: str = f".peft-lorasuite-{HOST}-abcdefgh") -> Path:
    """Write a folder as a killed run leaves it."""
    (place / name / "new").mkdir(parents=True)
    (place / name / "lock").touch()
    (place / name / "new" / "weights").write_text("half")
    return place / name


def test_e_what_the_package_has_not_made_is_not_deleted(tmp_path: Path) -> None:
    ours = leftover(tmp_path)
    kept = [
        leftover(tmp_path, f".peft-lorasuite-{HOST}-notes"),
        leftover(tmp_path, f".peft-lorasuite-{HOST}-abcdefgh.bak"),
        leftover(tmp_path, f".peft-lorasuite-{'0' * 8}-abcdefgh"),  # of another machine, which may be using it
        leftover(tmp_path, f".peft-lorasuite-{HOST}-mine0000"),
        leftover(tmp_path, f".peft-lorasuite-{HOST}-nolock00"),  # on a file system without locks
    ]
    (kept[3] / "notes.txt").write_text("mine")
    (kept[4] / UNLOCKED).touch()
    elsewhere = leftover(tmp_path / "elsewhere")
    (tmp_path / f".peft-lorasuite-{HOST}-linked00").symlink_to(elsewhere)
    remove_leftovers(tmp_path)
    assert not ours.exists()
    assert all((path / "new" / "weights").is_file() for path in (*kept, elsewhere))
    old = time.time() - (OTHER_HOST_DAYS + 1) * 24 * 3600
    for path in (kept[2], *kept[2].rglob("*")):
        os.utime(path, (old, old))
    remove_leftovers(tmp_path)
    assert [path.exists() for path in kept] == [True, True, False, True, True]


def test_a_folder_is_locked_by_the_process_that_uses_it(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        remove_leftovers(tmp_path)
        assert folder.is_dir()
        with temporary_folder(tmp_path) as other:
            assert folder.is_dir()
            assert folder != other
    assert list(tmp_path.iterdir()) == []


SIDE_BY_SIDE = """
import os, sys, time
from pathlib import Path
from peft_lorasuite.io import output
os.fsync = lambda handle: None  # more outputs a second
target, end, number = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    number += 1
    with output.atomic_folder(target, overwrite=True) as part:
        (part / "number").write_text(str(number))
    assert (target / "number").read_text() == str(number)
"""


def test_outputs_that_are_written_side_by_side_while_others_are_killed(tmp_path: Path) -> None:
    """A folder that is being created is not taken for a leftover of the runs that are killed."""
    words = [sys.executable, "-c", SIDE_BY_SIDE]
    steady = [
        subprocess.Popen([*words, str(tmp_path / name), "5"], stderr=subprocess.PIPE, text=True) for name in "abc"
    ]
    while any(worker.poll() is None for worker in steady):
        killed = subprocess.Popen([*words, str(tmp_path / "killed"), "60"])
        time.sleep(0.4)
        killed.kill()
        killed.wait()
    assert [worker.communicate()[1] for worker in steady] == [""] * 3
    with temporary_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "killed"]

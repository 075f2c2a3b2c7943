"""A folder that appears whole or not at all: what goes wrong in the block, and what others do meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.io.output import atomic_folder, check_output_file, write_file


def filled(target: Path, text: str) -> Path:
    target.mkdir()
    (target / "old.txt").write_text(text)
    return target


def test_a_new_folder_takes_the_old_ones_place(tmp_path: Path) -> None:
    target = filled(tmp_path / "out", "before")
    with atomic_folder(target, overwrite=True) as part:
        (part / "new.txt").write_text("after")
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_there_comes_back_when_the_swap_fails(tmp_path: Path) -> None:
    target = filled(tmp_path / "out", "before")
    with (
        pytest.raises(LoraSuiteError, match="nothing was written: No such file"),
        atomic_folder(target, overwrite=True) as part,
    ):
        shutil.rmtree(part)  # a cleaner of temporary files was faster
    assert (target / "old.txt").read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_what_another_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(LoraSuiteError, match="the output folder is not empty"), atomic_folder(target):
        filled(target, "another's")
    assert (target / "old.txt").read_text() == "another's"
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_input_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"), atomic_folder(tmp_path / "out"):
        (tmp_path / "absent.txt").read_text()
    with pytest.raises(ConnectionError), atomic_folder(tmp_path / "out"):
        raise ConnectionError("the Hub went away")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    info = r"nothing was written: .*; check the free space and the permissions"
    with pytest.raises(LoraSuiteError, match=info), atomic_folder(tmp_path / "out") as part:
        (part / ("long" * 100)).write_text("")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_as_a_whole_and_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("before")
    (tmp_path / "link.html").symlink_to("page.html")
    with pytest.raises(LoraSuiteError, match="the output file exists"):
        check_output_file(tmp_path / "link.html")
    write_file(check_output_file(tmp_path / "link.html", overwrite=True), "after")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text() == "after"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for write in (check_output_file, lambda path: write_file(path, "text")):
        with pytest.raises(LoraSuiteError, match="the output is not a regular file"):
            write(tmp_path / "pipe")
        with pytest.raises(LoraSuiteError, match=r"the path cannot be accessed: .*null"):
            write(tmp_path / "a\0b")
    assert (tmp_path / "pipe").is_fifo()


def test_files_and_folders_are_on_the_disk_before_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power then leaves the old content or the new one, as a kill does."""
    target = filled(tmp_path / "out", "before")
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(handle: int) -> None:
        fsync(handle)
        done = (target / "new.txt").exists()
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().name, done))

    monkeypatch.setattr(os, "fsync", record)
    with atomic_folder(target, overwrite=True) as part:
        (part / "below").mkdir()
        for path in (part / "new.txt", part / "below" / "other.txt"):
            path.write_text("after")
    before = {name for name, done in synced if not done}
    assert before == {"new", "below", "new.txt", "other.txt"}
    assert [name for name, done in synced if done] == [tmp_path.name]

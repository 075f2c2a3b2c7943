"""The tasks of benchmarks/hard.py: what their rules accept, and what keeps test items apart from training."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import benchmark_modules
from safetensors.torch import load_file, save_file

NAMES = ("intents", "tools", "sql", "dialect", "persona", "chains")


@pytest.fixture(scope="module")
def programs() -> Any:
    """The modules benchmarks/hard.py and benchmarks/hard_tasks.py."""
    with benchmark_modules("hard", "hard_tasks") as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with solved problems."""
    solved = [{"instruction": f"What is {n} plus 1?", "output": f"{n} + 1 = {n + 1}"} for n in range(2500)]
    (tmp_path / "math_data.json").write_text(json.dumps(solved))
    return tmp_path


def task_of(programs: Any, name: str, data: Path) -> Any:
    return programs[1].TASKS[name] if name in programs[1].TASKS else programs[1].chains_of(data)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_right_and_other_answers_are_wrong(programs: Any, name: str, data: Path) -> None:
    task = task_of(programs, name, data)
    items = task.make(200, True, 5)
    assert len({json.dumps(item[:-1]) for item in items}) == 200
    assert all(task.right(item[-1]["content"], item) for item in items)
    assert not any(task.right(wrong, item) for item in items for wrong in ("", "I do not know.", "{}", "SELECT 1"))
    others = [task.right(left[-1]["content"], right) for left, right in pairwise(items)]
    assert sum(others) < 30  # the answer to another item; a code is right for one in 20


@pytest.mark.parametrize("name", ["intents", "tools", "sql"])
def test_test_items_have_wordings_of_their_own(programs: Any, name: str, data: Path) -> None:
    task = task_of(programs, name, data)
    known, test = ({item[-2]["content"] for item in task.make(400, part, 0)} for part in (False, True))
    assert not known & test


def test_a_query_is_judged_by_its_rows_and_cannot_write_or_run_on(programs: Any) -> None:
    item = [{"role": "assistant", "content": "SELECT title FROM books WHERE year < 1940"}]
    right = programs[1].same_rows
    assert right("select title from books where 1940 > year order by pages", item)
    assert not right("SELECT title FROM books WHERE year < 1941 AND pages > 500", item)
    before = programs[1].library().execute("SELECT COUNT(*) FROM books").fetchall()
    assert not right("DELETE FROM books", item)
    assert not right("SELECT a.id FROM books a, books b, books c, books d, books e", item)
    assert programs[1].library().execute("SELECT COUNT(*) FROM books").fetchall() == before


def test_the_random_update_has_the_norm_of_the_real_one(programs: Any, tmp_path: Path) -> None:
    source = tmp_path / "transplant-0"
    source.mkdir()
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    torch.manual_seed(1)  # another one than that of the random update
    tensors = {key.format("A"): torch.randn(4, 12), key.format("B"): 3 * torch.randn(8, 4)}
    save_file(tensors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    pair = argparse.Namespace(seed=0, folder=tmp_path)
    made = load_file(programs[0].HardPair.random(pair, source) / "adapter_model.safetensors")
    old, new = (one[key.format("B")] @ one[key.format("A")] for one in (tensors, made))
    assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-4)
    assert abs(float(torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0))) < 0.5

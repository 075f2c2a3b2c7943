"""Mutated inputs of every kind end in a right result or in one error; `make fuzz` runs thousands of them."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import fuzzer
import pytest
from huggingface_hub import constants
from kinds import KINDS, Case, judge_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import World

from peft_lorasuite import LoraSuiteError

CASES, SEED, CHUNK = 300, 0, 60
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The inputs before a mutation."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated name must not be looked up on the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def keep(path: Path) -> None:
    """Mutate nothing."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "names"])
def test_the_inputs_are_accepted_as_they_are(kind: str, world: World, tmp_path: Path) -> None:
    """Otherwise every case would be refused for another reason than its mutation."""
    for number in range(8):
        place = tmp_path / str(number)
        (place / "out").mkdir(parents=True)
        outcome = fuzzer.run_kind(world, kind, number, random.Random(number), place, keep)
        assert outcome.verdict in ("same", "valid"), outcome


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_mutated_inputs_are_refused_or_give_a_right_result(first: int, world: World, tmp_path: Path) -> None:
    outcomes = list(fuzzer.run_cases(world, range(first, first + CHUNK), SEED, tmp_path))
    assert fuzzer.faults(outcomes) == []
    counts = {verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("refused", "same")}
    assert min(counts.values()) > 0, counts


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "other values": (lambda t: t[B].mul_(1.05), "the result is not what PEFT makes of the input"),
    "not finite": (lambda t: t[B].fill_(float("nan")), "the result is not finite"),
    "lost": (lambda t: t.pop(B), "PEFT does not use all tensors of the result"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_the_oracle_finds_a_wrong_result(kind: str, world: World, tmp_path: Path) -> None:
    change, message = SPOILED[kind]
    out = Path(shutil.copytree(world.returned["lora"], tmp_path / "out"))
    assert judge_adapter(world, world.adapter("lora"), out, "lora", "old") == "same"
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    assert judge_adapter(world, world.adapter("lora"), out, "lora", "old").startswith(f"wrong: {message}")


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


def writing(place: Path) -> Callable[[], object]:
    def call() -> object:
        (place / "left").write_text("half")
        raise LoraSuiteError("refused")

    return call


def test_the_oracle_finds_calls_that_fail_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "LIMIT", 0.2)
    calls: dict[str, Callable[[], object]] = {
        "refused": raising(LoraSuiteError("refused")), "traceback": raising(KeyError("a")),
        "error": raising(ValueError("no error of the project")), "hang": lambda: time.sleep(5),
        "written": writing(tmp_path), "same": lambda: None,
    }  # fmt: skip
    for wanted, call in calls.items():
        case = Case(call, tmp_path, lambda: "same")
        assert fuzzer.judge_case(case, tmp_path, random.Random(0))[0] == wanted
    shown = Case(lambda: print("a\x1b[2J"), tmp_path, lambda: "same")  # noqa: T201
    assert fuzzer.judge_case(shown, tmp_path, random.Random(0))[0] == "error"

"""The same inputs and seed give the same bytes, map and adapter, on one machine with one number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peft_lorasuite import MapOptions, UpgradeMap, upgrade
from peft_lorasuite.methods.sections import add_section
from peft_lorasuite.models import activations
from peft_lorasuite.text.vocabulary import plain_vocabulary

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "small", "big", "runs", "sleeps"]
PROMPTS = [f" the {a} {b} {c} ." for a in WORDS[:2] for b in WORDS[2:6] for c in WORDS[8:]]
SMALL: dict[str, dict[str, Any]] = {
    "lorasuite": {},
    "cross-lora": {"rank": 4},
    "transplant": {"length": 6, "extra": 50, "anchor_tokens": 40},
    "distill": {"length": 6, "extra": 50, "epochs": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = pico_tokenizer(WORDS)
    save_backbone(root / "old", pico_model("llama", seed=1), tokenizer)
    save_backbone(root / "new", pico_model("qwen2", seed=2, hidden_size=48, intermediate_size=64), tokenizer)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(pico_model("llama", seed=1), config).save_pretrained(root / "adapter")
    return root


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def build(root: Path, folder: Path) -> UpgradeMap:
    options = MapOptions(layer_map="cka", tokens=60, block=20)
    pair = root / "old", root / "new"
    built = UpgradeMap.build(*pair, options, calibration=[" ".join(WORDS)] * 8)
    built = add_section(built, "cross-lora", *pair)
    built.save(folder)
    return built


def test_maps_and_adapters_come_out_the_same_to_the_last_bit(folders: Path, tmp_path: Path) -> None:
    maps = [build(folders, tmp_path / name) for name in ("first", "second")]
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second") != {}
    for method, options in SMALL.items():
        for name, upgrade_map in zip(("one", "two"), maps, strict=True):
            upgraded = upgrade(
                folders / "adapter", upgrade_map, method=method, options=options, old=folders / "old",
                new=folders / "new", prompts=PROMPTS, seed=3,
            )  # fmt: skip
            upgraded.save(tmp_path / f"{method}-{name}")
        found = [bytes_of(tmp_path / f"{method}-{name}") for name in ("one", "two")]
        assert found[0] == found[1] != {}, method


def same(left: UpgradeMap, right: UpgradeMap, tolerance: float) -> None:
    """Two maps match the same things, with figures within a tolerance."""
    assert left.pairs == right.pairs
    torch.testing.assert_close(left.similarity, right.similarity, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.hidden, right.hidden, rtol=tolerance, atol=tolerance)
    for one, two in zip(left.layers, right.layers, strict=True):
        assert torch.equal(one.heads, two.heads)
        assert torch.equal(one.units, two.units)
        for part, fit in one.head_fits.items():
            torch.testing.assert_close(fit.T, two.head_fits[part].T, rtol=tolerance, atol=tolerance)


def test_the_size_of_a_batch_changes_nothing(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [build(folders, tmp_path / "whole")]
    for size in (11, 64):
        monkeypatch.setattr(activations, "BATCH_TOKENS", size)
        maps.append(build(folders, tmp_path / str(size)))
    for other in maps[1:]:
        same(maps[0], other, 1e-5)


def test_another_number_of_threads_changes_no_more_than_rounding_does(folders: Path, tmp_path: Path) -> None:
    threads, maps = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            maps.append(build(folders, tmp_path / str(count)))
    finally:
        torch.set_num_threads(threads)
    same(maps[0], maps[1], 1e-5)


def test_of_several_tokens_for_one_text_the_first_id_counts_whatever_the_order_of_the_vocabulary() -> None:
    """The order in which a tokenizer lists its vocabulary differs from process to process, so that one run shows it."""
    words = [f"word{number}" for number in range(40)]
    listed = [f"Ġ{word}" for word in words] + [f" {word}" for word in words]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *listed])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))
    plain = plain_vocabulary(tokenizer)
    assert [plain[f" {word}"] for word in words] == list(range(1, 41))

"""Files of a backbone that are malformed on purpose: one sentence, before a model is built."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
import torch
from command_fixtures import Pair, refused
from patience import limit
from pico import pico_model
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.models.backbone import Backbone

pair = command_fixtures.pair
UP = "model.layers.1.mlp.up_proj.weight"


def write_json(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


def sharded(folder: Path, **places: str) -> None:
    """Split the weights into two shards; ``places`` is added to the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + (name == UP)}-of-00002.safetensors" for name in tensors}
    for shard in set(shards.values()):
        own = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        save_file(own, folder / shard, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", metadata={}, weight_map=shards | places)


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensor}, folder / "model.safetensors", {"format": "pt"})


def to_fp8(folder: Path) -> None:
    """Store a projection in fp8 without scales; every layer's, because one new layer has no match."""
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "up_proj" in name:
            with_tensor(folder, name, tensor.to(torch.float8_e4m3fn))


FIRST, EMBEDDING = "model-00001-of-00002.safetensors", "model.embed_tokens.weight"
CASES: dict[str, tuple[Any, str]] = {
    "wrong shard": (lambda f: sharded(f, **{UP: FIRST}), f"{FIRST}: malformed safetensors file"),
    "wrong shard of the embedding": (
        lambda f: sharded(f, **{EMBEDDING: "model-00002-of-00002.safetensors"}), "malformed safetensors file",
    ),
    "shard with a null byte": (lambda f: sharded(f, **{UP: "a\0.safetensors"}), f"weight_map.{UP}: control characters"),
    "shard outside": (lambda f: sharded(f, **{UP: "../a.safetensors"}), "a file name points outside its folder"),
    "shard of a number": (lambda f: sharded(f, **{UP: 5}), f"weight_map.{UP}: malformed value (got 5, wanted a string"),  # type: ignore
    "no weight map": (lambda f: write_json(f / "model.safetensors.index.json", metadata={}), "weight_map: missing"),
    "scalar embedding": (lambda f: with_tensor(f, EMBEDDING, torch.tensor(1.0)), "a weight does not fit the config"),
    "scalar projection": (lambda f: with_tensor(f, UP, torch.tensor(1.0)), "a weight does not fit the config"),
    "fp8 projections": (lambda f: to_fp8(f), "up_proj.weight: the weights are quantized (got"),
    "10,000 layers": (lambda f: write_json(f / "config.json", num_hidden_layers=10_000), "got 4 layers, wanted 10000"),
    "10^9 layers": (
        lambda f: write_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers: malformed value",
    ),
    "layers of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"num_hidden_layers": 1' + "0" * 5000 + "}"), "be read as JSON",
    ),
    "negative size": (lambda f: write_json(f / "config.json", hidden_size=-1), "hidden_size: malformed value (got -1"),
    "size as a string": (lambda f: write_json(f / "config.json", vocab_size="120"), "vocab_size: malformed value"),
    "length as a string": (
        lambda f: write_json(f / "tokenizer_config.json", model_max_length="x"), "model_max_length: malformed value",
    ),
    "tokenizer config as a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: the file must contain a JSON",
    ),
    "deep nesting": (
        lambda f: write_json(f / "config.json", deep=json.loads("[" * 300 + "]" * 300)), "json: too deeply nested",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_e_a_hostile_backbone(kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CASES[kind]
    broken = Path(shutil.copytree(pair.new, tmp_path / "new"))
    change(broken)
    start = time.perf_counter()
    call = ["map", pair.old, broken, "-o", tmp_path / "place" / "out", "--calibration", pair.text, "--tokens", 256]
    info = refused(tmp_path, capsys, *call)
    assert message in info
    assert info.strip().isprintable()
    assert time.perf_counter() - start < limit(10)


def test_e_more_layers_than_the_checkpoint_has(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command checks it before transformers builds the layers."""
    broken = Path(shutil.copytree(pair.old, tmp_path / "old"))
    write_json(broken / "config.json", num_hidden_layers=10_000)
    out = tmp_path / "place" / "out"
    for call in (
        ["finetune", pair.adapter, "--base", broken, "--data", pair.data, "-o", out],
        ["upgrade", pair.adapter, "--from", broken, "--to", pair.new, "-o", out],
        ["chat", "--base", broken, "--adapter", pair.adapter, "--prompt", "a"],
    ):
        assert "the checkpoint has fewer layers than its config (got 3 layers" in refused(tmp_path, capsys, *call)
    with pytest.raises(LoraSuiteError, match="fewer layers"):
        Backbone.open(broken).load()
    assert Backbone.open(pico_model("llama")).load() is not None


@pytest.mark.parametrize("value", [3e38, -1e20, float("nan")])
def test_weights_whose_products_overflow(value: float, pair: Pair, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(pair.new, tmp_path / "new"))
    tensors = load_file(broken / "model.safetensors")
    tensors[UP][3, 4] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraSuiteError, match=r"1.mlp.up_proj.weight: values are (out of range|not finite)"):
        Backbone.open(broken).part(1, "up")


SCALES = {0.0: "the embedding is zero", 1e-20: "not finite: the weights of a backbone are out of range"}


@pytest.mark.parametrize("scale", SCALES)
def test_a_backbone_of_tiny_weights(
    scale: float, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(pair.new, tmp_path / "new"))
    tensors = {name: tensor * scale for name, tensor in load_file(broken / "model.safetensors").items()}
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    call = ["map", pair.old, broken, "-o", tmp_path / "place" / "out", "--layer-map", "first"]
    assert SCALES[scale] in refused(tmp_path, capsys, *call)

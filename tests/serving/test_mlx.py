"""The files of mlx-lm, read in numpy by its formula: ``y + scale * (x @ lora_a) @ lora_b``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from served import adapter, backbone, distance, load, logits

from peft_lorasuite import check, export
from peft_lorasuite.serving import mlx


def merged_logits(base, folder):
    """Logits of a backbone with mlx-lm's pairs merged, with numpy's products and transformers' forward."""
    model, tensors = load(base), load_file(folder / mlx.WEIGHTS)
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a").replace("model.h.", "transformer.h.", model.config.model_type == "gpt2")
        update = scale * (tensors[name] @ tensors[f"{name.removesuffix('a')}b"])
        weight = model.get_submodule(path).weight
        rows = update if path.endswith("embed_tokens") or type(model.get_submodule(path)).__name__ == "Conv1D" else (
            np.ascontiguousarray(update.T)
        )  # fmt: skip
        with torch.no_grad():
            weight += torch.from_numpy(rows)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("family", "kind"), [("llama", "ranks"), ("llama", "embedding"), ("qwen2", "head")])
def test_the_logits_are_those_of_peft(family, kind, tmp_path) -> None:
    base = backbone(tmp_path / "base", family)
    source = adapter(tmp_path / "adapter", base, kind)
    export(source, tmp_path / "out", engine="mlx")
    assert distance(logits(base, source), merged_logits(base, tmp_path / "out"), logits(base)) < 1e-4
    assert check(tmp_path / "out", engine="mlx").passed
    assert "files in the layout of another program" in str(check(tmp_path / "out", engine="vllm"))


def test_names_and_shapes_are_those_of_its_models(tmp_path) -> None:
    base = backbone(tmp_path / "base", "llama")
    export(adapter(tmp_path / "adapter", base, "lora"), tmp_path / "out", engine="mlx")
    tensors = load_file(tmp_path / "out" / mlx.WEIGHTS)
    assert tensors["model.layers.2.mlp.down_proj.lora_a"].shape == (48, 4)
    assert tensors["model.layers.2.mlp.down_proj.lora_b"].shape == (4, 32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_layers"] == 3
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]


def test_gpt2_has_other_names_there(tmp_path) -> None:
    import peft

    base = backbone(tmp_path / "base", "gpt2")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    source = adapter(tmp_path / "adapter", base, config)
    export(source, tmp_path / "out", engine="mlx")
    assert "model.h.0.attn.c_attn.lora_a" in load_file(tmp_path / "out" / mlx.WEIGHTS)
    assert distance(logits(base, source), merged_logits(base, tmp_path / "out"), logits(base)) < 1e-4

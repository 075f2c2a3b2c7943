"""Adapters of experts: read as PEFT writes them, today and before, and written so that PEFT loads them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_adapters import split_adapter
from pico import EXPERTS, pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.adapters.peft_model import add_adapter_strict
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.adapters.writing import write_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.models.backbone import Backbone

IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
"""PEFT looks for the patterns among the modules alone, not among the parameters that they match."""
FAMILIES = pytest.mark.parametrize("family", EXPERTS)


def adapted(folder: Path, family: str, **settings: Any) -> Tensor:
    """Write a random LoRA of experts; return the logits with it."""
    torch.manual_seed(1)
    lora = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": BOTH, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**(lora | {"init_lora_weights": False} | settings))
    model = peft.get_peft_model(pico_model(family, 1), config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def read(folder: Path, family: str) -> Adapter:
    return read_adapter(Source(str(folder), "adapter"), Backbone.open(pico_model(family, 1)).arch)


def logits(adapter: Adapter, folder: Path, family: str) -> Tensor:
    """Write an adapter and load it with PEFT, which must use every tensor; return the logits."""
    folder.mkdir()
    write_adapter(adapter.at_one_rank(), folder, base="owner/base")
    with torch.no_grad():
        return add_adapter_strict(pico_model(family, 1), folder, "test").eval()(IDS).logits


SETTINGS: dict[str, dict[str, Any]] = {
    "both parameters": {},
    "down alone": {"target_parameters": BOTH[1:]},
    "gate and up alone": {"target_parameters": BOTH[:1], "use_rslora": True},
    "experts alone": {"target_modules": []},
    "full names": {"target_parameters": [f"model.layers.1.{name}" for name in BOTH]},
    "routers": {"target_parameters": [*BOTH, "gate.weight", "router.weight"]},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r".*\.1\.mlp.*": 9}},
}


@pytest.mark.parametrize("kind", SETTINGS)
@FAMILIES
def test_what_was_read_is_written_as_peft_loads_it(family: str, kind: str, tmp_path: Path) -> None:
    wanted = adapted(tmp_path / "adapter", family, **SETTINGS[kind])
    adapter = read(tmp_path / "adapter", family)
    assert not adapter.unused
    layers = 1 if kind == "full names" else 3
    parts = {"down alone": 1, "gate and up alone": 2}.get(kind, 3)
    assert len(adapter.experts) == layers * 3 * parts + (3 if kind == "routers" else 0)
    with torch.no_grad():
        plain = pico_model(family, 1)(IDS).logits
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(adapter, tmp_path / "out", family), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_modules_of_single_experts_become_parameters(family: str, tmp_path: Path) -> None:
    changes = split_adapter(family, tmp_path / "adapter")
    adapter = read(tmp_path / "adapter", family)
    assert adapter.experts.keys() == changes.keys()
    for key, update in adapter.experts.items():
        torch.testing.assert_close(update.delta_weight(), changes[key])
    by_peft = peft.PeftModel.from_pretrained(pico_model(family, 1), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted = by_peft(IDS).logits
    torch.testing.assert_close(logits(adapter, tmp_path / "out", family), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_factors_of_peft_before_0_19_are_turned(family: str, tmp_path: Path) -> None:
    wanted = adapted(tmp_path / "adapter", family)
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        A, B = tensors[name].reshape(3, 2, -1), tensors[other].reshape(-1, 2, 3).permute(2, 0, 1)
        tensors[name] = B.mT.reshape(6, -1).contiguous()
        tensors[other] = A.mT.permute(1, 2, 0).reshape(-1, 6).contiguous()
    save_file(tensors, path)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    got = logits(read(tmp_path / "adapter", family), tmp_path / "out", family)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


BROKEN: dict[str, tuple[Any, str]] = {
    "another number of experts": (lambda name, tensor: tensor[:4] if "lora_A" in name else tensor[:, :4], r"\(3 r, "),
    "a missing factor": (lambda name, tensor: None if "lora_B" in name else tensor, "lora_A.weight and lora_B.weight"),
    "another size": (lambda name, tensor: tensor[:, :-1] if "lora_A" in name else tensor, "do not fit the experts|fit"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_do_not_fit_the_experts_are_an_error(kind: str, tmp_path: Path) -> None:
    adapted(tmp_path / "adapter", "mixtral")
    change, wanted = BROKEN[kind]
    path = tmp_path / "adapter" / WEIGHTS
    tensors = {name: change(name, one) if "experts" in name else one for name, one in load_file(path).items()}
    save_file({name: one.contiguous() for name, one in tensors.items() if one is not None}, path)
    with pytest.raises(LoraSuiteError, match=wanted):
        read(tmp_path / "adapter", "mixtral")

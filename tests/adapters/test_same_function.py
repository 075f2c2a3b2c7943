"""The old model has exactly the function that PEFT computes, for adapters as their tools save them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from random_adapter import write_random_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from versions import needs

from peft_lorasuite import Backbone, LoraSuiteError
from peft_lorasuite.adapters.loading import add_adapter
from peft_lorasuite.adapters.opening import open_adapter
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.evaluation.harness import _load_by_name
from peft_lorasuite.io.source import Source

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 20]])
Tensors = Mapping[str, Tensor]
Change = Callable[[Any, dict[str, Tensor]], Tensors]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def renamed(change: Callable[[str], str]) -> Change:
    return lambda _, tensors: {change(name): tensor for name, tensor in tensors.items()}


def with_another_adapter(own: str, other: str) -> Change:
    """Put a second adapter, of more modules, into the same file."""

    def change(_: Any, tensors: dict[str, Tensor]) -> Tensors:
        ours = {name.replace(".weight", f"{own}.weight"): tensor for name, tensor in tensors.items()}
        theirs = {name.replace(".weight", f".{other}.weight"): tensor * 3 for name, tensor in tensors.items()}
        theirs |= {name.replace("q_proj", "o_proj"): tensor for name, tensor in theirs.items() if "q_proj" in name}
        return ours | theirs

    return change


def whole(model: Any, _: Any) -> Tensors:
    return model.state_dict()


def in_memory_names(model: Any, _: Any) -> Tensors:
    return {name: one for name, one in model.state_dict().items() if "lora_" in name or name.endswith("bias")}


def trained_twice(_: Any, tensors: dict[str, Tensor]) -> Tensors:
    """Name the LoRA's tensors as in memory, and save a trained module under both of its names."""
    named = {name.replace(".weight", ".default.weight") if "lora_" in name else name: one
             for name, one in tensors.items()}  # fmt: skip
    head = tensors[f"{PREFIX}lm_head.weight"]
    return named | {f"{PREFIX}lm_head.modules_to_save.{end}": head for end in ("weight", "default.weight")}


class Case(NamedTuple):
    family: str
    config: peft.PeftConfig
    change: Change = lambda _, tensors: tensors
    sizes: Mapping[str, Any] = {}


TIED = {"tie_word_embeddings": True}
CASES = {
    "tied, embedding": Case("qwen2", lora(target_modules=["q_proj", "embed_tokens"]), sizes=TIED),
    "tied, head": Case("llama", lora(target_modules=["q_proj", "lm_head"]), sizes=TIED),
    "tied, both": Case("gemma", lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "tied, tokens": Case("qwen2", lora(trainable_token_indices=[5, 6]), sizes=TIED),
    "bias of the LoRA": Case("llama", lora(lora_bias=True)),
    "alpha by full names, FSDP inside": Case(
        "llama", lora(alpha_pattern={"model.layers.0.self_attn.q_proj": 64}),
        renamed(lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
    ),
    "alpha by full names, base model": Case(
        "llama", lora(alpha_pattern={"model.layers.0.self_attn.q_proj": 64}),
        renamed(lambda name: name.replace(f"{PREFIX}model.", PREFIX)),
    ),
    "ranks by full names, text tower": Case(
        "llama", lora(rank_pattern={"model.layers.0.self_attn.q_proj": 2}),
        renamed(lambda name: name.replace("model.layers", "model.language_model.layers")),
    ),
    "parameters, alpha by their names": Case(
        "llama", lora(target_modules=[], target_parameters=["q_proj.weight"], alpha_pattern={"q_proj.weight": 50})
    ),
    "parameters, rank by their module's name": Case(
        "llama", lora(target_modules=[], target_parameters=["q_proj.weight"], rank_pattern={"q_proj": 2})
    ),
    "two adapters, one named default": Case("llama", lora(), with_another_adapter(".default", "aaa")),
    "two adapters, one without a name": Case("llama", lora(), with_another_adapter("", "aaa")),
    "names in memory, a trained head twice": Case("llama", lora(modules_to_save=["lm_head"]), trained_twice),
    "DoRA with names in memory": Case("qwen2", lora(use_dora=True, bias="all"), in_memory_names),
    "biases in the file alone": Case("qwen2", lora(), in_memory_names),
    "whole state dict": Case("llama", lora(), whole),
    "LoHa, whole state dict": Case("llama", peft.LoHaConfig(r=4, target_modules=["q_proj"]), whole),
    "IA3, whole state dict": Case(
        "llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), whole
    ),
    "norm, text tower": Case(
        "llama", lora(modules_to_save=["norm"]),
        renamed(lambda name: name.replace("model.norm", "model.language_model.norm")),
    ),
}  # fmt: skip
"""What was saved -> family, config of the adapter, and how its file differs from PEFT's."""


def train(folder: Path, base: Path, config: peft.PeftConfig, task: str = "CAUSAL_LM", **load: Any) -> Any:
    """Save an adapter with random weights, and return the model with it."""
    config.task_type = task
    return write_random_adapter(auto(task).from_pretrained(base, **load), config, folder)


def auto(task: str) -> Any:
    import transformers

    names = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
    return getattr(transformers, names[task])


def edit(folder: Path, change: Change, model: Any = None, **config: Any) -> None:
    tensors = change(model, load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))


def base_of(folder: Path, family: str, **sizes: Any) -> Path:
    return save_backbone(folder, pico_model(family, **sizes), pico_tokenizer(["red", "cat", "sun"]))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def old_logits(folder: Path, base: Path) -> Tensor:
    backbone = Backbone.open(base, dtype="float32")
    adapter = read_adapter(Source(str(folder), "adapter"), backbone.arch, old=backbone)
    with load_with_adapter(backbone, adapter) as model:
        return logits(model)


def assert_same(got: Tensor, wanted: Tensor, bare: Tensor) -> None:
    assert (wanted - bare).norm() > 1e-3 * bare.norm(), "the adapter changes something"
    assert (got - wanted).norm() < 1e-4 * (wanted - bare).norm()


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:.*invalid shape.*", "ignore:.*did not match any.*")
@pytest.mark.parametrize("name", CASES)
def test_the_old_model_has_the_function_of_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if "tied" in name:
        needs("peft", "0.19", "this adapter")
    base = base_of(tmp_path / "base", case.family, **case.sizes)
    model = train(tmp_path / "lora", base, case.config)
    wanted, bare = logits(model), logits(auto("CAUSAL_LM").from_pretrained(base).eval())
    edit(tmp_path / "lora", case.change, model)
    assert_same(old_logits(tmp_path / "lora", base), wanted, bare)


EXPERTS = {
    "router and head": ("SEQ_CLS", {"target_modules": ["q_proj", "gate"]}),
    "parameters and tokens": (
        "CAUSAL_LM",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "trainable_token_indices": [5]},
    ),
    "parameters and head": (
        "CAUSAL_LM", {"target_modules": ["q_proj", "lm_head"], "target_parameters": ["mlp.experts.down_proj"],
                      "rank_pattern": {"lm_head": 2}, "use_rslora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_keep_their_head_and_token_tables(name: str, tmp_path: Path) -> None:
    needs("peft", "0.19", "this adapter")
    task, options = EXPERTS[name]
    settings = {"num_labels": 3, "pad_token_id": 2} if task == "SEQ_CLS" else {}
    base = base_of(tmp_path / "base", "qwen3_moe")
    model = train(tmp_path / "lora", base, lora(**options), task, **settings)
    torch.manual_seed(0)
    bare = logits(auto(task).from_pretrained(base, **settings).eval())
    assert_same(old_logits(tmp_path / "lora", base), logits(model), bare)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "_forward_module."])
def test_a_classifier_in_a_wrapper(start: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    model = train(tmp_path / "lora", base, lora(), "SEQ_CLS", num_labels=3, pad_token_id=2)
    edit(tmp_path / "lora", renamed(lambda name: start + name))
    wanted = logits(model)
    assert torch.allclose(old_logits(tmp_path / "lora", base), wanted, atol=1e-4)
    loaded, _ = open_adapter(str(tmp_path / "lora"), base=str(base))
    assert torch.allclose(logits(loaded.eval()), wanted, atol=1e-4)


def test_every_program_loads_tensors_under_other_names(tmp_path: Path) -> None:
    """PEFT only warns of names that it does not know, and initializes the adapter anew."""
    base = base_of(tmp_path / "base", "llama")
    model = train(tmp_path / "lora", base, lora(alpha_pattern={"q_proj": 64}))
    edit(tmp_path / "lora", renamed(lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod.")))
    bare, wanted = logits(auto("CAUSAL_LM").from_pretrained(base).eval()), logits(model)
    trained, _ = open_adapter(str(tmp_path / "lora"), base=str(base))  # `finetune`, and `evaluate` of classifiers
    assert_same(logits(trained), wanted, bare)
    assert any(one.requires_grad for one in trained.parameters())
    evaluated, _ = _load_by_name(str(base), str(tmp_path / "lora"), trust_remote_code=False)
    assert_same(logits(evaluated), wanted, bare)
    backbone, source = Backbone.open(base, dtype="float32"), Source(str(tmp_path / "lora"), "adapter")
    shown = add_adapter(
        backbone.load(), tmp_path / "lora", source, base=str(base), arch=lambda: backbone.arch
    )  # `chat`
    assert_same(logits(shown), wanted, bare)


def test_no_program_loads_an_adapter_without_a_tensor_of_the_backbone(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base, lora())
    edit(tmp_path / "lora", renamed(lambda name: name.replace(PREFIX, f"{PREFIX}strange.")))
    with pytest.raises(LoraSuiteError, match=r"none of the adapter's tensors belongs to the backbone .got .*strange"):
        _load_by_name(str(base), str(tmp_path / "lora"), trust_remote_code=False)


def test_several_adapters_in_one_file_are_named(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base, lora())
    edit(tmp_path / "lora", with_another_adapter(".policy", "reference"))
    with pytest.raises(LoraSuiteError, match=r"the file has several adapters .got policy, reference"):
        old_logits(tmp_path / "lora", base)


def test_a_type_that_peft_cannot_merge_is_one_line(tmp_path: Path) -> None:
    if not hasattr(peft, "LilyConfig"):
        pytest.skip("this version of PEFT has no such type")
    base = base_of(tmp_path / "base", "llama")
    train(tmp_path / "lora", base, peft.LilyConfig(target_modules=["q_proj"]))
    with pytest.raises(LoraSuiteError, match=r"PEFT cannot merge this type.*got LILY"):
        old_logits(tmp_path / "lora", base)

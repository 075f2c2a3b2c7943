"""DoRA and AdaLoRA become the same kind again: exact where old rows become new ones whole, and as LoRA anywhere."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from canon import write
from pico import pico_tokenizer, save_backbone
from planted import NEW_WORDS, OLD_WORDS
from safetensors.torch import load_file, save_file
from variants import Pair, error, logits, pair, trained, upgraded

from peft_lorasuite import LoraSuiteError, UpgradeMap, finetune, upgrade
from peft_lorasuite.adapters.dora import magnitude_ratios
from peft_lorasuite.adapters.peft_model import load_with_adapter
from peft_lorasuite.adapters.reading import read_adapter
from peft_lorasuite.io.source import Source
from peft_lorasuite.mapping.upgrade_map import MapOptions
from peft_lorasuite.methods.base import MethodInput
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.dora import transfer_ratios as moved_ratios

TOLERANCE = 1e-4
PERMUTATIONS = ("vocabulary", "permuted hidden", "permuted heads", "units")
MODULES = {
    "llama": "all-linear",
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def dora(name: str = "llama", **values: Any) -> peft.LoraConfig:
    given = {"r": 3, "lora_alpha": 5, "use_dora": True, "task_type": "CAUSAL_LM", "target_modules": MODULES[name]}
    return peft.LoraConfig(**(given | {"fan_in_fan_out": name == "gpt2"} | values))


def adalora(**values: Any) -> peft.AdaLoraConfig:
    given = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "tinit": 2, "tfinal": 3, "total_step": 12, "deltaT": 1}
    given |= {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
    return peft.AdaLoraConfig(**(given | values))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama whose hidden units, heads, units and vocabulary were permuted, and units added."""
    return pair(tmp_path_factory.mktemp("llama"), "llama", *PERMUTATIONS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """A Llama in a rotated hidden space: no DoRA of o and down can be exact there."""
    return pair(
        tmp_path_factory.mktemp("rotated"), "llama", "rotated hidden", "turned heads", tie_word_embeddings=False
    )


@pytest.mark.parametrize("name", MODULES)
def test_a_dora_becomes_a_dora_and_permutations_are_exact(name, tmp_path):
    changes = [change for change in PERMUTATIONS if name != "bloom" or change in ("vocabulary", "permuted hidden")]
    planted = pair(tmp_path, name, *changes)
    tuned = trained(tmp_path / "adapter", planted, dora(name))
    new = upgraded(tmp_path / "adapter", planted)
    assert new.peft_config["default"].use_dora
    assert error(planted, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0


def test_what_reads_the_hidden_state_is_exact_under_a_rotation_too(rotated, tmp_path):
    tuned = trained(tmp_path, rotated, dora(target_modules=["gate_proj", "up_proj"]))
    assert error(rotated, tuned, upgraded(tmp_path, rotated)) < TOLERANCE


def test_a_dora_under_dead_heads_is_exact(tmp_path):
    planted = pair(tmp_path, "llama", "dead heads")
    tuned = trained(tmp_path / "adapter", planted, dora())
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE


def test_rows_without_length_get_a_direction_and_magnitude_zero(tmp_path):
    planted = pair(tmp_path, "llama", "permuted units")
    for layer in (*planted.old.layers, *planted.new.layers):
        layer["v"] = layer["v"].clone()
        layer["v"][:16] = 0.0
    planted = _again(tmp_path / "again", planted)
    trained(tmp_path / "adapter", planted, dora(target_modules=["q_proj", "v_proj"]))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = _with_rows(load_file(path), "v_proj.lora_B.weight", 0.0)
    tensors = _with_rows(tensors, "v_proj.lora_magnitude_vector", 0.0)
    save_file(tensors, path)
    new = upgraded(tmp_path / "adapter", planted, is_trainable=True)
    out = logits(new, planted.ids[1])
    assert bool(out.isfinite().all())
    new(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert all(bool(w.grad.isfinite().all()) for w in new.parameters() if w.requires_grad)


def _with_rows(tensors, end, value):
    for name in tensors:
        if name.endswith(end):
            tensors[name][:16] = value
    return tensors


def _again(folder, planted: Pair) -> Pair:
    left = save_backbone(folder / "old", write(planted.old), pico_tokenizer(OLD_WORDS))
    right = save_backbone(folder / "new", write(planted.new), pico_tokenizer(OLD_WORDS))
    built = UpgradeMap.build(left, right, MapOptions(layer_map="first"))
    return Pair(planted.old, planted.new, left, right, planted.ids, built)


def test_as_lora_keeps_the_energy_that_it_tells(rotated, tmp_path):
    tuned = trained(tmp_path, rotated, dora(target_modules=["q_proj", "o_proj", "down_proj"]))
    errors = {}
    for rank in (3, 32):
        new = upgraded(tmp_path, rotated, output_type="lora", rank=rank)
        assert not new.peft_config["default"].use_dora
        errors[rank] = error(rotated, tuned, new)
        kept = new.upgrade_report.facts["dora_as_lora"]["energy_kept"]
        assert kept > 0.9999 if rank == 32 else 0.1 < kept < 0.99
    assert errors[32] < TOLERANCE < errors[3]


def test_fused_modules_as_lora_are_exact_at_full_rank(tmp_path):
    planted = pair(tmp_path, "phi3", "permuted hidden", "permuted heads")
    tuned = trained(tmp_path / "adapter", planted, dora("phi3"))
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted, output_type="lora", rank=32)) < TOLERANCE


def test_ratios_are_mixed_by_squares_and_stay_within_their_range(rotated, tmp_path):
    trained(tmp_path, rotated, dora())
    old = Backbone.open(str(rotated.left))
    adapter = read_adapter(Source(str(tmp_path), "adapter"), rotated.map.old.arch, old=old)
    scale = magnitude_ratios(adapter, old)
    job = MethodInput(adapter, rotated.map)
    for (layer, part), rho in scale.items():
        mixed = moved_ratios(rho, job, (layer, part), (layer, part))
        assert float(mixed.min()) >= float(rho.min()) - 1e-5
        assert float(mixed.max()) <= float(rho.max()) + 1e-5
        if part in ("o", "down"):
            hidden = rotated.map.hidden.T**2
            assert torch.allclose(mixed, hidden @ rho / hidden.sum(dim=1), atol=1e-5)


def test_a_dora_trains_further_and_its_ranks_are_padded(llama, tmp_path):
    trained(tmp_path, llama, dora(rank_pattern={"q_proj": 2}))
    new = upgraded(tmp_path, llama, is_trainable=True)
    new(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    moving = {name: weight.grad for name, weight in new.named_parameters() if weight.requires_grad}
    assert all(bool(grad.any()) for name, grad in moving.items() if "lora_B" in name or "magnitude" in name)


def test_a_dora_needs_both_backbones_and_says_so(llama, tmp_path):
    trained(tmp_path, llama, dora())
    with pytest.raises(LoraSuiteError, match="a DoRA needs both backbones"):
        upgrade(tmp_path, llama.map, method="lorasuite")
    with pytest.raises(LoraSuiteError, match="old backbone is needed"):
        upgrade(tmp_path, llama.map, method="lorasuite", output_type="lora")
    with pytest.raises(LoraSuiteError, match="unknown output type 'dora'"):
        upgrade(tmp_path, llama.map, output_type="dora")


def test_copy_keeps_the_ratio_of_every_row(tmp_path):
    planted = pair(tmp_path, "llama")
    tuned = trained(tmp_path / "adapter", planted, dora())
    result = upgrade(tmp_path / "adapter", planted.map, method="copy", old=planted.left, new=planted.right)
    result.save(tmp_path / "result")
    new = peft.PeftModel.from_pretrained(write(planted.new), tmp_path / "result").eval()
    assert error(planted, tuned, new) < TOLERANCE


def test_an_adalora_becomes_an_adalora(rotated, tmp_path):
    tuned = trained(tmp_path, rotated, adalora())
    new = upgraded(tmp_path, rotated)
    assert new.peft_config["default"].peft_type == "ADALORA"
    assert error(rotated, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2", "qwen2"])
def test_an_adalora_of_any_family_is_exact(name, tmp_path):
    planted = pair(tmp_path, name, "vocabulary", "widened hidden", "permuted heads", "units")
    modules = MODULES.get(name, ["q_proj", "down_proj"])
    config = adalora(target_modules=modules, fan_in_fan_out=name == "gpt2")
    tuned = trained(tmp_path / "adapter", planted, config)
    new = upgraded(tmp_path / "adapter", planted)
    assert error(planted, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0


def pruned(folder, planted: Pair) -> Any:
    """Train an AdaLoRA to the end of its schedule, so that it has pruned itself."""
    torch.manual_seed(0)
    model = peft.get_peft_model(write(planted.old), adalora())
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.05)
    for step in range(12):
        model(torch.randint(120, (2, 12)), labels=torch.randint(120, (2, 12))).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(write(planted.old), folder).eval()


@pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor:UserWarning")  # of rank zero: pruned
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT 0.21, on any pruned one
def test_a_pruned_adalora_keeps_its_own_ranks(rotated, tmp_path):
    tuned = pruned(tmp_path, rotated)
    new = upgraded(tmp_path, rotated)
    assert error(rotated, tuned, new) < TOLERANCE

    def ranks(model):
        return sorted(len(w) for name, w in model.named_parameters() if "lora_E" in name and len(w))

    assert ranks(new) == ranks(tuned)
    assert len(set(ranks(new))) > 1
    report = new.upgrade_report
    info = {name: fate for name, fate in report.tensors.items() if fate != "transferred"}
    assert all("zero after pruning" in fate for fate in info.values())


def test_an_adalora_as_lora_is_exact(rotated, tmp_path):
    tuned = trained(tmp_path, rotated, adalora())
    new = upgraded(tmp_path, rotated, output_type="lora")
    assert new.peft_config["default"].peft_type == "LORA"
    assert error(rotated, tuned, new) < TOLERANCE


def test_an_adalora_trains_further_and_prunes_again(rotated, tmp_path):
    trained(tmp_path, rotated, adalora())
    new = upgraded(tmp_path, rotated, is_trainable=True)
    optimizer = torch.optim.AdamW([w for w in new.parameters() if w.requires_grad], lr=0.01)
    for step in range(12):
        loss = new(torch.arange(9)[None], labels=torch.arange(9)[None]).loss
        loss.backward()
        optimizer.step()
        new.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert bool(loss.isfinite())
    assert new.peft_config["default"].rank_pattern


EXAMPLES = [{"instruction": f"the cat sat on {word}", "output": "the mat"} for word in ("a", "the", "red", "big")]


@pytest.mark.parametrize("kind", ["dora", "adalora"])
def test_layers_without_an_old_one_are_filled_and_all_is_trained(kind, tmp_path):
    planted = pair(tmp_path, "llama", "depth")
    config = (
        dora(target_modules=["q_proj", "v_proj"]) if kind == "dora" else adalora(target_modules=["q_proj", "v_proj"])
    )
    trained(tmp_path / "adapter", planted, config)
    new = upgraded(tmp_path / "adapter", planted, is_trainable=True)
    before = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(new).items()}
    tuned = finetune(new, EXAMPLES, samples=4, epochs=1, batch_size=2, tokenizer=planted.right)
    after = peft.get_peft_model_state_dict(tuned)
    assert len(tuned.finetune_record["new_modules"]) == 4
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert set(before) < set(after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) >= len(before) // 3  # the planted layers write nothing: no gradient comes from there


def test_a_method_of_its_own_makes_a_plain_lora_of_a_dora(llama, tmp_path):
    trained(tmp_path / "adapter", llama, dora(target_modules=["q_proj", "down_proj"]))
    prompts = [f"the {word} cat" for word in NEW_WORDS if word in OLD_WORDS]
    result = upgrade(
        tmp_path / "adapter", llama.map, method="transplant", old=llama.left, new=llama.right, prompts=prompts,
        options={"prompts": 6, "length": 6},
    )  # fmt: skip
    assert result.report.facts["kind"].startswith("transplant fits a new plain LoRA")
    result.save(tmp_path / "result")
    new = peft.PeftModel.from_pretrained(write(llama.new), tmp_path / "result")
    assert not new.peft_config["default"].use_dora


def test_trained_biases_of_a_model_in_memory_are_put_back(tmp_path):
    planted = pair(tmp_path, "qwen2")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    trained(tmp_path / "adapter", planted, config)
    model = write(planted.old)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = Backbone.open(model)
    adapter = read_adapter(Source(str(tmp_path / "adapter"), "adapter"), backbone.arch, old=backbone)
    with load_with_adapter(backbone, adapter):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

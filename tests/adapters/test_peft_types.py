"""Every PEFT variant on the old side: exact on planted pairs, or refused by name with the reason and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from canon import write
from hub_fixtures import ask_client
from safetensors.torch import load_file, save_file
from variants import error, pair, trained, upgraded
from versions import needs

from peft_lorasuite import LoraSuiteError, upgrade
from peft_lorasuite.adapters.adapter import separate_storage

TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def lora(**values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **({"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | values)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with another vocabulary, hidden basis, heads and units."""
    changes = ("vocabulary", "rotated hidden", "permuted heads", "permuted units")
    return pair(tmp_path_factory.mktemp("llama"), "llama", *changes, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2 (biases of q, k, v) with other heads and a wider hidden size."""
    return pair(tmp_path_factory.mktemp("qwen"), "qwen2", "widened hidden", "permuted heads", "units")


SELECTIONS = {
    "all linear": {},
    "a regular expression": {"target_modules": r".*\.[02]\..*(q_proj|down_proj)"},
    "some layers": {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1]},
    "all but some": {"exclude_modules": ["k_proj", "gate_proj"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 9}, "use_rslora": True},
}


@pytest.mark.parametrize("chosen", SELECTIONS)
def test_however_modules_were_chosen_the_result_is_exact(chosen, llama, tmp_path):
    tuned = trained(tmp_path, llama, lora(**SELECTIONS[chosen]))
    new = upgraded(tmp_path, llama)
    assert error(llama, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0
    assert {type(module) for module in new.modules()} & {peft.tuners.lora.layer.Linear}


def test_conv1d_weights_stored_the_other_way_round_are_exact(tmp_path):
    planted = pair(tmp_path, "gpt2", "widened hidden", "permuted heads", "units")
    tuned = trained(
        tmp_path / "adapter", planted, lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    )
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_carried_as_their_change(bias, qwen, tmp_path):
    if bias == "lora_only":
        needs("peft", "0.21", "save_pretrained with trained biases")
    tuned = trained(tmp_path, qwen, lora(target_modules=["q_proj", "o_proj"], bias=bias))
    new = upgraded(tmp_path, qwen)
    assert error(qwen, tuned, new) < TOLERANCE
    assert new.upgrade_report.coverage == 1.0
    assert new.peft_config["default"].bias == "lora_only"
    new.merge_and_unload()


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_a_plain_lora_has_no_bias_and_the_error_names_the_module(settings, tmp_path):
    if "bias" in settings:
        needs("peft", "0.21", "save_pretrained with trained biases")
    planted = pair(tmp_path, "phi", "permuted hidden", "permuted heads")
    trained(tmp_path / "adapter", planted, lora(target_modules=["q_proj", "fc2"], **settings))
    with pytest.raises(LoraSuiteError, match=r"layers\.0\.self_attn\.q_proj: .* cannot be a plain LoRA: it has a bias"):
        upgraded(tmp_path / "adapter", planted, output_type="lora")


def test_biases_of_norms_are_named_in_the_report(tmp_path):
    planted = pair(tmp_path, "phi", "permuted heads")
    trained(tmp_path / "adapter", planted, lora(target_modules=["q_proj"], bias="all"))
    info = upgraded(tmp_path / "adapter", planted).upgrade_report.tensors
    assert "a norm's" in info["base_model.model.model.layers.0.input_layernorm.bias"]
    assert info["base_model.model.model.layers.0.mlp.fc1.bias"] == "transferred"


def test_biases_need_the_old_backbone_and_say_so(qwen, tmp_path):
    needs("peft", "0.21", "save_pretrained with trained biases")
    trained(tmp_path, qwen, lora(target_modules=["q_proj"], bias="lora_only"))
    with pytest.raises(LoraSuiteError, match=r"trained biases.*old backbone is needed to read it; pass the"):
        upgrade(tmp_path, qwen.map)


def test_several_adapters_in_one_folder_are_chosen_by_name(llama, tmp_path):
    for seed, name in enumerate(["first", "second"]):
        tuned = trained(tmp_path / name, llama, lora(target_modules=["q_proj"]), seed)
    new = upgraded(tmp_path, llama, adapter_name="second")
    assert error(llama, tuned, new) < TOLERANCE
    assert list(new.peft_config) == ["second"]
    with pytest.raises(LoraSuiteError, match=r"wanted first or second\); select one \(--adapter-name, adapter_name=\)"):
        upgraded(tmp_path, llama)


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
def test_an_adapter_of_a_changed_backbone_is_refused_until_it_is_converted(init, llama, tmp_path):
    model = peft.get_peft_model(write(llama.old), lora(target_modules=["q_proj"], init_lora_weights=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraSuiteError, match="path_initial_model_for_weight_conversion"):
        upgraded(tmp_path, llama)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_pissa_adapter_that_peft_converted_is_exact(llama, tmp_path):
    model = peft.get_peft_model(write(llama.old), lora(target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert error(llama, model.eval(), upgraded(tmp_path / "adapter", llama)) < TOLERANCE


def test_a_prompt_is_refused_with_the_alternative(llama, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(write(llama.old), config).save_pretrained(tmp_path)
    with pytest.raises(LoraSuiteError, match=r"prompt tuning adapter is a prompt.*train the prompt on the new"):
        upgraded(tmp_path, llama)


def test_a_module_trained_in_full_is_named_with_the_alternative(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["q_proj"], modules_to_save=["norm"]))
    info = upgraded(tmp_path, llama).upgrade_report.tensors
    assert "train it as LoRA instead" in info["base_model.model.model.norm.weight"]


def test_a_factor_without_its_partner_is_an_error(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "lora_A" in name}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(LoraSuiteError, match=r"a lora lacks a tensor \(wanted lora_B.weight"):
        upgraded(tmp_path, llama)


@pytest.mark.parametrize("wrong", [{"lora_alpha": "16"}, {"alpha_pattern": {"q_proj": "x"}}])
def test_a_scaling_that_is_no_number_is_an_error(wrong, llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["q_proj"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | wrong
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraSuiteError, match=r"(lora_alpha|alpha_pattern.q_proj): malformed value"):
        upgraded(tmp_path, llama)


def kinds() -> dict[str, Any]:
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj", "down_proj"]}
    return {
        "loha": peft.LoHaConfig(r=2, alpha=3, **common),
        "lokr": peft.LoKrConfig(r=2, alpha=3, **common),
        "oft": peft.OFTConfig(oft_block_size=8, **common),
        "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **common),
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_go_through_a_lora_of_the_old_backbone(kind, llama, tmp_path):
    tuned = trained(tmp_path, llama, kinds()[kind])
    new = upgraded(tmp_path, llama, rank=32)
    report = new.upgrade_report
    assert error(llama, tuned, new) < 1e-3
    assert report.facts["converted"]["from"] == kind.upper()
    assert report.facts["converted"]["energy_kept"] == pytest.approx(1.0, abs=1e-3)
    assert report.coverage == 1.0
    assert new.peft_config["default"].peft_type == "LORA"


def test_the_rank_of_a_conversion_can_be_chosen_and_its_loss_is_reported(llama, tmp_path):
    trained(tmp_path, llama, kinds()["loha"])
    report = upgraded(tmp_path, llama, rank=1).upgrade_report
    assert report.rank == 1
    assert 0.2 < report.facts["converted"]["energy_kept"] < 0.99


def test_the_result_can_be_trained_further(llama, tmp_path):
    trained(tmp_path, llama, lora(rank_pattern={"q_proj": 1}))
    new = upgraded(tmp_path, llama, is_trainable=True, rank=4)
    new(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    moving = {name: weight.grad for name, weight in new.named_parameters() if weight.requires_grad}
    assert moving
    assert all(bool(grad.any()) for name, grad in moving.items() if "lora_B" in name)


def test_reading_what_was_written_gives_the_same_adapter(llama, tmp_path):
    trained(tmp_path / "one", llama, lora(target_modules=["q_proj", "embed_tokens"]))
    result = upgrade(tmp_path / "one", llama.map, method="lorasuite", old=llama.left, new=llama.right)
    result.save(tmp_path / "two")
    model = peft.PeftModel.from_pretrained(write(llama.new), tmp_path / "two")
    written = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert set(peft.get_peft_model_state_dict(model, save_embedding_layers=False)) == set(written)
    assert Path(tmp_path / "two" / "lorasuite_report.json").is_file()


def test_options_that_make_a_lora_something_else_are_refused_by_name(llama, tmp_path):
    trained(tmp_path, llama, lora(target_modules=["q_proj"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"layer_replication": [[0, 2], [1, 3]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraSuiteError, match=r"adapters with layer_replication are not transferred"):
        upgraded(tmp_path, llama)


def test_a_bias_where_there_was_none_is_reported(tmp_path):
    planted = pair(tmp_path, "qwen2", "permuted heads")
    settings = lora(target_modules=["q_proj"], lora_bias=True)
    tuned = trained(tmp_path / "adapter", planted, settings)
    assert error(planted, tuned, upgraded(tmp_path / "adapter", planted)) < TOLERANCE
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        trained(tmp_path / "other", planted, lora(target_modules=["o_proj"], lora_bias=True))
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        report = upgraded(tmp_path / "other", planted).upgrade_report
    assert report.facts["biases"].startswith("3 modules without a bias")


def test_one_of_several_adapters_is_chosen_on_the_hub(hub, llama, tmp_path):
    trained(tmp_path / "first", llama, lora(target_modules=["q_proj"]))
    files = {f"{name}/{path.name}": path.read_bytes() for name in ("a", "b") for path in (tmp_path / "first").iterdir()}
    hub.add_repo("org/several", files)
    code = """
from peft_lorasuite.adapters.reading import adapter_needs_backbones
from peft_lorasuite.io.source import Source
from peft_lorasuite.adapters.peft_format import select_adapter
from peft_lorasuite.errors import LoraSuiteError
source = Source("org/several", "adapter")
try:
    select_adapter(source, "c")
except LoraSuiteError as error:
    message = str(error)
place = select_adapter(source, "b")
print(json.dumps([message, adapter_needs_backbones(place), place.require("adapter_config.json").parent.name]))
"""
    message, needs, folder = ask_client(hub, code, tmp_path / "home")
    assert "wanted a or b" in message
    assert (needs, folder) == (False, "b")


def test_written_tensors_share_no_memory_and_are_copied_only_where_needed() -> None:
    table = torch.randn(4, 6)
    own = torch.randn(3, 2)
    given = {"own": own, "again": own, "part": table[:2], "turned": table.T}
    found = separate_storage(given)
    assert found["own"] is own
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(found)
    for name, tensor in found.items():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(tensor, given[name])

"""Adapters that are damaged or made by hand: refused in one sentence, never carried as something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_fixtures
import peft
import pytest
import torch
from command_fixtures import Pair, refused
from pico import pico_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from versions import needs

from peft_lorasuite import upgrade
from peft_lorasuite.adapters.peft_format import TASKS
from peft_lorasuite.adapters.writing import state_dict

pair = command_fixtures.pair
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]


def adapter(folder: Path, pair: Pair, change: Callable[[Tensors], object] = len, **values: Any) -> Path:
    """Copy the pair's adapter with its tensors and config changed."""
    folder.mkdir()
    tensors = load_file(pair.adapter / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    config = json.loads((pair.adapter / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))
    return folder


def call(pair: Pair, folder: Path, tmp_path: Path, *more: Any) -> list[Any]:
    return ["upgrade", folder, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out", *more]


def other_kind(folder: Path, pair: Pair, config: peft.PeftConfig) -> Path:
    """Save an adapter of another kind on the pair's old backbone."""
    model = peft.get_peft_model(pico_model("llama"), config)
    config.base_model_name_or_path = str(pair.old)
    model.save_pretrained(folder)
    return folder


def test_another_kind_that_lacks_tensors_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT leaves its random initial values in their place."""
    loha = peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "loha", pair, loha)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "hada_w1_a" not in name}, folder / WEIGHTS)
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert "the tensors do not match those of LOHA on the old backbone" in info
    assert "wanted base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a.default and 2 more" in info


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "LN_TUNING", "VERA"])
def test_lora_tensors_under_the_name_of_another_kind_are_refused(
    kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", pair, peft_type=kind, feedforward_modules=[])
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert "PEFT cannot load the adapter" in info or f"the tensors do not match those of {kind}" in info
    assert "pass the backbone that it was trained on" in info


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_kind_that_changes_no_linear_module_is_refused(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "norms", pair, config)
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--method", "copy"))
    assert f"{folder}: the adapter changes no linear modules" in info
    assert "train a LoRA on the new backbone" in info


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
UNFIT, FACTS = "the adapter does not fit the old backbone", "layer 0, self_attn.q_proj: "
TENSORS: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "A flat": (lambda t: t.update({A: t[A][0]}), {}, f"{UNFIT} (got lora_A.weight of (32,), wanted (rank, 32)"),
    "A a number": (lambda t: t.update({A: t[A][0, 0]}), {}, f"{UNFIT} (got lora_A.weight of (), wanted (rank, 32)"),
    "B turned": (lambda t: t.update({B: t[B].T}), {}, f"{UNFIT} (got lora_B.weight of (4, 32), wanted (32, 4)"),
    "ranks": (lambda t: t.update({B: t[B][:, :3]}), {}, f"{FACTS}the ranks of A and B differ"),
    "rank zero": (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), {}, f"{FACTS}the rank of the update is zero"),
    "huge": (lambda t: t[A].fill_(3e38), {}, "the adapter's values are out of range (got 3e+38"),
    "nothing": (lambda t: t.clear(), {}, f"{WEIGHTS}: the adapter has no tensors"),
    "no magnitude": (len, {"use_dora": True}, "a dora lacks a tensor (wanted lora_magnitude_vector)"),
    "a bias": (
        lambda t: t.update({f"{Q}.base_layer.bias": torch.ones(32)}), {"bias": "lora_only"},
        f"{FACTS}the adapter has a trained bias, and llama has no bias there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_update(kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, values, message = TENSORS[kind]
    folder = adapter(tmp_path / "adapter", pair, change, **values)
    assert message in refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--from", pair.old))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    *(({"lora_alpha": value}, "adapter_config.json, lora_alpha: malformed value (got ")
      for value in (None, "8", float("nan"), float("inf"), 10**400)),
    *(({"alpha_pattern": value}, "json, alpha_pattern: malformed value (got ") for value in (["q"], "q")),
    ({"alpha_pattern": {"(": 4}}, "adapter_config.json, alpha_pattern: not a regular expression: missing )"),
    ({"alpha_pattern": {"q_proj": "x"}}, "adapter_config.json, alpha_pattern.q_proj: malformed value (got 'x', wanted"),
    ({"lora_alpha": 1e30}, "the adapter's values are out of range"),
    ({"peft_type": "ADALORA"}, "adapter_config.json, init_r: missing value (wanted a number above 0"),
    *(({"peft_type": value}, f"PEFT has no such peft_type (got {value!r}, wanted ADALORA or ") for value in ("A", "b")),
    *(({"peft_type": value}, f"peft_type: malformed value (got {value!r}, wanted a string") for value in (5, ["LORA"])),
    ({"task_type": "FOO"}, "PEFT has no such task_type (got 'FOO', wanted CAUSAL_LM or "),
    *(({"task_type": value}, f"task_type: malformed value (got {value!r}, wanted a string") for value in (7, ["A"])),
    ({"peft_type": "XLORA", "adapters": {"0": "/etc"}}, "the adapter is a mixture of other adapters (got XLORA"),
    ({"alora_invocation_tokens": "0"}, "alora_invocation_tokens: malformed value (got '0', wanted a list or null"),
    ({"megatron_core": "antigravity"}, "megatron_core: malformed value (got 'antigravity', wanted megatron.core"),
    ({"r": 8}, "_proj: the rank of the tensors is not the one in the adapter's config (got 4, wanted r=8)"),
    ({"target_parameters": 0.5}, "adapter_config.json, target_parameters: malformed value (got 0.5"),
    ({"token_indices": "5"}, "adapter_config.json, token_indices: malformed value (got '5'"),
    ({"r": 2**63}, "adapter_config.json, r: malformed value (got 9223372036854775808, wanted an integer from 0 to"),
    ({"rank_pattern": {"q_proj": 3}}, "layers.0.self_attn.q_proj: the rank of the tensors is not the one"),
    ({"base_model_name_or_path": "a\x1b[2J\nb"}, "base_model_name_or_path: control characters (got 'a\\x1b[2J\\nb'"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_a_config_that_says_nothing(
    values: dict[str, Any], message: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "adapter", pair, **values)
    assert message in refused(tmp_path, capsys, *call(pair, folder, tmp_path))


def test_the_known_tasks_are_those_of_peft() -> None:
    assert set(TASKS) == {task.value for task in peft.TaskType}


EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
DELTA = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
TABLES: list[tuple[dict[str, tuple[int, ...]], Any, str]] = [
    ({f"{EMBEDDING}.lora_embedding_A": (4, 120)}, None, "lora_embedding_B: a token table's update does not fit"),
    ({f"{EMBEDDING}.lora_embedding_A": (4, 120), f"{EMBEDDING}.lora_embedding_B": (33, 4)}, None, "wanted (32, 4)"),
    ({f"{EMBEDDING}.lora_embedding_A": (4, 120), f"{EMBEDDING}.lora_embedding_B": (32, 5)}, None, "wanted (32, 4)"),
    ({f"{EMBEDDING}.lora_embedding_A": (), f"{EMBEDDING}.lora_embedding_B": (32, 4)}, None, "embedding_A: a token"),
    ({f"{HEAD}.lora_A.weight": (4, 32)}, None, "lora_B.weight: a token table's update does not fit"),
    ({f"{HEAD}.lora_A.weight": (4, 29), f"{HEAD}.lora_B.weight": (120, 4)}, None, "got (4, 29), wanted (4, 32)"),
    ({f"{HEAD}.lora_A.weight": (4, 32), f"{HEAD}.lora_B.weight": (120, 4), f"{HEAD}.weight": (120, 32)}, None, "none"),
    ({f"{EMBEDDING}.weight": (120, 34)}, None, "got (120, 34), wanted (any, 32)"),
    ({f"{EMBEDDING}.weight": (120,)}, None, "got (120,), wanted (any, 32)"),
    *(({DELTA: (2, 32)}, indices, "malformed trainable_token_indices in the adapter's config")
      for indices in (None, {"lm_head": [5, 9]}, [5, 999], [5, 5], [])),
    *(({DELTA: (2, 32)}, indices, "adapter_config.json, trainable_token_indices")
      for indices in ([5, -1], "59", ["a", "b"], [True, False], {"embed_tokens": 5})),
    ({DELTA: (3, 32)}, [5, 9], "got (3, 32), wanted (2, 32)"),
    ({DELTA: (2, 32)}, [5, 9, 11], "got (2, 32), wanted (3, 32)"),
    ({DELTA: (2, 33)}, [5, 9], "got (2, 33), wanted (2, 32)"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "indices", "message"), TABLES)
def test_a_token_table_that_does_not_fit(
    shapes: dict[str, tuple[int, ...]], indices: Any, message: str, pair: Pair, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    added = {name: torch.ones(shape) for name, shape in shapes.items()}
    folder = adapter(tmp_path / "adapter", pair, lambda t: t.update(added), trainable_token_indices=indices)
    assert message in refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--from", pair.old))


@pytest.mark.parametrize("values", [{"total_step": None}, {"total_step": 5, "tinit": 9}, {"orth_reg_weight": -1}])
def test_an_adalora_that_peft_refuses(
    values: dict[str, Any], pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result has the schedule of the old adapter, so PEFT would not load it either."""
    if "orth_reg_weight" in values:
        needs("peft", "0.20", "a check of orth_reg_weight")
    config = peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "adalora", pair, config)
    saved = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(saved | values))
    assert f"{CONFIG}: PEFT refuses the config: " in refused(tmp_path, capsys, *call(pair, folder, tmp_path))


def test_another_kind_with_huge_values(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loha = peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "loha", pair, loha)
    tensors = {name: tensor.fill_(1e25) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    assert "values are out of range (got 1e+25" in refused(tmp_path, capsys, *call(pair, folder, tmp_path))


def test_a_dora_with_huge_magnitudes(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    folder = other_kind(tmp_path / "dora", pair, dora)
    tensors = load_file(folder / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if "magnitude" in name).fill_(3e38)
    save_file(tensors, folder / WEIGHTS)
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path, "--from", pair.old))
    assert "the adapter's values are out of range (got 3e+38" in info


@pytest.mark.parametrize("factor", [1e-25, 1e-30, 0.0])
@pytest.mark.parametrize("method", ["lorasuite", "cross-lora", "transplant"])
def test_e_updates_that_are_nearly_zero(factor: float, method: str, pair: Pair, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", pair, lambda t: [tensor.mul_(factor) for tensor in t.values()])
    prompts = ["the red cat", "the blue dog", "a bird", "green and red"]
    found = upgrade(folder, pair.map, method=method, old=pair.old, new=pair.new, prompts=prompts)
    assert all(torch.isfinite(tensor).all() for tensor in state_dict(found.adapter).values())
    assert found.report.facts["prediction"]["verdict"] == "retrain"
    assert "the adapter changes nothing" in found.report.facts["warnings"][0]


ABSENT = {"r": "(got 4, wanted r=8)", "lora_alpha": "", "peft_type": "the config has no peft_type"}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_entry_has_the_default_of_peft(
    name: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT's default rank and alpha are 8; the pair's adapter has rank 4 and alpha 8."""
    folder = adapter(tmp_path / "adapter", pair)
    config = json.loads((folder / CONFIG).read_text())
    del config[name]
    (folder / CONFIG).write_text(json.dumps(config))
    if ABSENT[name]:
        assert ABSENT[name] in refused(tmp_path, capsys, *call(pair, folder, tmp_path))
    else:
        found, wanted = (state_dict(upgrade(one, pair.map).adapter) for one in (folder, pair.adapter))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
def test_e_fp8_tensors_in_an_adapter(
    dtype: torch.dtype, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if dtype is torch.complex64:
        needs("safetensors", "0.7", "a complex tensor")
    folder = adapter(tmp_path / "adapter", pair, lambda t: t.update({A: t[A].to(dtype)}))
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path))
    assert f"{WEIGHTS}, {A}: tensors of dtype " in info
    assert "wanted bfloat16 or float16 or float32 or float64" in info


LAYER = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
KEYS = {"digits": LAYER.format("1" * 5000), "escape": LAYER.format("\x1b[2J"), "line break": LAYER.format("0\n")}


@pytest.mark.parametrize("kind", KEYS)
def test_e_a_malformed_name_of_a_tensor(
    kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer number of 5,000 digits, and names that a terminal would obey."""
    folder = adapter(tmp_path / "adapter", pair, lambda t: t.update({KEYS[kind]: t[A].clone()}))
    info = refused(tmp_path, capsys, *call(pair, folder, tmp_path))
    assert f"{WEIGHTS}: malformed name of a tensor (got '" in info
    assert len(info) < 600
    assert info.strip().isprintable()


UNUSED = {
    "another tower": (
        lambda t: {n.replace("model.model.layers", "model.vision.layers"): v * 7 for n, v in t.items() if ".0." in n},
        "it belongs to vision, not to the text model",
    ),
    "another name": (lambda t: {f"{Q}.lora_A": t[A] * 5}, "a lora has no such tensor"),
    "a magnitude": (lambda t: {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "a lora has no such tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSED)
def test_a_tensor_that_is_not_used_is_reported_and_changes_nothing(kind: str, pair: Pair, tmp_path: Path) -> None:
    more, why = UNUSED[kind]
    folder = adapter(tmp_path / "adapter", pair)
    wanted = state_dict(upgrade(folder, pair.map, method="copy").adapter)
    tensors = load_file(folder / WEIGHTS)
    added = more(tensors)
    save_file(tensors | added, folder / WEIGHTS)
    found = upgrade(folder, pair.map, method="copy")
    for name, tensor in state_dict(found.adapter).items():
        assert torch.equal(tensor, wanted[name]), name
    assert found.report.coverage < 1.0
    assert all(f"not transferred: {why}" in found.report.tensors[name] for name in added)


def test_a_single_adapter_has_no_name_to_be_chosen_by(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = refused(tmp_path, capsys, *call(pair, pair.adapter, tmp_path, "--adapter-name", "nosuch"))
    assert f"{pair.adapter}: has a single adapter, which has no name (got nosuch)" in info

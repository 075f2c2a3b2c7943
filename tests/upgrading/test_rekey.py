"""The same base in another format is found, re-keyed without loss, and proven by equal logits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layouts import layouts
from pico import pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lorasuite import LoraSuiteError, MapOptions, PeftModel, UpgradeMap, upgrade
from peft_lorasuite.cli.main import main
from peft_lorasuite.mapping.identity_map import identity_map
from peft_lorasuite.mapping.same_base import compare_bases
from peft_lorasuite.models.backbone import Backbone

WORDS = ["cat", "dog", "red"]
OPTIONS = MapOptions(layer_map="proportional")
IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])
LINEAR: dict[str, Any] = {
    "r": 3, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"
}  # fmt: skip


def adapted(folder: Path, model: Any, base: Path, **settings: Any) -> Tensor:
    """Write a random LoRA of a model; return the logits with it."""
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**(LINEAR | settings))).eval()
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return tuned(IDS).logits


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folders = {}
    for name, (first, second, config) in layouts().items():
        root = tmp_path_factory.mktemp("format")
        folders[name] = (
            save_backbone(root / "first", first, pico_tokenizer(WORDS), config),
            save_backbone(root / "second", second, pico_tokenizer(WORDS)),
        )
    return folders


KINDS = [
    "fused and split", "MiniCPM plain and llama format", "Gemma 3 multimodal and text class",
    "Qwen2-VL and its text model",
]  # fmt: skip


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_base_in_another_format_is_rekeyed_without_loss(
    kind: str, back: bool, formats: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    old, new = formats[kind][::-1] if back else formats[kind]
    backbone = Backbone.open(old)
    arch = backbone.arch
    paths = [arch.module(layer, site) for layer, site in arch.modules]
    wanted = adapted(tmp_path / "adapter", backbone.load(dtype=torch.float32), old, target_modules=paths)
    upgraded = PeftModel.from_upgraded(new, tmp_path / "adapter", source_model=old, dtype="float32")
    with torch.no_grad():
        got = upgraded(IDS).logits
        with upgraded.disable_adapter():
            plain = upgraded(IDS).logits
    assert (wanted - plain).abs().max() > 0.05
    assert (wanted - got).abs().max() < 1e-5 * wanted.abs().max()
    report = upgraded.upgrade_report
    assert report.method["name"] == "rekey"
    assert report.facts["rekey"]["logits"]["equal"]
    assert report.facts["rekey"]["equal"][:3] == ["embedding rows", "norms", "projections"]
    assert report.verdict.startswith("lossless: both backbones hold the same weights; logits of both adapted models eq")
    assert set(report.tensors.values()) == {"transferred"}


def change(folder: Path, place: Path, edit: Any, **load: Any) -> Path:
    """Copy a backbone, load it and edit it."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, place)
    model = AutoModelForCausalLM.from_pretrained(folder, **load)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a LoRA beside it."""
    root = tmp_path_factory.mktemp("base")
    folder = save_backbone(root / "llama", pico_model("llama", seed=4), pico_tokenizer(WORDS))
    adapted(root / "adapter", pico_model("llama", seed=4), folder)
    return folder


def adapter_of(base: Path) -> Path:
    return base.parent / "adapter"


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")], ids=str)
def test_copies_in_other_dtypes_are_the_same_base(dtypes: tuple[str, str], base: Path, tmp_path: Path) -> None:
    old, new = (
        Backbone.open(change(base, tmp_path / name, lambda model: None, dtype=name)) for name in dtypes
    )  # fmt: skip
    found = compare_bases(old, new)
    assert found.same
    assert found.unread == ()
    assert found.equal == ("embedding rows", "norms", "projections", "head")


def first_rows(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[0] *= 1.001


DIFFERENT: dict[str, tuple[Any, str]] = {
    "one projection": (first_rows, r"the projections differ \(layer 0, v\)"),
    "a norm": (lambda model: model.model.layers[2].input_layernorm.weight.mul_(1.01), r"the norms differ \(layer 2,"),
    "the final norm": (lambda model: model.model.norm.weight.mul_(1.01), r"the norms differ \(final norm"),
    "the embedding": (lambda model: model.model.embed_tokens.weight.mul_(1.01), "the embedding rows differ"),
    "one row of the head": (lambda model: model.lm_head.weight[0].mul_(1.1), "the head differ"),
    "scaled queries": (lambda model: model.model.layers[0].self_attn.q_proj.weight.mul_(2), r"\(layer 0, q\)"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_backbones_with_other_weights_are_not(kind: str, base: Path, tmp_path: Path) -> None:
    edit, wanted = DIFFERENT[kind]
    untied = change(base, tmp_path / "old", lambda model: None, tie_word_embeddings=False)
    new = change(untied, tmp_path / "new", edit)
    assert re.search(wanted, compare_bases(Backbone.open(untied), Backbone.open(new)).difference)


def test_rekey_refuses_backbones_with_other_weights(base: Path, tmp_path: Path) -> None:
    new = change(base, tmp_path / "new", first_rows)
    with pytest.raises(
        LoraSuiteError, match=r"do not hold the same weights \(got the projections differ \(layer 0, v\)"
    ):
        upgrade(adapter_of(base), UpgradeMap.build(base, new, OPTIONS), old=base, new=new, method="rekey")


def test_what_the_samples_miss_is_found_by_the_logits(base: Path, tmp_path: Path) -> None:
    new = change(base, tmp_path / "new", lambda model: model.model.layers[1].mlp.down_proj.weight[7].mul_(1.5))
    report = PeftModel.from_upgraded(new, adapter_of(base), dtype="float32").upgrade_report
    assert report.method["name"] == "rekey"
    wanted = "doubtful: both backbones hold the same weights; logits of both adapted models not equal"
    assert report.verdict.startswith(wanted)


def test_a_map_of_the_pair_shows_it_too(base: Path, tmp_path: Path) -> None:
    new = change(base, tmp_path / "new", lambda model: None, dtype="bfloat16")
    built = UpgradeMap.build(base, new, OPTIONS)
    report = upgrade(adapter_of(base), built).report
    assert report.method["name"] == "rekey"
    assert report.verdict == (
        "lossless: both backbones hold the same weights; logits not compared: the old backbone was not passed"
    )
    for dtype in ("auto", "float32"):  # a CPU without bfloat16 instructions takes float32, also for rounded weights
        sides = {"old": Backbone.open(base, dtype=dtype), "new": Backbone.open(new, dtype=dtype)}
        proof = upgrade(adapter_of(base), built, **sides).report.facts["rekey"]["logits"]
        assert proof["equal"], proof


def test_the_terminal_says_it_first(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", adapter_of(base), "--to", base, "-o", tmp_path / "out"]
    assert main([str(word) for word in call]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lossless: both backbones hold the same weights; logits of both adapted models equal")
    assert "by rekey" in lines[1]
    report = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert report["verdict"] == lines[0]
    assert report["facts"]["auto"].startswith("both backbones hold the same weights (equal embedding rows, norms,")
    call = [*call, "--overwrite", "--set", "prove=false", "--method", "rekey", "--rank", 2]
    assert main([str(word) for word in call]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "re-keyed in part: both backbones hold the same weights; logits not compared: prove=false"


VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 9]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", VARIANTS)
def test_other_types_of_adapters_are_rekeyed_too(
    kind: str, formats: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    new, old = formats["fused and split"]
    wanted = adapted(tmp_path / "adapter", Backbone.open(old).load(dtype=torch.float32), old, **VARIANTS[kind])
    upgraded = PeftModel.from_upgraded(new, tmp_path / "adapter", source_model=old, dtype="float32")
    with torch.no_grad():
        difference = (wanted - upgraded(IDS).logits).abs().max()
    assert difference < 1e-4 * wanted.abs().max()
    assert upgraded.upgrade_report.verdict.startswith("lossless")


OLDER: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "Gemma 3 before transformers 4.52": (
        "Gemma 3 multimodal and text class", [("model.language_model.layers", "language_model.model.layers")]
    ),
    "Qwen2-VL before transformers 4.52": (
        "Qwen2-VL and its text model", [("model.language_model.layers", "model.layers"), ("model.visual", "visual")]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OLDER)
def test_an_adapter_with_older_names_gets_those_of_today(
    kind: str, formats: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    pair, names = OLDER[kind]
    folder = formats[pair][0]
    modules = r".*language_model.*\.(q_proj|down_proj)"
    wanted = adapted(tmp_path / "adapter", Backbone.open(folder).load(), folder, target_modules=modules)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    today = load_file(weights)
    older = {name: name for name in today}
    for now, before in names:
        older = {name: one.replace(now, before) for name, one in older.items()}
    assert not set(today) & set(older.values())
    save_file({older[name]: tensor for name, tensor in today.items()}, weights)
    upgrade(tmp_path / "adapter", identity(folder), old=folder, new=folder).save(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(today)
    model = peft.PeftModel.from_pretrained(Backbone.open(folder).load(), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def identity(folder: Path) -> UpgradeMap:
    backbone = Backbone.open(folder)
    return identity_map(backbone, backbone, compare_bases(backbone, backbone))


def packed(base: Path, place: Path) -> Path:
    """Copy a backbone with its projections as bitsandbytes stores them in 4 bits."""
    shutil.copytree(base, place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (place / "config.json").write_text(json.dumps(config))
    weights = place / "model.safetensors"
    tensors = {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8) if "_proj" in name else tensor.bfloat16()
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    return place


def test_a_quantized_copy_is_the_same_base_by_its_name(base: Path, tmp_path: Path) -> None:
    old = packed(base, tmp_path / "llama-bnb-4bit")
    call = ["upgrade", adapter_of(base), "--from", old, "--to", base, "-o", tmp_path / "out", "-q"]
    assert main([str(word) for word in call]) == 0
    report = json.loads((tmp_path / "out" / "lorasuite_report.json").read_text())
    assert report["facts"]["auto"] == (
        "both backbones hold the same weights (equal embedding rows, norms, head; not compared: projections)"
    )
    assert report["verdict"].endswith("; logits not compared: the old backbone is quantized")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (adapter_of(base), tmp_path / "out")]
    assert tensors[0].keys() == tensors[1].keys()
    other = compare_bases(Backbone.open(packed(base, tmp_path / "other-bnb-4bit")), Backbone.open(base))
    assert other.difference == "the projections are quantized, and the names differ: other and llama"

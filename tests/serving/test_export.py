"""Exported adapters: the same logits in PEFT, whole by the rules of their program, or one error and nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from served import adapter, backbone, distance, load, logits

from peft_lorasuite import LoraSuiteError, check, export
from peft_lorasuite.adapters.peft_format import CONFIG, WEIGHTS
from peft_lorasuite.serving.engines import ENGINES, FEATURES
from peft_lorasuite.serving.features import OLD_ENTRIES

EXACT = ("lora", "rslora", "ranks", "adalora", "loha")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("served") / "base")


def modules(folder: Path) -> dict[str, int]:
    """Module -> rank of its pair, by the file alone."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    ends = {".lora_A.weight": 0, ".lora_embedding_A": 0}
    return {name.removesuffix(end).removeprefix("base_model.model."): shape[axis]
            for name, shape in shapes.items() for end, axis in ends.items() if name.endswith(end)}  # fmt: skip


@pytest.mark.parametrize("engine", ["sglang", "lorax"])
@pytest.mark.parametrize("kind", EXACT)
def test_every_type_becomes_a_plain_lora_with_the_same_logits(kind, engine, base, tmp_path) -> None:
    source, out = adapter(tmp_path / "adapter", base, kind), tmp_path / "out"
    checked = export(source, out, engine=engine)
    assert checked.passed
    assert not [finding for finding in checked.findings if finding.effect != "unproven"]
    plain = logits(base)
    assert distance(logits(base, source), logits(base, out), plain) < TOLERANCE
    config = json.loads((out / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"]
    assert set(config) <= OLD_ENTRIES
    assert set(modules(out).values()) == {config["r"]}


@pytest.mark.parametrize("engine", ["lorax", "tgi"])
def test_layers_without_an_update_get_a_pair_that_changes_no_logit(engine, base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, "one layer")
    before = check(source, engine=engine)
    assert not before.passed
    assert "mlp.down_proj in 1 of 3 layers" in str(before)
    checked = export(source, tmp_path / "out", engine=engine)
    assert checked.facts["pairs_of_zeros"] == 2
    assert set(modules(tmp_path / "out")) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert distance(logits(base, source), logits(base, tmp_path / "out"), logits(base)) < TOLERANCE


def test_modules_that_are_fused_come_with_their_partners(base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, "lone k")
    assert "k_proj without model.layers.0.self_attn.q_proj" in str(check(source, engine="sglang"))
    export(source, tmp_path / "out", engine="sglang")
    assert {name.rpartition(".")[2] for name in modules(tmp_path / "out")} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    assert distance(logits(base, source), logits(base, tmp_path / "out"), logits(base)) < TOLERANCE


@pytest.mark.parametrize("rank", [4, 9])
def test_the_smallest_rank_that_vllm_allows_is_named(rank, base, tmp_path) -> None:
    config = peft.LoraConfig(r=rank, target_modules=["q_proj"])
    checked = export(adapter(tmp_path / "adapter", base, config), tmp_path / "out", engine="vllm")
    assert f"--max-lora-rank {8 if rank == 4 else 16} " in checked.start


def test_a_rank_above_all_that_vllm_allows_is_refused(tmp_path) -> None:
    wide = backbone(tmp_path / "wide", hidden_size=528, intermediate_size=528, num_hidden_layers=1, head_dim=132)
    config = peft.LoraConfig(r=520, target_modules=["o_proj"])
    source = adapter(tmp_path / "adapter", wide, config)
    with pytest.raises(LoraSuiteError, match=r"refused: a rank above.*model.layers.0.self_attn.o_proj of rank 520"):
        export(source, tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


def test_a_dora_becomes_its_best_lora_and_says_how_good(base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    errors = []
    for rank in (4, 32):
        out = tmp_path / str(rank)
        checked = export(source, out, engine="vllm", rank=rank)
        errors.append(distance(logits(base, source), logits(base, out), logits(base)))
        assert 0 < checked.facts["dora_as_lora"]["least"] <= 1
    assert errors[1] < 1e-3 < errors[0], "at the full rank the conversion is exact"


@pytest.mark.parametrize("kind", ["embedding", "head", "tokens"])
def test_token_tables_become_loras(kind, base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, kind)
    export(source, tmp_path / "out", engine="vllm")
    assert distance(logits(base, source), logits(base, tmp_path / "out"), logits(base)) < TOLERANCE
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] is None


REFUSED = [
    ("lora bias", "vllm", r"self_attn\.q_proj: the adapter cannot be a plain LoRA: it has a bias"),
    (
        "full table",
        "llama.cpp",
        r"the rank is too small for the change of the head.*lm_head\.weight|lm_head\.weight.*small",
    ),
    ("embedding", "lorax", r"does not load the adapter whole, dropped: a LoRA of the embedding: .*lora_embedding_A"),
]


@pytest.mark.parametrize(("kind", "engine", "message"), REFUSED)
def test_what_cannot_be_converted_is_one_error_that_names_the_tensor(kind, engine, message, base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, kind)
    with pytest.raises(LoraSuiteError, match=message) as error:
        export(source, tmp_path / "out", engine=engine)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama", "mlx"])
def test_a_lora_of_a_tied_head_is_refused_where_the_program_cannot(engine, tmp_path) -> None:
    base = backbone(tmp_path / "base", tie_word_embeddings=True)
    source = adapter(tmp_path / "adapter", base, "head")
    with pytest.raises(LoraSuiteError, match=r"refused: a LoRA of a head whose weight .*lm_head\.lora_A\.weight"):
        export(source, tmp_path / "out", engine=engine)


def test_ollama_reads_two_families(base, tmp_path) -> None:
    export(adapter(tmp_path / "adapter", base, "lora"), tmp_path / "out", engine="ollama")
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM {base}\nADAPTER .\n"
    other = backbone(tmp_path / "qwen", "qwen2")
    with pytest.raises(LoraSuiteError, match=r"refused: a backbone of a family.*qwen2; reads safetensors of Llama"):
        export(adapter(tmp_path / "second", other, "lora"), tmp_path / "other", engine="ollama")


def test_halves_on_request(base, tmp_path) -> None:
    source = adapter(tmp_path / "adapter", base, "lora")
    export(source, tmp_path / "out", engine="vllm", dtype="bfloat16", base_model="org/base")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", None)
    assert distance(logits(base, source), logits(base, tmp_path / "out"), logits(base)) < 0.05
    large = load_file(source / WEIGHTS)
    name = min(large)
    from safetensors.torch import save_file

    save_file(large | {name: large[name] + 1e5}, source / WEIGHTS)
    with pytest.raises(LoraSuiteError, match=r"lora_A\.weight: the result's values do not fit float16"):
        export(source, tmp_path / "half", engine="vllm", dtype="float16")


def test_fused_modules_are_exported_whole(tmp_path) -> None:
    base = backbone(tmp_path / "base", "phi3")
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj"], layers_to_transform=[1])
    source = adapter(tmp_path / "adapter", base, config)
    export(source, tmp_path / "out", engine="tgi")
    assert len(modules(tmp_path / "out")) == load(base).config.num_hidden_layers
    assert distance(logits(base, source), logits(base, tmp_path / "out"), logits(base)) < TOLERANCE


def test_the_page_has_the_rules_as_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    rows = re.findall(r"^\| `--for (\S+)` \| (.*?), (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    found = {
        name: (title, version, *(set(cell.split(", ")) for cell in cells)) for name, title, version, *cells in rows
    }
    effects = ("refused", "dropped", "unproven")
    assert found == {
        name: (rules.title, rules.version,
               *({f for f, own in rules.effects.items() if own == effect} or {"-"} for effect in effects))
        for name, rules in ENGINES.items()
    }  # fmt: skip
    assert all(f"| {feature} | {meaning} |" in page for feature, meaning in FEATURES.items())

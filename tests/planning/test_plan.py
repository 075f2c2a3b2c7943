"""Plans from configs alone: against real files, real operations and measured peaks of memory; what they print."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anonymous import peak
from hub_fixtures import ask_client
from hub_server import HubServer
from pico import PICO, pico_model, pico_tokenizer, save_backbone
from planted import OLD_WORDS
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.methods import registry
from peft_lorasuite.models.activations import BATCH_TOKENS
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.planning.plan import Rates, Stage, measure_rates, plan

DEMO = Path(__file__).parents[2] / "peft_lorasuite" / "data" / "demo"
CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
             "torch_dtype": "bfloat16"}  # fmt: skip
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 64, "num_hidden_layers": 5, "head_dim": 8}
LARGER = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 8,
          "vocab_size": 4096, "max_position_embeddings": 512}  # fmt: skip


def fixture(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


def seventy(folder: Path, **values: Any) -> str:
    path = folder / f"{values['vocab_size']}.json"
    path.write_text(json.dumps(LLAMA_70B | values))
    return str(path)


def save_pair(root: Path, *sizes: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[str]:
    """Write two Llamas with one tokenizer."""
    tokenizer = pico_tokenizer(OLD_WORDS)
    models = [pico_model("llama", seed, **values).to(dtype) for seed, values in enumerate(sizes)]
    return [str(save_backbone(root / str(number), model, tokenizer)) for number, model in enumerate(models)]


@pytest.mark.parametrize("layer_map", ["cka", "first"])
def test_map_bytes_are_those_of_its_file(layer_map: str, tmp_path: Path) -> None:
    folders = save_pair(tmp_path, {}, WIDER)
    options = MapOptions(tokens=96, block=32, layer_map=layer_map)
    built = UpgradeMap.build(*folders, options, calibration=[" ".join(OLD_WORDS * 4)])
    tensors = load_file(built.save(tmp_path / "map") / "core.safetensors").values()
    assert plan(*folders, options).map_bytes == pytest.approx(sum(one.nbytes for one in tensors), rel=0.02)


def test_operations_of_a_calibration_are_those_that_torch_counts() -> None:
    model = pico_model("llama")
    calibration, _ = plan(model, model, MapOptions(tokens=100)).stages  # runs 130 tokens
    with FlopCounterMode(display=False) as counter:
        for _ in ("old", "new"):
            model.base_model(torch.arange(130).reshape(2, 65) % 50, use_cache=False)
    assert calibration.operations <= counter.get_total_flops() < 2 * calibration.operations  # attention's own products


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models in bfloat16 that take 90 MB each in float32, and a text beside them."""
    root = tmp_path_factory.mktemp("larger")
    (root / "text.txt").write_text("\n\n".join(" ".join(OLD_WORDS * 4) for _ in range(30)))
    return save_pair(root, LARGER, LARGER, dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "low_memory", [pytest.param(False, id="ordinary"), pytest.param(True, id="low memory", marks=pytest.mark.slow)]
)
def test_planned_memory_holds_on_a_real_pair(low_memory: bool, larger: list[str], tmp_path: Path) -> None:
    options = MapOptions(hidden_map="identity", tokens=512)
    planned = plan(*larger, options, dtype="float32", low_memory=low_memory).map.memory
    words = ["--hidden-map", "identity", "--tokens", "512", "--dtype", "float32", *["--low-memory"] * low_memory]
    text = Path(larger[0]).parent / "text.txt"
    measured = peak("map", *larger, "-o", str(tmp_path / "map"), "--calibration", str(text), *words)
    assert measured < planned < 2 * measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize(("method", "row"), [("lorasuite", "upgrade"), ("transplant", "run")])
def test_planned_memory_of_an_upgrade_holds(method: str, row: str, tmp_path: Path) -> None:
    old, new, adapter, prompts = (str(DEMO / name) for name in ("old", "new", "adapter", "prompts.json"))
    UpgradeMap.build(old, new, MapOptions(layer_map="first")).save(tmp_path / "map")
    words = ["--from", old, "--to", new, "--map", str(tmp_path / "map"), "--method", method]
    words += ["--prompts", prompts, "--set", "prompts=64"] if method == "transplant" else []
    measured = peak("upgrade", adapter, *words, "-o", str(tmp_path / "new"))
    assert measured < getattr(plan(old, new), row).memory < 2 * measured


def test_plans_of_the_papers_pair_of_7_to_8_and_of_70_to_70_billion_print(tmp_path: Path) -> None:
    old, new = seventy(tmp_path, vocab_size=32000), seventy(tmp_path, vocab_size=128256, rope_theta=5e5)
    pairs = [(fixture("MiniCPM-S-1B"), fixture("MiniCPM-2B")), (fixture("Llama-2-7b"), fixture("Llama-3-8b")),
             (old, new)]  # fmt: skip
    made = [plan(*pair, dtype="bfloat16") for pair in pairs]
    for planned in made:
        lines = str(planned).splitlines()
        for row in (*planned.stages, planned.map, planned.upgrade, planned.run):
            assert any(line.startswith(row.name) and f"{row.memory / 1e9:.2f} GB" in line for line in lines)
        needs = {name: ", both backbones" * registry.find(name).needs_backbones for name in registry.names()}
        assert all(any(line.startswith(f"  {name}: the map") and more in line for line in lines)
                   for name, more in needs.items())  # fmt: skip
        values = json.loads(json.dumps(planned.to_dict()))
        assert values["memory"] == planned.map.memory
        assert values["seconds"] == pytest.approx(planned.map.seconds(planned.rates), abs=1e-3)
    assert "52 layers, hidden size 1536, 1.36 B weights, 2.72 GB" in str(made[0])
    for name in ("read", "operations", "memory"):
        values = [getattr(planned.map, name) for planned in made]
        assert values == sorted(set(values)), name
    model, checkpoints = 2 * made[2].new.arch.parameter_count(), made[2].run.read
    assert checkpoints < made[2].map.read < 2.2 * checkpoints
    assert model < made[2].map.memory < 1.2 * model


def test_without_calibration_no_model_runs() -> None:
    names = fixture("Yi-6B"), fixture("Yi-1.5-9B")
    full, fixed = plan(*names), plan(*names, MapOptions(layer_map="last", hidden_map="identity"))
    assert [stage.name for stage in full.stages] == ["calibration", "weights"]
    assert [stage.name for stage in fixed.stages] == ["weights"]
    assert fixed.stages[0].operations < full.stages[1].operations  # without a fit of the hidden map
    assert fixed.map.memory < 2 * full.new.arch.parameter_count() < full.map.memory


def test_low_memory_reads_the_layers_again_for_every_batch_and_holds_none() -> None:
    names = fixture("Llama-2-7b"), fixture("Llama-3-8b")
    ordinary, low = (plan(*names, dtype="float32", low_memory=low) for low in (False, True))
    layers = 2 * sum(side.arch.layers * side.layer for side in (low.old, low.new))
    batches = math.ceil(1.3 * low.options.tokens / BATCH_TOKENS)
    assert low.map.read - ordinary.map.read == layers * (batches - 1)
    assert low.map.operations == ordinary.map.operations
    assert low.map.memory < 4 * low.new.arch.parameter_count() < ordinary.map.memory


def test_a_folder_a_config_file_and_an_open_backbone_give_the_same_plan(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(Path(fixture("Llama-3-8b")).read_text())
    names = folder, folder / "config.json", fixture("Llama-3-8b")
    plans = [plan(name, name).stages for name in (*names, *map(Backbone.open, names))]
    assert all(stages == plans[0] for stages in plans)


def test_of_a_hub_repository_the_config_alone_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    for name in ("Phi-1.5", "Phi-2"):
        hub.add_repo(f"org/{name}", {"config.json": Path(fixture(name)).read_bytes()})
    code = """
from peft_lorasuite.planning.plan import plan
print(json.dumps(plan("org/Phi-1.5", "org/Phi-2@main").map.read))
"""
    assert ask_client(hub, code, tmp_path / "home") == plan(fixture("Phi-1.5"), fixture("Phi-2")).map.read
    assert not hub.requests("safetensors")


def test_the_rank_must_be_positive() -> None:
    with pytest.raises(LoraSuiteError, match="the rank must be positive"):
        plan(fixture("Phi-1.5"), fixture("Phi-2"), rank=0)


def test_an_upgrade_grows_with_the_rank() -> None:
    low, high = (plan(fixture("Phi-1.5"), fixture("Phi-2"), rank=rank).upgrade for rank in (8, 16))
    assert high.operations == 2 * low.operations
    assert low.read < high.read < 2 * low.read
    assert low.memory < high.memory < 2 * low.memory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"broken\.json: the file cannot be read as JSON"),
        ("{}", r"broken\.json: the config has no model_type"),
        ('{"model_type": "llama", "hidden_size": "x"}', r"broken\.json: the config cannot be read"),
        ('{"model_type": "mamba"}', "no converter for model type 'mamba'"),
    ],
)
def test_a_bad_config_is_an_error(config: str, message: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(config)
    with pytest.raises(LoraSuiteError, match=message):
        plan(broken, fixture("Phi-2"))


def test_a_missing_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoraSuiteError, match="backbone not found"):
        plan(tmp_path / "absent.json", fixture("Phi-2"))


def test_seconds_follow_the_rates() -> None:
    assert Stage("all", read=3 * 10**9, operations=2 * 10**11, memory=0).seconds(Rates(read=3, compute=100)) == 3
    measured = measure_rates()
    assert min(measured) > 0
    planned = plan(fixture("Phi-1.5"), fixture("Phi-2"), rates=measured)
    assert f"{measured.compute:.0f} GFLOP/s" in str(planned)
    total = sum(stage.seconds(measured) for stage in planned.stages)
    assert planned.map.seconds(planned.rates) == pytest.approx(total)


@pytest.mark.parametrize("model_type", sorted(set(PICO) - {"gemma3"}))
def test_every_family_can_be_planned(model_type: str) -> None:
    planned = plan(pico_model(model_type), pico_model("llama"))
    assert all(stage.read > 0 and stage.operations > 0 for stage in (*planned.stages, planned.upgrade, planned.run))

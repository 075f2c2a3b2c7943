"""Plans from configs alone: the counts against real tensors, real products and a real map; what they print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import ask_client
from hub_server import HubServer
from pico import PICO, pico_config, pico_model, pico_tokenizer, save_backbone
from planted import EVERY, OLD_WORDS
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.arch.layout import heads_first
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import ATTENTION, OUTPUT_PROJECTIONS, Architecture
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.linalg.assignment import SMALL
from peft_lorasuite.linalg.basis import hidden_map, part_basis, pseudo_inverse
from peft_lorasuite.linalg.similarity import head_similarity, sketch, sketch_signs, unit_similarity
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.planning.counts import SVD, Costs, looks
from peft_lorasuite.planning.plan import plan, text
from peft_lorasuite.planning.rates import Rates, measure_rates
from peft_lorasuite.planning.stages import Side, Stage

CONFIGS = Path(__file__).parent / "fixtures" / "configs"
LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
             "torch_dtype": "bfloat16"}  # fmt: skip
OLD, NEW = (
    architecture(pico_config("llama")),
    architecture(pico_config("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
                             intermediate_size=64, num_hidden_layers=5)),
)  # fmt: skip
COSTS = Costs(Side(OLD, 4), Side(NEW, 4), MapOptions(tokens=96, block=32), shared=60)


def products(work: Callable[[], Any]) -> int:
    """Operations of the matrix products that some work really does, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def drawn(part: str, side: Side, hidden: int | None = None) -> Tensor:
    """Draw a part's weight, with another hidden size if one is given."""
    rows, columns = side.arch.shape(part)
    shape = (hidden or rows, columns) if part in OUTPUT_PROJECTIONS else (rows, hidden or columns)
    return torch.randn(shape)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "minicpm"])
def test_the_weights_are_the_models(name: str) -> None:
    model, side = pico_model(name), Side(architecture(pico_config(name)))
    shapes = [weight.shape for path, weight in model.named_parameters() if weight.ndim == 2 and "wpe" not in path]
    assert side.total == sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("hidden", [48, 400], ids=["all dimensions", "a sketch"])
def test_moving_weights_takes_the_products_that_are_counted(hidden: int) -> None:
    costs = replace(COSTS, new=Side(replace(NEW, hidden=hidden)))
    W, gains = torch.randn(OLD.hidden, hidden), (torch.ones(OLD.hidden), torch.ones(hidden))
    signs = sketch_signs(costs.units, hidden)

    def move() -> None:
        for part in OLD.parts:
            basis = part_basis(OLD, costs.new.arch, part, W, W.T, gains)
            matrix = basis.output_matrix() if part in OUTPUT_PROJECTIONS else basis.input_matrix()
            weight = drawn(part, costs.old)
            rows = weight.T if part in OUTPUT_PROJECTIONS else weight
            rows @ (sketch(matrix, signs[part]) if part in signs else matrix)

    assert costs.moving().fp32 == costs.layers * products(move)


def test_head_similarity_takes_the_products_that_are_counted() -> None:
    old = {part: heads_first(drawn(part, COSTS.old, NEW.hidden), part, OLD.heads) for part in ATTENTION}
    new = {part: heads_first(drawn(part, COSTS.new), part, NEW.heads) for part in ATTENTION}
    counted = products(lambda: head_similarity(old, new, OLD.heads, NEW.heads))
    assert COSTS.head_similarity().fp32 == COSTS.layers * counted


@pytest.mark.parametrize("old", [OLD, architecture(pico_config("gpt_neox"))], ids=["three parts", "two parts"])
@pytest.mark.parametrize("hidden", [48, 600], ids=["all dimensions", "a sketch"])
def test_unit_matching_takes_the_products_that_are_counted(old: Architecture, hidden: int) -> None:
    costs = replace(COSTS, old=Side(old, 4), new=Side(replace(NEW, hidden=hidden)))
    signs = sketch_signs(costs.units, hidden)
    left, right = ({part: sketch(torch.randn(side.arch.intermediate, hidden), signs[part]) for part in costs.units}
                   for side in (costs.old, costs.new))  # fmt: skip
    compared = products(lambda: unit_similarity(left, right, sketches=hidden == 600))
    fewer = min(costs.old.arch.intermediate, costs.new.arch.intermediate)
    fits = 6 * fewer * sum(part.shape[1] for part in left.values())
    assert costs.matching().fp32 == costs.layers * (compared + fits)


def test_the_hidden_map_takes_the_products_that_are_counted() -> None:
    E_o, E_n = torch.randn(400, OLD.hidden), torch.randn(400, NEW.hidden)
    counted = products(lambda: pseudo_inverse(hidden_map(E_o, E_n)))
    counted += products(lambda: hidden_map(E_o[::2], E_n[::2]))  # for the tokens that are left out
    assert replace(COSTS, shared=400).hidden_map().fp64 == pytest.approx(counted + 2 * SVD * OLD.hidden**3, rel=0.2)


def test_calibration_takes_the_products_that_are_counted() -> None:
    model = pico_model("llama")
    tokens = 25
    counted = products(lambda: model.base_model(torch.arange(tokens)[None], use_cache=False))
    linear = 2 * COSTS.old.layer * OLD.layers * tokens
    assert linear <= counted < 1.5 * linear
    assert COSTS.run_old().fp32 > linear
    assert replace(COSTS, item=2).run_old().run == COSTS.run_old().fp32


@pytest.mark.parametrize("layer_map", ["cka", "first"])
def test_the_size_of_a_map_is_that_of_its_file(layer_map: str, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "head_dim": 8,
    }
    folders = [
        str(save_backbone(tmp_path / str(n), pico_model("llama", n, **values), pico_tokenizer(OLD_WORDS)))
        for n, values in enumerate(({}, sizes))
    ]
    options = MapOptions(tokens=96, block=32, layer_map=layer_map)
    built = UpgradeMap.build(*folders, options, calibration=[" ".join(OLD_WORDS * 4)])
    written = (built.save(tmp_path / "map") / "core.safetensors").stat().st_size
    counted = plan(*folders, options).costs.kept
    assert counted < written < counted + 32_000  # names and offsets
    tensors = sum(t.numel() * t.element_size() for t in _tensors(tmp_path / "map" / "core.safetensors"))
    assert counted == pytest.approx(tensors, rel=0.02)


def _tensors(path: Path) -> list[Tensor]:
    return list(load_file(path).values())


def fixture(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


def seventy(folder: Path, **values: Any) -> str:
    path = folder / f"{values['vocab_size']}.json"
    path.write_text(json.dumps(LLAMA_70B | values))
    return str(path)


def test_plans_of_the_papers_pair_of_7_to_8_and_of_70_to_70_billion_print(tmp_path: Path) -> None:
    old, new = seventy(tmp_path, vocab_size=32000), seventy(tmp_path, vocab_size=128256, rope_theta=5e5)
    pairs = [(fixture("MiniCPM-S-1B"), fixture("MiniCPM-2B")), (fixture("Llama-2-7b"), fixture("Llama-3-8b")),
             (old, new)]  # fmt: skip
    made = [plan(*pair) for pair in pairs]
    for planned in made:
        lines = text(planned).splitlines()
        assert all(any(line.startswith(stage.name) for line in lines) for stage in planned.stages)
        assert any(line.startswith("map: ") and "bound" in line for line in lines)
        assert any(line.startswith("  lorasuite: the map") for line in lines)
        assert json.loads(json.dumps(planned.to_dict()))["seconds"] == round(planned.seconds, 3)
    assert "1.36 B weights, 2.72 GB" in text(made[0])
    assert "80 layers, hidden size 8192, 64/8 heads of 128, 28672 units" in text(made[2])
    assert made[0].seconds < made[1].seconds < made[2].seconds
    assert made[0].memory < made[1].memory < made[2].memory
    checkpoints = sum(side.total * side.item for side in (made[2].costs.old, made[2].costs.new))
    assert checkpoints < made[2].read < 2.2 * checkpoints
    larger = made[2].costs.new
    assert made[2].mapped == larger.total * larger.item + made[2].costs.outputs(larger)
    assert made[2].memory < made[2].bound - larger.total * larger.item  # a matched layer of each, no model


def test_depth_costs_time_and_no_memory_but_the_maps_own() -> None:
    deep = [replace(COSTS, options=MapOptions(layer_map="first"), old=Side(replace(OLD, layers=n)),
                    new=Side(replace(NEW, layers=n))) for n in (8, 16)]  # fmt: skip
    for one, two in zip(*(costs.stages() for costs in deep), strict=True):
        grows = one.name != "hidden map"
        assert (two.fp32, two.assign) == ((2 if grows else 1) * one.fp32, (2 if grows else 1) * one.assign)
        assert two.memory - one.memory in (0, deep[1].kept - deep[0].kept)


def test_without_calibration_no_model_runs() -> None:
    names = fixture("Yi-6B"), fixture("Yi-1.5-9B")
    full, fixed = plan(*names), plan(*names, MapOptions(layer_map="last", hidden_map="identity"))
    assert {stage.name for stage in full.stages} - {stage.name for stage in fixed.stages} == {
        "calibration, old", "calibration, new", "layer similarity"}  # fmt: skip
    assert not any(stage.run for stage in fixed.stages)
    assert fixed.read < full.read
    assert fixed.bound == full.bound - full.costs.new.total * 2
    assert fixed.stages[0].fp64 < full.stages[0].fp64


def test_low_memory_reads_the_layers_again_for_every_batch_and_holds_none() -> None:
    names = fixture("Llama-2-7b"), fixture("Llama-3-8b")
    plans = {(dtype, low): plan(*names, dtype=dtype, low_memory=low)
             for dtype in ("auto", "float32") for low in (False, True)}  # fmt: skip
    new = plans["auto", False].costs.new
    layers, tokens = new.arch.layers * new.layer * new.item, 2048 * 1.3
    for dtype in ("auto", "float32"):
        ordinary, low = (plans[dtype, low].costs.run_new() for low in (False, True))
        assert low.read - ordinary.read == layers * (math.ceil(tokens / 1024) - 1)
        assert low.mapped < ordinary.mapped or dtype == "float32"
        assert plans[dtype, False].bound - plans[dtype, True].bound == new.total * new.item
        assert plans[dtype, True].memory < plans[dtype, True].bound
        assert low.fp32 + low.run == ordinary.fp32 + ordinary.run
    assert plans["float32", False].costs.run_new().memory > 4 * new.total > plans["float32", True].memory
    assert "the models run from mapped files" in text(plans["auto", False])


def test_looks_of_matching_are_those_of_a_real_pair() -> None:
    assert looks(200, 300)[0] == 200 * 300
    scores, left, places = looks(4864, 8960)  # three layers: 52, 55 and 58 million, and 129, 0 and 217 left
    assert scores == pytest.approx(5.5e7, rel=0.1)
    assert 100 < left <= SMALL
    assert places - left == 8960 - 4864


@pytest.mark.parametrize("similarity", ["cca", "pwcca", "procrustes"])
def test_the_other_similarities_cost_more(similarity: str) -> None:
    names = fixture("pythia-410m"), fixture("pythia-1b")
    stages = [{stage.name: stage for stage in plan(*names, MapOptions(similarity=name)).stages}
              for name in ("cka", similarity)]  # fmt: skip
    assert stages[0]["layer similarity"].fp32 < stages[1]["layer similarity"].fp32


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
from peft_lorasuite.linalg.assignment import SMALL
from peft_lorasuite.planning.plan import plan
print(json.dumps(plan("org/Phi-1.5", "org/Phi-2@main").read))
"""
    assert ask_client(hub, code, tmp_path / "home") == plan(fixture("Phi-1.5"), fixture("Phi-2")).read
    assert not hub.requests("safetensors")


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(LoraSuiteError, match="the rank is not positive"):
        plan(fixture("Phi-1.5"), fixture("Phi-2"), rank=0)


def test_a_bad_config_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(LoraSuiteError, match=r"broken\.json: the file cannot be read as JSON"):
        plan(broken, fixture("Phi-2"))
    for config, told in (
        ("{}", "the config names no"),
        ('{"model_type": "llama", "hidden_size": "x"}', "the config cannot be"),
    ):
        broken.write_text(config)
        with pytest.raises(LoraSuiteError, match=rf"broken\.json: {told} "):
            plan(broken, fixture("Phi-2"))
    broken.write_text('{"model_type": "mamba"}')
    with pytest.raises(LoraSuiteError, match="unknown model type 'mamba'"):
        plan(broken, fixture("Phi-2"))
    with pytest.raises(LoraSuiteError, match="there is no such backbone"):
        plan(tmp_path / "absent.json", fixture("Phi-2"))


def test_seconds_follow_the_rates() -> None:
    stage = Stage("all", read=3 * 10**9, fp32=2 * 10**11, fp64=10**11, run=10**11, assign=10**10)
    rates = Rates(read=3, fp32=100, fp64=50, bf16=25, assign=10, scores=2)
    assert rates.seconds(stage) == pytest.approx(1 + 2 + 2 + 4 + 1)
    assert rates.seconds(replace(stage, scores=10**10)) == pytest.approx(15)
    with pytest.raises(LoraSuiteError, match="a rate is not positive"):
        Rates(fp64=0)


def test_the_machine_at_hand_is_measured() -> None:
    measured = measure_rates(size=64, bytes_read=2**20)
    assert all(value > 0 for value in vars(measured).values())
    assert plan(fixture("Phi-1.5"), fixture("Phi-2"), rates=measured).seconds > 0


def test_every_family_can_be_planned() -> None:
    for name in PICO:
        side = Side(architecture(pico_config(name)))
        assert all(stage.memory > 0 for stage in Costs(side, COSTS.new, COSTS.options, 60).stages())

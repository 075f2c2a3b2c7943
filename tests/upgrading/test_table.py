"""Any family to any family, end to end: map, upgrade, load in PEFT, run; ``--all-pairs`` writes the table."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from canon import KEYS, OWN_KEYS
from pico import EXPERTS, MINICPM, PICO, pico_model, pico_tokenizer, save_backbone
from planted import EVERY, NEW_WORDS, OLD_WORDS, PER_LAYER
from safetensors import safe_open

from peft_lorasuite import MapOptions, UpgradeMap
from peft_lorasuite.arch.spec import Architecture
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.report import Report
from peft_lorasuite.upgrading.upgrade import upgrade

TABLE = Path(__file__).parents[2] / "docs" / "families-table.md"
COMMAND = "pytest tests/upgrading/test_table.py --all-pairs -q"
LARGER = {"layers": 4, "heads": 8, "groups": 4, "hidden": 64, "intermediate": 80}
"""The new backbones: one layer more, twice the heads, wider. Bloom's feed-forward layer is always 4 D wide, and some
configs have no key/value heads."""
OPTIONS = MapOptions(tokens=96, block=32)
TEXTS = [" ".join(random.Random(n).choices([w for w in OLD_WORDS if w in NEW_WORDS], k=40)) for n in range(3)]
TYPES = tuple(name for name in EVERY if name not in EXPERTS)
"""Mixtures of experts have tests of their own."""
OFFSETS = {1: TYPES, 6: TYPES[::2]}
"""The pairs of an ordinary run: how far the new family stands behind the old one, and for which old families. Each
family is a source once or twice, and a target as often."""
FEW = [(old, TYPES[(TYPES.index(old) + step) % len(TYPES)]) for step, sources in OFFSETS.items() for old in sources]
REPEATED = {
    "cohere2": "llama", "gemma": "gemma2", "gptj": "phi", "ministral": "mistral", "olmo3": "olmo2", "opt": "phi",
    "smollm3": "llama", "starcoder2": "phi",
}  # fmt: skip
"""Family -> one that has the same parts and fuses the same of them, and thus the same cells."""
HYBRID = ("gemma4_text", "qwen3_5_text")
"""Types whose layers differ: what is transferred depends on which layers are matched."""
LISTED = tuple(name for name in TYPES if name not in REPEATED and name not in HYBRID)
ALL = [(old, new) for old in LISTED for new in LISTED]
REFUSED: dict[tuple[str, str], str] = {}
"""Pair -> what the error says, for pairs that are refused: there are none."""

HEAD = f"""# Any family to any family

Each cell is an upgrade from the family of its row to that of its column, with two small backbones with random weights:
build the map, upgrade, load with `peft.PeftModel.from_pretrained`, run one forward pass. The new backbone has one more
layer, twice the heads and twice the hidden size. The adapter has rank 3 on every linear module.

The number is the fraction of the squared norm of the updates that remains when split projections are fused and
truncated to the adapter's rank, as a mean over the modules (1.00: nothing is lost). "no gate": the new family has no
gate projection, and these updates are dropped. A projection that only the new family has gets no update. The report of
an upgrade lists these and all other structural differences.

Families that fuse the same projections as one in the table are left out: {", ".join(REPEATED)}. So are those whose
layers differ: {", ".join(HYBRID)}. Mixtures of experts and multimodal types are not listed; `peft-lorasuite families`
names them.

Written by `{COMMAND}` (`make table`).
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        pairs = ALL if metafunc.config.getoption("--all-pairs") else FEW
        metafunc.parametrize("pair", pairs, ids=[f"{old}-{new}" for old, new in pairs])


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str], str]:
    """What became of each pair that ran."""
    return {}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Backbone]:
    """Return a function ``(family, larger) -> Backbone`` that makes each backbone once."""

    @cache
    def made(name: str, larger: bool) -> Backbone:
        keys = KEYS | OWN_KEYS.get(name, {})
        known = PICO[name] | {"num_kv_heads": None}
        sizes = {keys[size]: value for size, value in LARGER.items() if keys[size] in known} if larger else {}
        if larger:
            sizes |= {key: [PICO[name][key][1], *PICO[name][key]] for key in PER_LAYER if key in PICO[name]}
        words = NEW_WORDS if larger else OLD_WORDS
        model = pico_model(name, seed=int(larger), vocab_size=137 if larger else 120, **sizes)
        config = MINICPM | sizes | {"vocab_size": model.config.vocab_size} if name == "minicpm" else None
        folder = tmp_path_factory.mktemp(f"{name}-{'new' if larger else 'old'}")
        return Backbone.open(str(save_backbone(folder, model, pico_tokenizer(words), config)))

    return made


@pytest.fixture(scope="session")
def adapter(
    tmp_path_factory: pytest.TempPathFactory, backbone: Callable[[str, bool], Backbone]
) -> Callable[[str], Path]:
    """Return a function that makes each family's adapter once: a random LoRA on every linear module."""

    @cache
    def made(name: str) -> Path:
        torch.manual_seed(0)
        old = backbone(name, False)
        modules = [old.arch.module(n, site) for n, site in old.arch.modules]
        conv1d = any(site.conv1d for site in old.arch.sites)
        config = peft.LoraConfig(
            r=3, target_modules=modules, fan_in_fan_out=conv1d, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        folder = tmp_path_factory.mktemp(f"{name}-lora")
        peft.get_peft_model(old.load(dtype=torch.float32), config).save_pretrained(folder)
        return folder

    return made


def test_a_pair_runs_from_end_to_end(
    pair: tuple[str, str],
    cells: dict[tuple[str, str], str],
    backbone: Callable[[str, bool], Backbone],
    adapter: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    old, new = backbone(pair[0], False), backbone(pair[1], True)
    refused, upgraded = None, None
    try:
        upgraded = upgrade(adapter(pair[0]), UpgradeMap.build(old, new, OPTIONS, calibration=TEXTS))
    except LoraSuiteError as error:
        refused = error.what
    assert refused == REFUSED.get(pair)
    if upgraded is None:
        cells[pair] = f"refused: {refused}"
        return
    check_effect(new, upgraded.save(tmp_path / "new"))
    check_coverage(upgraded.report, adapter(pair[0]), old.arch, new.arch)
    cells[pair] = cell(upgraded.report, old.arch, new.arch)


def check_effect(new: Backbone, folder: Path) -> None:
    """PEFT loads the adapter whole, and it changes the logits to other finite ones."""
    ids = torch.arange(12)[None]
    model = new.load(dtype=torch.float32)
    with torch.inference_mode():
        plain = model(ids).logits
        tuned = peft.PeftModel.from_pretrained(model, folder)
        logits = tuned(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - plain).norm() > 1e-4 * plain.norm()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        written = {name.replace(".weight", ".default.weight") for name in file.keys()}  # noqa: SIM118 (no dict)
    assert written == {name for name, _ in tuned.named_parameters() if "lora_" in name}


def check_coverage(report: Report, source: Path, old: Architecture, new: Architecture) -> None:
    """Every tensor of the source is transferred, or not transferred for the reason that the two families give."""
    with safe_open(source / "adapter_model.safetensors", "pt") as file:
        assert set(report.tensors) == set(file.keys())
    lost = [part for part in old.parts if part not in new.parts]
    hybrid = any(site.layers is not None for site in new.sites)
    sites = {f".{site.path}.": [part for part in site.parts if part in lost] for site in old.sites}
    for name, fate in report.tensors.items():
        missing = next(parts for path, parts in sites.items() if path in name)
        if hybrid and fate.endswith("which is matched with this layer"):
            continue
        assert (fate == "transferred") == (not missing), name
        assert all(f"{new.family} has no {part} projection" in fate for part in missing), fate
    for part in lost:
        assert any(f"a {part} projection: its updates" in line for line in report.facts["differences"])
    assert 0 < report.energy_kept <= 1 + 1e-6


def cell(report: Report, old: Architecture, new: Architecture) -> str:
    lost = [f"no {part}" for part in old.parts if part not in new.parts]
    return "; ".join([f"{report.energy_kept:.2f}", *lost])


def test_the_table_is_written_or_up_to_date(request: pytest.FixtureRequest, cells: dict[tuple[str, str], str]) -> None:
    if request.config.getoption("--all-pairs"):
        assert set(cells) == set(ALL)
        rows = [["old \\ new", *LISTED], ["---"] * (len(LISTED) + 1)]
        rows += [[old, *(cells[old, new] for new in LISTED)] for old in LISTED]
        TABLE.write_text(HEAD + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
    committed = read_table()
    assert set(committed) == set(ALL)
    for pair, text in ((pair, text) for pair, text in cells.items() if not set(pair) & set(HYBRID)):
        known = tuple(REPEATED.get(name, name) for name in pair)
        assert committed[known].partition(";")[2] == text.partition(";")[2], f"{pair}: run {COMMAND}"


def read_table() -> dict[tuple[str, str], str]:
    lines = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    (_, *names), _, *rows = lines
    return {(row[0], new): text for row in rows for new, text in zip(names, row[1:], strict=True)}


def test_an_ordinary_run_has_each_family_on_both_sides() -> None:
    assert len(FEW) == len(set(FEW))
    for side in (0, 1):
        assert {pair[side] for pair in FEW} == set(TYPES)

"""What makes it fast, held by ratios with wide margins: factored maps, imports, one call for many adapters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import command_fixtures
import pytest
import torch
from command_fixtures import Pair

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from common import fastest
from random_pair import backbone
from speed_layer import WEIGHTS_ONLY, move_updates, naive_layer, naive_truncation

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.mapping.layers import LayerMatcher
from peft_lorasuite.text.vocabulary import tokenizer_hash

pair = command_fixtures.pair
NARROW = {"hidden_size": 512, "intermediate_size": 1280, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE = {"hidden_size": 768, "intermediate_size": 1920, "num_attention_heads": 12, "num_key_value_heads": 12}
HEAVY = ("torch", "transformers", "peft", "scipy", "datasets", "accelerate", "matplotlib")


def test_maps_are_far_faster_than_written_down_naively(tmp_path: Path) -> None:
    """Small as these are, and beside other tests; benchmarks/speed.py measures it at the size of MiniCPM."""
    sides = backbone(tmp_path / "old", layers=1, **NARROW), backbone(tmp_path / "new", layers=1, seed=1, **WIDE)
    old, new = (Backbone.open(folder) for folder in sides)
    built = UpgradeMap.build(old, new, WEIGHTS_ONLY)
    factored = fastest(lambda: LayerMatcher(old, new, built.hidden, WEIGHTS_ONLY).match(0, 0))
    factored += fastest(lambda: move_updates(built, built.layers[0]))
    measured = naive_layer(old, new, 0, built.hidden, move_updates(built, built.layers[0]))
    assert measured["largest_difference"] < 1e-5, "both compute the same similarities"
    assert measured["naive_maps"] + measured["naive_update"] > 3 * factored


def test_the_naive_factors_are_the_same_update() -> None:
    A, B = torch.randn(4, 30), torch.randn(20, 4)
    left, right = naive_truncation(B @ A, 4)
    assert torch.allclose(left @ right, B @ A, atol=1e-4)


@pytest.mark.parametrize("words", [["--help"], ["upgrade", "--help"], ["families"], ["--version"]], ids=" ".join)
def test_commands_that_need_no_tensor_import_none(words: list[str]) -> None:
    program = (
        "import sys\nfrom peft_lorasuite.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(' '.join(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_an_upgrade_by_weights_imports_no_peft(pair: Pair, tmp_path: Path) -> None:
    """Importing it takes longer than the whole upgrade; what was written is read by it in test_existing_code."""
    program = (
        "import sys\nfrom peft_lorasuite.cli.main import main\nmain(sys.argv[1:])\n"
        "sys.exit(' '.join(name for name in ('peft', 'scipy', 'datasets', 'matplotlib') if name in sys.modules) or 0)"
    )
    words = [pair.adapter, "--from", pair.old, "--to", pair.new, "--map", pair.map, "--method", "lorasuite"]
    command = [sys.executable, "-c", program, "upgrade", *map(str, words), "-o", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "adapter_config.json").is_file()


def test_an_upgrade_with_a_ready_map_reads_no_vocabulary(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer whose files were written anew is read after all, and the same vocabulary is found in it."""
    reads = []
    monkeypatch.setattr(
        "peft_lorasuite.mapping.fingerprint.tokenizer_hash", lambda one: reads.append(one) or tokenizer_hash(one)
    )
    built = UpgradeMap.load(pair.map)
    upgrade(pair.adapter, built, method="copy", old=pair.old, new=pair.new)
    assert reads == []
    again = shutil.copytree(pair.new, tmp_path / "again")
    text = (again / "tokenizer.json").read_text()
    (again / "tokenizer.json").write_text(text + "\n")
    upgrade(pair.adapter, built, method="copy", old=pair.old, new=again)
    assert len(reads) == 1

"""Sections of a map: kept beside the core, added later, read lazily, refused when something is wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file

from peft_lorasuite import Backbone, LoraSuiteError, MapOptions, UpgradeMap, upgrade
from peft_lorasuite.adapters.adapter import Adapter
from peft_lorasuite.linalg.lowrank import LowRank
from peft_lorasuite.mapping.sections import SectionRequest, SectionSpec
from peft_lorasuite.methods.base import MethodInput, MethodResult
from peft_lorasuite.methods.registry import NoOptions, method
from peft_lorasuite.methods.sections import add_section, get_section
from peft_lorasuite.upgrading.map_cache import load_or_build_map

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "to", "red", "sun"]
OPTIONS = MapOptions(layer_map="proportional")
SVD = "svd.safetensors"
Pair = tuple[Backbone, Backbone]


def norms(request: SectionRequest) -> dict[str, torch.Tensor]:
    """A third party's section: the norm of every new weight."""
    return {
        f"{pair.new}.{part}": request.new.part(pair.new, part).norm()[None]
        for pair in request.layers
        for part in request.parts
    }


NORMS = SectionSpec("norms", norms, (), lambda kept, options: True)


@method("scaled-copy", section=NORMS)
def scaled_copy(inputs: MethodInput, options: NoOptions) -> MethodResult:
    """Give every new module an update of rank 1 of the norm of its weight."""
    section, arch = get_section(inputs, "scaled-copy", NORMS, options), inputs.map.new.arch
    updates = {}
    for pair in inputs.map.layers:
        for part in inputs.map.common_parts(inputs.adapter.parts):
            out, in_ = arch.shape(part)
            size = section.read(f"{pair.new}.{part}", (1,))
            updates[pair.new, part] = LowRank(torch.ones(1, in_) * size, torch.ones(out, 1))
    return MethodResult(updates)


def backbones(folder: Path, seeds: tuple[int, int] = (1, 2)) -> Pair:
    old, new = (
        Backbone.open(save_backbone(folder / f"{name}{seed}", pico_model(name, seed), pico_tokenizer(WORDS)))
        for name, seed in zip(("llama", "phi3"), seeds, strict=True)
    )
    return old, new


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return backbones(tmp_path)


def adapter(arch: Any, parts: tuple[str, ...] = ("q", "v")) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for layer in range(arch.layers):
        for part in parts:
            out, in_ = arch.shape(part)
            A, B = torch.randn(2, in_, generator=generator), torch.randn(out, 2, generator=generator)
            updates[layer, part] = LowRank(A, B)
    return Adapter(arch, updates)


def with_svd(old: Backbone, new: Backbone, options: Any = None) -> UpgradeMap:
    return add_section(UpgradeMap.build(old, new, OPTIONS), "cross-lora", old, new, options=options)


def both(pair: Pair) -> UpgradeMap:
    return add_section(with_svd(*pair), "scaled-copy", *pair)


def deltas(upgraded: Any) -> dict[Any, torch.Tensor]:
    return {key: update.delta_weight() for key, update in upgraded.adapter.updates.items()}


def same(left: Any, right: Any) -> bool:
    other = deltas(right)
    return all(torch.allclose(value, other[key], rtol=1e-4, atol=1e-5) for key, value in deltas(left).items())


@pytest.mark.parametrize("method", ["cross-lora", "scaled-copy"])
def test_built_saved_and_on_demand_sections_give_the_same(method: str, pair: Pair, tmp_path: Path) -> None:
    old, new = pair
    source = adapter(old.arch)
    core = UpgradeMap.build(old, new, OPTIONS)
    built = add_section(core, method, old, new)
    folder = built.save(tmp_path / "map")
    loaded = UpgradeMap.load(folder)
    wanted = upgrade(source, core, method=method, old=old, new=new)  # built for this adapter alone
    assert same(wanted, upgrade(source, built, method=method))
    assert same(wanted, upgrade(source, loaded, method=method))


def test_the_sizes_on_disk_are_stated(pair: Pair, tmp_path: Path) -> None:
    folder = both(pair).save(tmp_path / "map")
    records = json.loads((folder / "map.json").read_text())["sections"]
    assert records.keys() == {"svd", "norms"}
    for record in records.values():
        assert record["bytes"] == (folder / record["file"]).stat().st_size
    assert records["svd"]["settings"] == {"rank": 320}
    assert UpgradeMap.load(folder).describe()["sections"] == records


def test_a_section_is_added_without_touching_the_rest(pair: Pair, tmp_path: Path) -> None:
    folder = with_svd(*pair, {"rank": 4}).save(tmp_path / "map")
    before = (folder / SVD).stat()
    core = load_file(folder / "core.safetensors")
    add_section(UpgradeMap.load(folder), "scaled-copy", *pair, parts=["q"]).save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"map.json", "core.safetensors", SVD, "norms.safetensors"}
    after = (folder / SVD).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # linked, not written again
    assert all(torch.equal(value, core[name]) for name, value in load_file(folder / "core.safetensors").items())
    loaded = UpgradeMap.load(folder)
    assert loaded.sections["norms"].parts == ("q",)
    copied = loaded.save(tmp_path / "copy")
    assert (copied / SVD).read_bytes() == (folder / SVD).read_bytes()
    assert (copied / SVD).stat().st_ino != after.st_ino


def test_no_file_of_a_section_is_opened_before_it_is_wanted(pair: Pair, tmp_path: Path) -> None:
    folder = with_svd(*pair).save(tmp_path / "map")
    (folder / SVD).unlink()
    loaded = UpgradeMap.load(folder)
    upgrade(adapter(pair[0].arch), loaded, method="lorasuite")
    with pytest.raises(LoraSuiteError, match=r"no svd\.safetensors"):
        upgrade(adapter(pair[0].arch), loaded, method="cross-lora")


def test_a_missing_section_says_how_to_get_it(pair: Pair) -> None:
    core = UpgradeMap.build(*pair, OPTIONS)
    with pytest.raises(
        LoraSuiteError, match=r"no section for 'cross-lora'.*add_section\(map, 'cross-lora'.*--methods cross-lora"
    ):
        upgrade(adapter(pair[0].arch), core, method="cross-lora")


def test_a_section_of_other_options_or_parts_does_not_serve(pair: Pair) -> None:
    old, new = pair
    built = with_svd(old, new, {"rank": 4})
    with pytest.raises(LoraSuiteError, match="with these options"):
        upgrade(adapter(old.arch), built, method="cross-lora")
    upgrade(adapter(old.arch), built, method="cross-lora", options={"rank": 3})
    only_q = add_section(UpgradeMap.build(old, new, OPTIONS), "cross-lora", old, new, parts=["q"])
    with pytest.raises(LoraSuiteError, match="and parts"):
        upgrade(adapter(old.arch), only_q, method="cross-lora")
    upgrade(adapter(old.arch, ("q",)), only_q, method="cross-lora")
    upgrade(adapter(old.arch), only_q, method="cross-lora", old=old, new=new)


def test_a_section_needs_the_maps_own_backbones(pair: Pair, tmp_path: Path) -> None:
    old, other = backbones(tmp_path, (1, 7))
    core = UpgradeMap.build(*pair, OPTIONS)
    with pytest.raises(LoraSuiteError, match="another new backbone"):
        add_section(core, "cross-lora", old, other)
    with pytest.raises(LoraSuiteError, match="has no section"):
        add_section(core, "lorasuite", *pair)
    with pytest.raises(LoraSuiteError, match="unknown method"):
        add_section(core, "cross-lorra", "nowhere", "nowhere")  # refused before the backbones are opened
    with pytest.raises(LoraSuiteError, match="unknown part"):
        add_section(core, "cross-lora", *pair, parts=["qq"])


def broken_map(pair: Pair, folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    path = with_svd(*pair).save(folder / "map")
    return path, load_file(path / SVD), json.loads((path / "map.json").read_text())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any], key: str | None = None) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / SVD, metadata={"map": key or meta["sections"]["svd"]["map"]})
    meta["sections"]["svd"]["bytes"] = (folder / SVD).stat().st_size
    (folder / "map.json").write_text(json.dumps(meta))


def test_broken_files_are_reported(pair: Pair, tmp_path: Path) -> None:
    folder, tensors, meta = broken_map(pair, tmp_path)
    source = adapter(pair[0].arch)

    def fails(words: str) -> None:
        with pytest.raises(LoraSuiteError, match=words):
            upgrade(source, UpgradeMap.load(folder), method="cross-lora")

    rewrite(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith("1.q")}, meta)
    fails("lacks a tensor")
    rewrite(folder, {name: tensor[:-1] for name, tensor in tensors.items()}, meta)
    fails("wrong shape")
    rewrite(folder, {name: tensor * float("nan") for name, tensor in tensors.items()}, meta)
    fails("not finite")
    rewrite(folder, {name: tensor[..., :1] for name, tensor in tensors.items()}, meta)
    fails("too few singular vectors")
    rewrite(folder, tensors, meta, key="elsewhere")
    fails("belongs to another map")
    rewrite(folder, tensors, meta)
    whole = (folder / SVD).read_bytes()
    (folder / SVD).write_bytes(whole[: len(whole) // 2])
    fails("the file size differs")
    meta["sections"]["svd"]["bytes"] = len(whole) // 2
    (folder / "map.json").write_text(json.dumps(meta))
    fails("malformed safetensors file")


@pytest.mark.parametrize(
    "change", [{"map": "other"}, {"file": "../svd.safetensors"}, {"bytes": "many"}, {"parts": None}, {"settings": None}]
)
def test_a_wrong_record_is_reported(change: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    folder, _, meta = broken_map(pair, tmp_path)
    meta["sections"]["svd"] |= change
    (folder / "map.json").write_text(json.dumps(meta))
    with pytest.raises(LoraSuiteError):
        UpgradeMap.load(folder)


def test_the_kept_map_of_a_pair_gets_the_sections_that_are_asked_for(pair: Pair) -> None:
    core = load_or_build_map(*pair, OPTIONS)
    assert core.sections == {}
    assert load_or_build_map(*pair, OPTIONS, methods=["cross-lora", "lorasuite"]).sections.keys() == {"svd"}
    again = load_or_build_map(*pair, OPTIONS, methods=["cross-lora"]).sections["svd"]
    assert again.source is not None  # read, not built


def test_a_map_from_before_there_were_sections_is_read(pair: Pair, tmp_path: Path) -> None:
    folder = UpgradeMap.build(*pair, OPTIONS).save(tmp_path / "map")
    meta = json.loads((folder / "map.json").read_text())
    del meta["sections"]
    (folder / "map.json").write_text(json.dumps(meta))
    assert UpgradeMap.load(folder).sections == {}


def test_a_section_of_a_removed_method_is_ignored_with_a_warning(pair: Pair, tmp_path: Path, caplog) -> None:
    folder = with_svd(*pair).save(tmp_path / "map")
    meta = json.loads((folder / "map.json").read_text())
    meta["sections"]["transport"] = meta["sections"]["svd"] | {"file": "transport.safetensors"}
    (folder / "map.json").write_text(json.dumps(meta))
    with caplog.at_level(logging.WARNING, logger="peft_lorasuite"):
        loaded = UpgradeMap.load(folder)
    assert loaded.sections.keys() == {"svd"}
    assert "the section 'transport' is ignored" in caplog.text
    upgrade(adapter(pair[0].arch), loaded, method="cross-lora")

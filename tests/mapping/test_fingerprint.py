"""Which backbone a map belongs to, where fine-tunes of one base share shape, tokenizer and embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_fixtures
import hub_pair
import pytest
import torch
from hub_fixtures import ask_client, run_client
from hub_pair import OLD, TOOLS
from hub_server import HubServer
from pico import pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load, save

from peft_lorasuite import MapOptions, from_upgraded, upgrade
from peft_lorasuite.errors import LoraSuiteError
from peft_lorasuite.mapping.fingerprint import check_identity, read_identity
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.map_cache import cache_folder, load_or_build_map

hub, pair, made = hub_fixtures.hub, hub_pair.pair, hub_pair.made
OPTIONS = MapOptions(layer_map="proportional")


def tuned(place: Path, *, part: str = "q_proj", **sizes: Any) -> Path:
    """Write a fine-tune of a small base: one projection of one layer is another, the embedding is not."""
    model = pico_model("llama", seed=2, **sizes)
    with torch.no_grad():
        weight = getattr(model.model.layers[1].self_attn, part).weight
        weight += 0.1 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    return save_backbone(place, model, pico_tokenizer(["fox", *hub_pair.WORDS]))


def test_fine_tunes_that_share_an_embedding_get_a_map_each(pair: Path, tmp_path: Path) -> None:
    one, two = (tuned(tmp_path / name, part=part) for name, part in (("one", "q_proj"), ("two", "v_proj")))
    old, first, second = Backbone.open(pair / "old"), Backbone.open(one), Backbone.open(two)
    assert read_identity(first).samples["embedding"] == read_identity(second).samples["embedding"]
    maps = [load_or_build_map(old, new, OPTIONS) for new in (first, second)]
    assert maps[0].new.key != maps[1].new.key
    assert len(list(cache_folder().iterdir())) == 2
    again = [load_or_build_map(old, Backbone.open(place), OPTIONS) for place in (one, two)]
    assert [kept.new.samples for kept in again] == [built.new.samples for built in maps]
    assert all(kept.source for kept in again), "both were kept"
    with pytest.raises(LoraSuiteError, match=r"another new backbone .*the values of the projections differ"):
        upgrade(pair / "lora", maps[0], old=pair / "old", new=two)


def test_an_unknown_option_is_found_before_a_map_is_built(pair: Path) -> None:
    with pytest.raises(LoraSuiteError, match=r"unknown option of transplant 'prompt'.*did you mean 'prompts'\?"):
        from_upgraded(
            pair / "new", pair / "lora", source_model=pair / "old", method="transplant", options={"prompt": 8}
        )
    assert not list(cache_folder().glob("*"))


def test_a_copy_in_another_dtype_or_in_memory_is_the_same(tmp_path: Path) -> None:
    model = pico_model("phi3").to(torch.bfloat16)
    kept = read_identity(Backbone.open(save_backbone(tmp_path / "bfloat16", model, pico_tokenizer(hub_pair.WORDS))))
    wide = Backbone.open(save_backbone(tmp_path / "float32", model.float(), pico_tokenizer(hub_pair.WORDS)))
    assert read_identity(wide).samples == kept.samples
    model.config._name_or_path = str(tmp_path / "float32")
    check_identity(kept, Backbone.open(model), "new")


def edited(folder: Path, **values: Any) -> None:
    meta = json.loads((folder / "map.json").read_text())
    (folder / "map.json").write_text(json.dumps(meta | values))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut core": lambda f: (f / "core.safetensors").write_bytes((f / "core.safetensors").read_bytes()[:500]),
    "no core": lambda f: (f / "core.safetensors").unlink(),
    "cut section": lambda f: (f / "svd.safetensors").write_bytes(b"cut"),
    "another format": lambda f: edited(f, format=99),
    "an older format": lambda f: edited(f, format=1),
    "another layer map": lambda f: edited(f, layers="none"),
    "no identity": lambda f: edited(f, old={"revision": 5}),
    "no JSON": lambda f: (f / "map.json").write_text("{"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_kept_map_that_cannot_be_read_is_built_anew(kind: str, pair: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = Backbone.open(pair / "old"), Backbone.open(pair / "new")
    first = load_or_build_map(old, new, OPTIONS, methods=["cross-lora"])
    (folder,) = cache_folder().iterdir()
    DAMAGE[kind](folder)
    with caplog.at_level("WARNING", logger="peft_lorasuite"):
        again = load_or_build_map(old, new, OPTIONS, methods=["cross-lora"])
    assert torch.equal(again.hidden, first.hidden)
    assert caplog.text.count("the cached upgrade map is broken and is built again: ") == 1
    assert load_or_build_map(old, new, OPTIONS, methods=["cross-lora"]).source is not None, "what was built is kept"
    assert list(cache_folder().iterdir()) == [folder]


ASK = (
    TOOLS
    + """
from peft_lorasuite.models.backbone import Backbone
from peft_lorasuite.upgrading.map_cache import load_or_build_map
from peft_lorasuite.mapping.upgrade_map import MapOptions
def home_of(new):
    made = load_or_build_map(Backbone.open(OLD), Backbone.open(new), MapOptions(layer_map="proportional"))
    upgrade(LORA, made, old=OLD, new=new)
    return made.source and made.source.name
print(json.dumps([home_of(new) for new in ("org/one", "org/two", "org/one", "org/two")]))
"""
)


def test_equal_samples_and_other_files_on_the_hub_get_a_map_each(hub: HubServer, pair: Path, tmp_path: Path) -> None:
    place = tuned(tmp_path / "one")
    hub.add_repo(OLD, pair / "old")
    hub.add_repo("org/one", place)
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    tensors = load(files["model.safetensors"])
    tensors["model.layers.0.mlp.up_proj.weight"][1] += 1  # no row of the sample
    hub.add_repo("org/two", files | {"model.safetensors": save(tensors, metadata={"format": "pt"})})
    names = {"OLD": OLD, "LORA": str(pair / "lora")}
    built_one, built_two, kept_one, kept_two = ask_client(hub, ASK, tmp_path / "home", names)
    assert (built_one, built_two) == (None, None)
    assert None not in (kept_one, kept_two)
    assert kept_one != kept_two
    code = "import json\n" + "".join(f"{name} = {value!r}\n" for name, value in names.items()) + ASK
    done = run_client(hub, code, home=tmp_path / "home", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[0] == kept_one, "the samples find it where nobody can be asked"

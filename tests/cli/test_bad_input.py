"""Bad input: one sentence that names what, where and what to do; exit code 1; nothing written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_fixtures
import pytest
import torch
from command_fixtures import Pair, refused
from pico import pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError, MapOptions
from peft_lorasuite.methods.lorasuite import LoraSuiteOptions
from peft_lorasuite.methods.options import convert, make_options
from peft_lorasuite.methods.registry import find
from peft_lorasuite.methods.transplant import TransplantOptions

pair = command_fixtures.pair
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def changed(source: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    copy = tmp_path / "changed"
    shutil.copytree(source, copy)
    change(copy)
    return copy


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def cut(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def config_of(folder: Path, **values: Any) -> None:
    read = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(read | values))


ADAPTERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"the adapter has no {CONFIG}", "pass the folder or Hub repository"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "the adapter has no weights", f"wanted {WEIGHTS}"),
    "truncated": (lambda f: cut(f, 3000), f"{WEIGHTS}: malformed safetensors file", "fetch it again"),
    "emptied": (lambda f: cut(f, 0), f"{WEIGHTS}: malformed safetensors file", "fetch it again"),
    "not finite": (lambda f: rewrite(f, poison), "values are not finite", "got base_model.model.model.layers.0"),
    "pickle": (to_pickle, "adapter_model.bin: the weights are a pickle file", "with save_pretrained"),
    "broken config": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}: the file cannot be read as JSON", "again"),
    "no adapter": (lambda f: config_of(f, peft_type=None), "the config has no peft_type", "check that it is a PEFT"),
    "revision": (lambda f: config_of(f, revision=5), "adapter_config.json, revision: malformed value", "got 5"),
    "nothing of ours": (
        lambda f: rewrite(f, lambda t: [t.__setitem__(n.replace("layers", "blocks"), t.pop(n)) for n in list(t)]),
        "none of the adapter's tensors belongs to a module of the old backbone",
        "pass the backbone that it was trained on",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_broken_adapter(kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message, advice = ADAPTERS[kind]
    broken = changed(pair.adapter, tmp_path, change)
    call = ["upgrade", broken, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    error = refused(tmp_path, capsys, *call)
    assert message in error
    assert advice in error
    assert str(broken) in error


@pytest.mark.parametrize("kind", [*ADAPTERS, "unknown kind", "no tensor"])
def test_fine_tuning_refuses_the_same_adapters(
    kind: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "unknown kind": (lambda f: config_of(f, peft_type="FOO"), "FOO"),
        "no tensor": (lambda f: rewrite(f, dict.clear), "the adapter has no tensors"),
    }
    change, message = more[kind] if kind in more else ADAPTERS[kind][:2]
    broken = changed(pair.adapter, tmp_path, change)
    error = refused(tmp_path, capsys, "finetune", broken, "--data", pair.data, "-o", tmp_path / "place" / "out")
    assert message in error


def test_fine_tuning_refuses_an_adapter_of_another_backbone(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["finetune", pair.adapter, "--base", pair.new, "--data", pair.data, "-o", tmp_path / "place" / "out"]
    assert "the adapter does not fit the old backbone" in refused(tmp_path, capsys, *call)


def test_an_adapter_that_does_not_fit_the_named_old_backbone(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "place" / "out"
    error = refused(tmp_path, capsys, "upgrade", pair.adapter, "--to", pair.old, "--from", pair.new, "-o", out)
    assert f"{WEIGHTS}, layer 0, " in error
    assert "the adapter does not fit the old backbone" in error
    assert "pass the backbone that it was trained on (--from, source_model=)" in error


def test_an_unknown_model_type_gets_the_nearest_name(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"model_type": "lama"}))

    strange = changed(pair.new, tmp_path, rename)
    error = refused(tmp_path, capsys, "map", pair.old, strange, "-o", tmp_path / "place" / "out")
    assert "no converter for model type 'lama', and transformers cannot build its model" in error
    assert "did you mean 'llama'? check the model_type in config.json, or add a converter with" in error


def test_an_unknown_method_or_option(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    assert "unknown method 'lorasuit'; did you mean 'lorasuite'?" in refused(
        tmp_path, capsys, *call, "--method", "lorasuit"
    )
    assert "unknown option of lorasuite 'gian'; did you mean 'gain'?" in refused(
        tmp_path, capsys, *call, "--method", "lorasuite", "--set", "gian=2"
    )
    assert "gain: an option has the wrong type (got 'big', wanted a number)" in refused(
        tmp_path, capsys, *call, "--method", "lorasuite", "--set", "gain=big"
    )
    with pytest.raises(LoraSuiteError, match="unknown normalize 'fits'; did you mean 'fit'"):
        make_options(find("lorasuite"), {"normalize": "fits"})  # all that the command line asks before it reads
    assert "unknown part 'gat'; did you mean 'gate'?" in refused(
        tmp_path, capsys, *call, "--method", "distill", "--set", "parts=q,gat"
    )


@pytest.mark.parametrize(
    ("method", "name", "value", "taken"),
    [
        ("lorasuite", "gain", "2", 2.0), ("lorasuite", "gain", 2, 2.0), ("lorasuite", "normalize", "none", "none"),
        ("transplant", "edit_facts", "No", False), ("transplant", "edit_facts", True, True),
        ("transplant", "rank", "None", None), ("transplant", "rank", "8", 8), ("transplant", "rank", None, None),
        ("transplant", "teacher_weight", "auto", None), ("transplant", "teacher_weight", ".5", 0.5),
        ("distill", "parts", "q, gate", ("q", "gate")), ("distill", "parts", ["up"], ("up",)),
    ],
)  # fmt: skip
def test_an_option_is_read_as_its_type(method: str, name: str, value: object, taken: object) -> None:
    options = make_options(find(method), {name: value})
    assert getattr(options, name) == taken
    assert type(getattr(options, name)) is type(taken)


@pytest.mark.parametrize(
    ("method", "name", "value", "wanted"),
    [
        ("transplant", "prompts", 3.5, "none or an integer"), ("transplant", "prompts", "3.5", "none or an integer"),
        ("transplant", "prompts", True, "none or an integer"), ("transplant", "ridge", "nan", "a number"),
        ("transplant", "ridge", 10**400, "a number"),
        ("transplant", "rank", "few", "none or an integer"), ("transplant", "edit_facts", "perhaps", "true or false"),
        ("transplant", "edit_facts", 1, "true or false"), ("lorasuite", "normalize", 1, "a string"),
        ("distill", "parts", [1], "comma-separated names"), ("distill", "parts", None, "comma-separated names"),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_refused(method: str, name: str, value: object, wanted: str) -> None:
    with pytest.raises(LoraSuiteError, match=f"{name}: an option has the wrong type .*wanted {wanted}\\)"):
        make_options(find(method), {name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoraSuiteOptions(gain="big"), "gain: .*got 'big', wanted a number"),
        (TransplantOptions(edit_facts=1), "edit_facts: .*got 1, wanted true or false"),
    ],
    ids=["gain", "memory"],
)
def test_an_options_record_with_another_type_is_refused_as_a_mapping_is(options: Any, message: str) -> None:
    method = find("lorasuite" if isinstance(options, LoraSuiteOptions) else "transplant")
    with pytest.raises(LoraSuiteError, match=message):
        make_options(method, options)
    assert make_options(method, type(options)()) == type(options)()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_map", "polars", "unknown hidden map 'polars'; did you mean 'polar'?"),
        ("similarity", "ckka", "unknown similarity 'ckka'; did you mean 'cka'? known: cca, cka, procrustes, pwcca"),
        ("layer_map", "fist", "unknown layer map 'fist'; did you mean 'first'? known: cka, first"),
        ("head_map", "hungarain", "unknown head map 'hungarain'; did you mean 'hungarian'? known: hungarian, index"),
        ("seed", 2**32, "seed: must be at most 4294967295"),
        ("block", 3, "block: an option is out of range (got 3, wanted at least 4)"),
        ("tokens", "many", "tokens: an option is out of range (got many, wanted at least 4)"),
    ],
)
def test_a_wrong_option_of_a_map_is_refused_at_once(name: str, value: Any, message: str) -> None:
    with pytest.raises(LoraSuiteError, match=re.escape(message)):
        MapOptions(**{name: value})


def test_a_type_of_a_methods_own_is_passed_on_but_not_made_of_text() -> None:
    assert convert("layers", [1, 2], list[int]) == [1, 2]
    assert convert("layers", [1, 2], list[int] | None) == [1, 2]
    assert convert("layers", "none", list[int] | None) is None
    with pytest.raises(LoraSuiteError, match="layers: an option has the wrong type"):
        convert("layers", "1, 2", list[int])


def test_backbones_that_share_no_token(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{n}w": n for n in range(100)}, unk_token="w0w"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alien = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0w", eos_token="w1w", pad_token="w1w")
    strange = save_backbone(tmp_path / "alien", pico_model("llama"), alien)
    error = refused(tmp_path, capsys, "map", pair.old, strange, "-o", tmp_path / "place" / "out")
    assert "the tokenizers share no token" in error
    assert "retrain the adapter" in error


def test_a_map_for_other_backbones(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", pair.adapter, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    error = refused(tmp_path, capsys, *call, "--to", pair.old)
    assert "the upgrade map was built for another new backbone" in error
    assert "got layers 3, wanted 4 in new" in error
    assert "build a map for this pair" in error
    other = save_backbone(tmp_path / "other", pico_model("llama", 7), pico_tokenizer(command_fixtures.WORDS))
    error = refused(tmp_path, capsys, *call, "--to", pair.new, "--from", other)
    assert "the upgrade map was built for another old backbone" in error
    assert "the values of the embedding differ" in error


def test_a_map_that_is_none_or_broken(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upgrade", pair.adapter, "--to", pair.new, "-o", tmp_path / "place" / "out"]
    error = refused(tmp_path, capsys, *call, "--map", pair.adapter)
    assert "the upgrade map has no map.json" in error
    part = changed(pair.map, tmp_path, lambda f: (f / "core.safetensors").write_bytes(b"\x08" + bytes(15)))
    assert "core.safetensors: malformed safetensors file" in refused(tmp_path, capsys, *call, "--map", part)


@pytest.mark.parametrize("command", ["map", "upgrade", "finetune", "demo"])
def test_an_output_folder_that_is_not_empty(
    command: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep")
    calls = {
        "map": [pair.old, pair.new],
        "upgrade": [pair.adapter, "--to", "no/such-model"],  # refused before anything is read
        "finetune": [pair.adapter, "--data", pair.data],
        "demo": [],
    }
    error = refused(tmp_path, capsys, command, *calls[command], "-o", out)
    assert f"{out}: the output folder is not empty; choose another one, or pass overwrite=True (--overwrite)" in error
    assert (out / "mine.txt").read_text() == "keep"


def test_an_output_that_is_a_file(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "out").write_text("keep")
    error = refused(tmp_path, capsys, "map", pair.old, pair.new, "-o", tmp_path / "place" / "out", "--overwrite")
    assert "the output is a file (wanted a folder)" in error


def test_samples_that_are_none(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text('[{"instruction": "Add."}]')
    call = ["upgrade", pair.adapter, "--to", pair.new, "--map", pair.map, "-o", tmp_path / "place" / "out"]
    error = refused(tmp_path, capsys, *call, "--finetune", tmp_path / "data.json")
    assert "data.json, record 1: a record has no output" in error


@pytest.mark.parametrize(
    "text", ['{"version": "1.0", "added_', '{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}']
)
def test_a_tokenizer_file_that_is_broken(
    text: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut short, or whole JSON of something else: the tokenizers library raises a bare exception for the latter."""
    old = changed(pair.old, tmp_path, lambda f: (f / "tokenizer.json").write_text(text))
    call = ["upgrade", pair.adapter, "--from", old, "--to", pair.new, "--map", pair.map]
    error = refused(tmp_path, capsys, *call, "-o", tmp_path / "place" / "out")
    assert "the tokenizer cannot be loaded" in error
    assert "fetch its tokenizer files again" in error

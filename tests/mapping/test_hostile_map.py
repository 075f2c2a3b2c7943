"""A map may come from an untrusted source: all names, shapes and values are checked before use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import hub_pair
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_lorasuite import LoraSuiteError, UpgradeMap, upgrade

pair, made = hub_pair.pair, hub_pair.made


def spoil(folder: Path, change: Any) -> Path:
    """Change the tensors and the description of a map, as an untrusted source could."""
    tensors, meta = load_file(folder / "core.safetensors"), json.loads((folder / "map.json").read_text())
    change(tensors, meta)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "core.safetensors")
    (folder / "map.json").write_text(json.dumps(meta))
    return folder


def put(name: str, value: Any) -> Any:
    """Return a change of one tensor; None removes it."""

    def change(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name))

    return change


def say(*path: Any, value: Any) -> Any:
    """Return a change of one value of the description."""

    def change(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        for step in path[:-1]:
            meta = meta[step]
        meta[path[-1]] = value

    return change


HOSTILE = {
    "not finite": (put("hidden", lambda t: t * float("nan")), "not finite"),
    "infinite": (put("layers.0.q.T", lambda t: t / 0.0), "not finite"),
    "wrong shape": (put("hidden", lambda t: t.T), "wrong shape: hidden"),
    "gain of another size": (put("layers.0.q.old_gain", lambda t: t[:-1]), "wrong shape: layers.0.q.old_gain"),
    "norms of another size": (put("layers.0.q.norms", lambda t: t[:, :1]), "wrong shape: layers.0.q.norms"),
    "integers": (put("hidden", lambda t: t.long()), "wrong shape: hidden"),
    "head out of range": (put("layers.0.heads", lambda t: t + 100), "out of range: layers.0.heads"),
    "negative unit": (put("layers.0.units", lambda t: t - 1), "out of range: layers.0.units"),
    "heads as reals": (put("layers.0.heads", lambda t: t.float()), "out of range"),
    "missing tensor": (put("layers.0.q.T", None), "malformed upgrade map"),
    "unexpected tensor": (put("layers.0.extra", lambda _: torch.ones(3)), "unexpected tensors"),
    "layer out of range": (say("layers", value=[[0, 99]]), "out of range: layers"),
    "layers that cross": (say("layers", value=[[2, 0], [0, 3]]), "malformed layer map"),
    "layers as words": (say("layers", value="all"), "map"),
    "no layers": (say("layers", value=[]), "the map has matched layers exactly if both backbones have converters"),
    "another format": (say("format", value=99), "unsupported format"),
    "a path as a name": (say("new", "name", value="/etc/passwd"), "must not be a path"),
    "a path upwards": (say("new", "name", value="../x"), "must not be a path"),
    "a list as a name": (say("new", "name", value=[1]), "map"),
    "unknown option": (say("options", "run", value="code"), "options.run: unknown field"),
    "unknown field": (say("new", "arch", "code", value=1), "new.arch.code: unknown field"),
    "negative size": (
        say("new", "arch", "hidden", value=-1),
        "hidden: malformed value (got -1, wanted an",
    ),
    "a pair of a number and a string": (say("layers", 0, value=[0, "0"]), "layers[0][1]: malformed value (got '0'"),
    "a pair of reals": (say("layers", 0, value=[0.0, 0]), "layers[0][0]: malformed value (got 0.0"),
    "a layer of 2^63": (say("layers", 0, value=[0, 2**63]), "layers[0][1]: malformed value (got 9223372036854775808"),
    "a size of 2^63": (say("new", "arch", "hidden", value=2**63), "new.arch.hidden: malformed value"),
    "a flag as a size": (say("new", "arch", "hidden", value=True), "new.arch.hidden: malformed value (got True"),
    "tokens of 2^63": (say("options", "tokens", value=2**63), "options.tokens: malformed value"),
    "deep nesting": (say("facts", "deep", value=json.loads("[" * 500 + "]" * 500)), "map.json: too deeply nested"),
    "a scale as a string": (say("new", "arch", "residual_scale", value="1.0"), "residual_scale: malformed value"),
    "a scale of zero": (say("new", "arch", "residual_scale", value=0), "wanted a number above 0"),
    "a scale that is not finite": (
        say("new", "arch", "residual_scale", value=float("nan")),
        "got nan, wanted",
    ),
    "no rotary base": (say("new", "arch", "rope_thetas", value=[]), "rope_thetas: malformed value (got [], wanted a"),
    "facts about tokens": (say("facts", "shared_tokens", value="many"), "facts.shared_tokens: malformed value"),
    "facts about the hidden map": (say("facts", "hidden", value=[1]), "facts.hidden: malformed value (got [1]"),
    "seconds as a string": (say("facts", "seconds", value={"weights": "1"}), "facts.seconds.weights: malformed value"),
    "a number as the head": (say("new", "arch", "head", value=1e30), "new.arch.head: malformed value (got 1e+30"),
    "a broken pair of paths": (say("new", "arch", "disk", value=[["(", 1]]), "disk[0][1]: malformed value (got 1"),
    "half a pair of paths": (say("new", "arch", "disk", value=[["("]]), "disk[0]: malformed value (got ['('], wanted"),
    "a site without parts": (say("new", "arch", "sites", 0, value={"path": "x"}), "sites[0].parts: missing value"),
    "an escape sequence": (say("new", "name", value="a\x1b[2Jb"), "new.name: control characters"),
    "a line break": (say("old", "revision", value="a\nb"), "old.revision: control characters (got 'a\\nb'"),
    "sections as a list": (say("sections", value=[]), "sections: malformed value (got [], wanted an object)"),
    "fp8": (put("hidden", lambda t: t.to(torch.float8_e4m3fn)), "tensors of dtype F8_E4M3 are not read"),
    "facts as a list": (say("facts", value=[1]), "facts: malformed value (got [1], wanted an object)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_untrusted_map_is_checked(name: str, made: Path, tmp_path: Path) -> None:
    change, wanted = HOSTILE[name]
    for path in (made / "map").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert UpgradeMap.load(tmp_path).pairs == UpgradeMap.load(made / "map").pairs
    with pytest.raises(LoraSuiteError, match=re.escape(wanted)):
        UpgradeMap.load(spoil(tmp_path, change))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\x00", '{"format": 1}', ""])
def test_a_malformed_description_is_refused(text: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    (tmp_path / "core.safetensors").write_bytes((made / "map" / "core.safetensors").read_bytes())
    with pytest.raises(LoraSuiteError):
        UpgradeMap.load(tmp_path)


def test_values_of_a_map_that_overflow_are_refused(made: Path, tmp_path: Path) -> None:
    for path in (made / "map").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, put("layers.0.q.T", lambda t: t * 1e35))
    with pytest.raises(LoraSuiteError, match=r"layers.0.self_attn.q_proj: the result's values are out of range"):
        upgrade(made / "lora", tmp_path, method="lorasuite")

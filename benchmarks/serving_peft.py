"""Every minor version of PEFT since 0.10, beside a transformers of its time, on adapters that this library writes.

Three folders of each adapter are loaded: as the installed PEFT saves it, as `upgrade` writes it for another backbone,
and as `export` writes it. What an older PEFT computes with it is compared with the installed PEFT.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from common import RESULTS, hide_loading_bars, machine, write_json
from pico import pico_model, pico_tokenizer, save_backbone
from served import KINDS, adapter, distance, logits

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, export, upgrade

LOADER = Path(__file__).parent / "peft_loader.py"
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.10.0": ("transformers==4.39.3", "tokenizers==0.15.2", "huggingface-hub==0.25.2"),
    "0.11.1": ("transformers==4.41.2", "tokenizers==0.19.1", "huggingface-hub==0.25.2"),
    "0.12.0": ("transformers==4.43.4", "tokenizers==0.19.1", "huggingface-hub==0.25.2"),
    "0.13.2": ("transformers==4.45.2", "tokenizers==0.20.3", "huggingface-hub==0.25.2"),
    "0.14.0": ("transformers==4.47.1", "tokenizers==0.21.4", "huggingface-hub==0.27.1"),
    "0.15.2": ("transformers==4.51.3", "tokenizers==0.21.4", "huggingface-hub==0.34.6"),
    "0.16.0": ("transformers==4.53.3", "tokenizers==0.21.4", "huggingface-hub==0.34.6"),
    "0.17.1": ("transformers==4.56.2", "tokenizers==0.22.1", "huggingface-hub==0.35.3"),
    "0.18.1": ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0"),
    "0.19.1": (),
    "0.20.0": (),
    "0.21.2": (),
}
"""Version of PEFT -> what is put beside it; where nothing is, the installed transformers."""
FORMS = ("as PEFT saves it", "as upgrade writes it", "exported")
SAME = 1e-4
"""Largest difference of the logits, relative to what the adapter changes, that counts as equal."""
ENGINE = "vllm"
"""Program that is exported for; all of them get the same plain LoRA, and this one allows most of it."""


def environment(version: str, folder: Path) -> Path:
    """Install a PEFT and what belongs to it into a folder of its own, without torch; return the folder."""
    target = folder / f"peft-{version}"
    if not target.exists():
        names = [f"peft=={version}", *VERSIONS[version]]
        call = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *names]
        subprocess.run(call, check=True)
    return target


def write(work: Path, kind: str) -> dict[str, tuple[Path, Path] | str]:
    """Return the backbone and the folder of each form of an adapter, or why there is none."""
    base, new = (_backbone(work / name, seed) for name, seed in (("old", 0), ("new", 5)))
    folders = {form: work / form.replace(" ", "-") / kind.replace(" ", "-") for form in FORMS}
    saved, written, exported = folders.values()
    found: dict[str, tuple[Path, Path] | str] = {FORMS[0]: (base, saved)}
    if not saved.exists():
        adapter(saved, base, kind)
    try:
        if not written.exists():
            upgrade_map = UpgradeMap.build(base, new, MapOptions(layer_map="proportional"))
            upgrade(saved, upgrade_map, method="copy", old=base, new=new).save(written)
        found[FORMS[1]] = (new, written)
    except LoraSuiteError as error:
        found[FORMS[1]] = f"refused: {error.what}"
    try:
        export(saved, exported, engine=ENGINE, overwrite=True)
        found[FORMS[2]] = (base, exported)
    except LoraSuiteError as error:
        found[FORMS[2]] = f"refused: {error.what}"
    return found


def _backbone(folder: Path, seed: int) -> Path:
    if not folder.exists():
        save_backbone(folder, pico_model("llama", seed), pico_tokenizer([f"w{n}" for n in range(20)]))
    return folder


def load(packages: Path, base: Path, folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Return what a PEFT makes of adapters of one backbone."""
    call = [sys.executable, str(LOADER), str(packages), str(out), str(base), *map(str, folders)]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{packages.name}: {result.stderr[-2000:]}")
    return torch.load(out, weights_only=True)


def rows(version: str, packages: Path, work: Path, kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each adapter how far its logits are from those of the installed PEFT, or the error."""
    found: dict[str, dict[str, Any]] = {kind: {"adapter": kind} for kind in kinds}
    places = [(kind, form, place) for kind, forms in kinds.items() for form, place in forms.items()]
    for kind, form, place in places:
        if isinstance(place, str):
            found[kind][form] = place
    for base in sorted({place[0] for *_, place in places if not isinstance(place, str)}):
        chosen = [(kind, form, place[1]) for kind, form, place in places if place[0] == base]
        loaded, bare = load(packages, base, [folder for *_, folder in chosen], work / "loaded"), logits(base)
        if (loaded["bare"] - bare).abs().max() > 1e-4:
            raise SystemExit(f"PEFT {version}: its transformers computes something else with the bare backbone")
        for (kind, form, folder), result in zip(chosen, loaded["adapters"], strict=True):
            error = isinstance(result, str)
            found[kind][form] = result if error else round(distance(logits(base, folder), result, bare), 6)
        for row in found.values():
            row |= loaded["versions"]
    return [{name: row[name] for name in ("peft", "transformers", "adapter", *FORMS)} for row in found.values()]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return for each adapter and form the versions that compute the same with it."""
    versions = list(dict.fromkeys(row["peft"] for row in found))
    lines = [f"| adapter | {' | '.join(FORMS)} |", f"|---|{'---|' * len(FORMS)}"]
    for kind in dict.fromkeys(row["adapter"] for row in found):
        own = [row for row in found if row["adapter"] == kind]
        lines.append(f"| {kind} | {' | '.join(_loading(own, form, versions) for form in FORMS)} |")
    return "\n".join(lines)


def _loading(own: Sequence[dict[str, Any]], form: str, versions: Sequence[str]) -> str:
    """Return which versions load one form of an adapter."""
    if str(own[0][form]).startswith("refused"):
        return "refused"
    loads = [row["peft"] for row in own if not isinstance(row[form], str) and row[form] < SAME]
    if loads == list(versions):
        return f"all, since {loads[0]}"
    since = loads and loads == list(versions[-len(loads) :])
    return f"since {loads[0]}" if since else ", ".join(loads) or "none"


def main() -> None:
    """Run the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages, kept between runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for backbones and adapters")
    parser.add_argument("--versions", default=",".join(VERSIONS), help="default: all")
    parser.add_argument("--adapters", default=",".join(KINDS), help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving" / "peft.json", help="the table lies beside it")
    args = parser.parse_args()
    hide_loading_bars()
    kinds = {kind: write(args.work, kind) for kind in args.adapters.split(",")}
    found = []
    for version in args.versions.split(","):
        found += rows(version, environment(version, args.packages), args.work, kinds)
        print(*found[-len(kinds) :], sep="\n", flush=True)
    write_json(args.out, {"machine": machine(), "rows": found})
    args.out.with_suffix(".md").write_text(table(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The picture of the README: one question, and the answers of three models, as ``peft-lorasuite chat`` writes them.

peft-lorasuite chat --json --base NEW --adapter UPGRADED --old ADAPTER --old-base OLD --prompt "..." > turn.json
python benchmarks/picture.py turn.json --models Qwen2.5-Coder-0.5B Qwen2.5-Coder-1.5B -o FILE.svg
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#eef2f7", "#fdeeee", "#eaf6ee")
WIDTH = 40
"""Characters of a line in a box."""


def box(axes: Axes, left: float, title: str, text: str, color: str) -> None:
    """Draw a model's name and its answer."""
    axes.add_patch(FancyBboxPatch((left, 0.15), 0.3, 0.5, boxstyle="round,pad=0.01", facecolor=color, edgecolor="#888"))
    axes.text(left + 0.01, 0.62, title, va="top", fontsize=9, fontweight="bold", color="#222")
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, WIDTH) or [""]]
    shown = lines[:4] + ["..."] * (len(lines) > 4)
    axes.text(left + 0.01, 0.46, "\n".join(shown), va="top", fontsize=8, family="monospace", color="#222")


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="output of peft-lorasuite chat --json")
    parser.add_argument("--models", required=True, nargs=2, metavar=("OLD", "NEW"), help="names of the models")
    parser.add_argument("-o", "--output", required=True, type=Path, help="SVG file")
    args = parser.parse_args()
    old, new = args.models
    titles = {
        "old + adapter": f"{old}\nwith its adapter",
        "base": f"{new}\n",
        "upgraded": f"{new}\nwith the upgraded adapter",
    }
    turn = json.loads(args.answers.read_text(encoding="utf-8"))["turns"][0]
    question = turn["prompt"].partition("\n\nAnswer format")[0]
    figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    axes.text(0.01, 0.97, "\n".join(textwrap.wrap(question, 125)), va="top", fontsize=9, color="#222")
    for place, (name, title) in enumerate(titles.items()):
        box(axes, 0.015 + 0.335 * place, title, turn["answers"][name].strip(), COLORS[place])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.patch.set_facecolor("white")
    with plt.rc_context({"svg.hashsalt": "picture"}):  # the same file every time
        figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""The operation of a word problem as a classification task, with four classes.

The problems are those of the LLM-Adapters collection whose solution has one kind of operation; the unlabeled texts are
further problems, with any operations.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

FILES = ("math_data", "AddSub_test", "MultiArith_test", "SVAMP_test", "SingleEq_test")
OPERATION = re.compile(r"(?<=\d)[.,%]?\s*([+\-*/x])\s*(?=\d)")
LABELS = {"+": "sum", "-": "difference", "*": "product", "x": "product", "/": "quotient"}


def operation(solution: str) -> str | None:
    """Return the only kind of operation in a solution, None where there are several or none."""
    found = {LABELS[sign] for sign in OPERATION.findall(solution.replace("$", ""))}
    return found.pop() if len(found) == 1 else None


def make(
    data: Path, *, train: int, unlabeled: int, test: int, dev: bool
) -> tuple[list[dict[str, str]], list[str], list[dict[str, str]]]:
    """Return labeled texts, unlabeled texts and test texts, which are different ones.

    Args:
        data: Folder of the files.
        train: Number of labeled texts.
        unlabeled: Number of unlabeled texts.
        test: Number of test texts.
        dev: Whether to return other texts, to choose settings by, instead of the test texts.
    """
    problems: dict[str, dict[str, str | None]] = {}
    for name in FILES:
        for one in json.loads((data / f"{name}.json").read_text(encoding="utf-8")):
            text = " ".join(one["instruction"].split())
            problems.setdefault(text.casefold(), {"text": text, "label": operation(one["output"])})
    drawn = list(problems.values())
    random.Random(0).shuffle(drawn)
    labeled = [{"text": str(one["text"]), "label": one["label"]} for one in drawn if one["label"]]
    tested, known = labeled[:test], labeled[test:]
    known, kept = (known[:-test], known[-test:]) if dev else (known, tested)
    seen = {one["text"] for one in (*tested, *known[:train], *kept)}
    others = [str(one["text"]) for one in drawn if one["text"] not in seen]
    return known[:train], others[:unlabeled], kept

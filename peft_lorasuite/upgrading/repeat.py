"""The command that makes a result again, from its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..methods.registry import find, names


def repeat_command(report: Mapping[str, Any]) -> str:
    """Return the command, with the options that differ from their defaults.

    Prompts that were given are not in a report: ``PROMPTS`` stands for them.

    Args:
        report: Values of ``lorasuite_report.json``.
    """
    method, commits = report["method"], report.get("revisions") or {}
    name, options = str(method["name"]), dict(method.get("options") or {})
    facts = report.get("facts") or {}

    def side(role: str) -> str:
        return f"{report[role]}@{commits[role]}" if commits.get(role) else str(report[role])

    words = ["peft-lorasuite", "upgrade", side("adapter"), "--from", side("old"), "--to", side("new"), "--method", name]
    if name in names():
        found = find(name)
        defaults = asdict(found.options())
        options = {key: value for key, value in options.items() if _plain(defaults.get(key)) != _plain(value)}
        words += ["--prompts", "PROMPTS"] if found.needs_backbones else []
    for key, value in options.items():
        words += ["--set", f"{key}={_plain(value)}"]
    words += ["--seed", str(facts["seed"])] if facts.get("seed") else []
    return shlex.join([*words, "--rank", str(report["rank"]), "-o", "NEW-LORA"])


def _plain(value: Any) -> str:
    """Return a value as ``--set`` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

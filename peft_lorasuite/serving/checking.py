"""`check`: what a program will refuse or drop of an adapter, by its files, before it is deployed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.peft_format import CONFIG, WEIGHTS, select_adapter
from ..adapters.reading import base_model_of, read_config
from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import no_safetensors_error, open_safetensors
from ..io.source import Source
from ..models.backbone import Backbone
from . import mlx
from .engines import DROPPED, ENGINES, FEATURES, REFUSED, UNPROVEN, Engine, find_engine
from .features import Contents, features

SHOWN = 3
"""Names of a finding that are shown."""


@dataclass(frozen=True)
class Finding:
    """A part of an adapter that a program does not simply load.

    Attributes:
        effect: ``refused``, ``dropped`` or ``unproven``.
        feature: Key of `engines.FEATURES`.
        names: Tensors, modules or config entries.
    """

    effect: str
    feature: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.names) - SHOWN} more" if len(self.names) > SHOWN else ""
        return f"{self.effect}: {FEATURES[self.feature]}: {', '.join(self.names[:SHOWN])}{more}"


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        adapter: Folder or Hub id.
        engine: Name of the program (``--for``).
        version: Version that its rules hold for.
        findings: What is not simply loaded.
        facts: Rank, number of modules, empty ranks, and what a conversion has changed.
        start: Command that loads the adapter.
    """

    adapter: str
    engine: str
    version: str
    findings: tuple[Finding, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    start: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is refused or dropped."""
        return all(finding.effect == UNPROVEN for finding in self.findings)

    def raise_findings(self, name: str) -> None:
        """Raise `LoraSuiteError` for the first part of the adapter, of this name, that is refused or dropped."""
        first = next((finding for finding in self.findings if finding.effect != UNPROVEN), None)
        if first is None:
            return
        rules = ENGINES[self.engine]
        advice = rules.note if first.feature == "family" else "choose another engine, or train the adapter without it"
        raise LoraSuiteError(
            f"{rules.title} ({self.version}) does not load the adapter whole, {first}", where=name, do=advice
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings], "passed": self.passed}

    def __str__(self) -> str:
        title = ENGINES[self.engine].title
        verdict = "loads it whole" if self.passed else "does not load it whole"
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.facts.items())
        lines = [f"{title} ({self.version}) {verdict}: {self.adapter}, {facts}", *map(str, self.findings), self.start]
        return "\n  ".join(line for line in lines if line)


def check(
    adapter: str | Path, *, engine: str, base: Any = None, adapter_name: str | None = None,
    revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None,
) -> Checked:  # fmt: skip
    """Check by its files what a program will refuse or drop of an adapter.

    Args:
        adapter: Folder or Hub id of the adapter.
        engine: The program: a key of `engines.ENGINES`.
        base: Its backbone: folder, Hub id or loaded model, of which the config is read; by default the base model of
            the adapter's config.
        adapter_name: Name of the adapter, if the folder has several in subfolders.
        revision: Revision of the adapter on the Hub.
        token: Hub token.
        cache_dir: Hub cache.

    Raises:
        LoraSuiteError: If a file is missing or malformed, or the program is unknown.
    """
    rules = find_engine(engine)
    source = select_adapter(Source(str(adapter), "adapter", revision, token, cache_dir), adapter_name)
    if mlx.is_layout(source):
        found = {"other layout": [mlx.WEIGHTS]} if rules.layout != "mlx" else {}
        contents, arch = mlx.read_contents(source), None
    else:
        contents = read_contents(source)
        arch = _architecture(source, base, contents, rules)
        found = features(contents, rules, arch)
        if rules.layout == "mlx":
            found = {"other layout": [WEIGHTS, CONFIG]} | found
    return judge(source.name, engine, found, contents, base if base is not None else contents.config.get(
        "base_model_name_or_path"))  # fmt: skip


def read_contents(source: Source) -> Contents:
    """Read the config of an adapter, and the names and shapes of its tensors."""
    config, path = read_config(source), source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    file = open_safetensors(path, where=source.full_name(WEIGHTS))
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Contents(config, shapes)


def _architecture(source: Source, base: Any, contents: Contents, rules: Engine) -> Architecture | None:
    """Return the architecture of the backbone; None if it cannot be opened and no rule depends on it."""
    try:
        return open_base(source, base).arch
    except LoraSuiteError:
        tables = {"head", "embedding"} & set(features(contents, rules, None))
        if base is None and not (tables or rules.every_layer or rules.families):
            return None
        raise


def open_base(source: Source, base: Any) -> Backbone:
    """Open the backbone of an adapter: the given one, or the base model of its config."""
    if base is not None:
        return Backbone.open(base)
    name, revision = base_model_of(source, do="pass the backbone (--base, base=)")
    return Backbone.open(name, revision=revision, hub_only=source.folder is None)


def judge(name: str, engine: str, found: dict[str, list[str]], contents: Contents, base: Any) -> Checked:
    """Return the findings for the features of an adapter.

    Args:
        name: Folder or Hub id of the adapter.
        engine: Name of the program.
        found: From `features.features`.
        contents: The adapter's files.
        base: Name of its backbone, for the command.
    """
    rules, order = find_engine(engine), (REFUSED, DROPPED, UNPROVEN)
    findings = [Finding(rules.effects[feature], feature, tuple(names))
                for feature, names in found.items() if feature in rules.effects]  # fmt: skip
    findings.sort(key=lambda finding: order.index(finding.effect))
    ranks = list(contents.pairs.values())
    facts: dict[str, Any] = {"rank": max(ranks, default=0), "modules": len(ranks)}
    allowed = [rank for rank in rules.ranks if rank >= facts["rank"]]
    values = {"base": base, "path": name, "name": Path(name).name, "max_rank": min(allowed, default=facts["rank"])}
    local = Path(str(base)).is_dir()
    values["base_option"] = f"--base {base}" if local else f"--base-model-id {base}"
    start = rules.start.format(**values) if all(one.effect == UNPROVEN for one in findings) else ""
    return Checked(name, engine, rules.version, tuple(findings), facts, start)

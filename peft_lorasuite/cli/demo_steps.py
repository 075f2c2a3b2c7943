"""The demo: an adapter of a small old backbone is upgraded to a new one and fine-tuned, and every step is scored."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..adapters.writing import write_peft_model
from ..errors import LoraSuiteError
from ..io.output import atomic_folder
from ..mapping.upgrade_map import UpgradeMap
from ..model import attach
from ..models.backbone import Backbone
from ..progress import Progress, no_progress
from ..reporting.map_figures import layer_map_figure
from ..text.examples import format_example, read_examples
from ..training.finetune import finetune
from ..training.scoring import Score, score
from ..upgrading.upgrade import Upgraded, upgrade

PICTURE, FIGURES, TABLE = "layer_map.png", "demo.json", "table.md"
PROMPTS = 600
"""Unlabeled prompts of the methods that read the adapter's behavior."""
READ = {"prompts": PROMPTS, "length": 8}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "upgraded by weights (lorasuite), nothing read": ("lorasuite", {}),
    f"upgraded by behavior (transplant), {PROMPTS} prompts without labels": ("transplant", {**READ, "rank": 64}),
    f"upgraded and distilled, {PROMPTS} prompts without labels": (
        "distill",
        {**READ, "epochs": 5, "learning_rate": 3e-3},
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: What was scored.
        accuracy: Share of test items answered right, from 0 to 1.
        nll: Negative log-likelihood per response token, in nats.
        seconds: Time that it took to make, without scoring; None where nothing was made or it was made elsewhere.
    """

    label: str
    accuracy: float
    nll: float
    seconds: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        rows: The table.
        seconds: Step -> seconds.
        peak_megabytes: Largest memory of the process.
        test_items: Items that were scored.
    """

    rows: tuple[Row, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_megabytes: int = 0
    test_items: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """Return the table in Markdown."""
        lines = ["| new backbone | accuracy | NLL per token | time |", "|---|---:|---:|---:|"]
        for row in self.rows:
            took = "-" if row.seconds is None else f"{row.seconds:.1f} s"
            lines.append(f"| {row.label} | {row.accuracy:.1%} | {row.nll:.3f} | {took} |")
        steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        foot = f"{self.test_items} test items, greedy answers. {steps}. Peak memory {self.peak_megabytes} MB."
        return "\n".join([*lines, "", foot])


def run_demo(
    output: str | Path, *, samples: int = 100, seed: int = 0, overwrite: bool = False, progress: Progress = no_progress
) -> DemoResult:
    """Run the demo and write adapters, table, figures and the picture of the layer map into a folder.

    Raises:
        LoraSuiteError: When the package lacks the pair, matplotlib is missing, or the folder is not free.
    """
    with (
        resources.as_file(resources.files("peft_lorasuite") / "data" / "demo") as data,
        atomic_folder(output, overwrite=overwrite) as part,
    ):
        if not (data / "task.json").is_file():
            raise LoraSuiteError("this installation lacks the demo pair", where=data.name, do="install it again")
        result = _Demo(data, part, samples, seed, progress).run()
        (part / TABLE).write_text(result.table() + "\n", encoding="utf-8")
        (part / FIGURES).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


class _Demo:
    def __init__(self, data: Path, output: Path, samples: int, seed: int, progress: Progress) -> None:
        self.data, self.output, self.progress = data, output, progress
        self.samples, self.seed = samples, seed
        self.template = str(_read(data / "task.json")["template"])
        self.reference = _read(data / "reference.json")
        self.train, self.test = (read_examples(data / f"{name}.json") for name in ("train", "test"))
        self.seconds: dict[str, float] = {}
        self.new = Backbone.open(data / "new")

    def run(self) -> DemoResult:
        upgrade_map = self._timed("map", self._map)
        layer_map_figure(upgrade_map).savefig(self.output / PICTURE)
        weights, behavior, distilled = (
            self._timed(label, lambda method=method: self._upgrade(upgrade_map, *method))
            for label, method in METHODS.items()
        )
        distilled.save(self.output / "upgraded")
        rows = (
            self._row("nothing added", self._load()),
            self._vanilla(),
            *(
                self._row(label, attach(self._load(), upgraded), label)
                for label, upgraded in zip(METHODS, (weights, behavior, distilled), strict=True)
            ),
            self._tuned(behavior),
            self._retrained(),
        )
        return DemoResult(rows, self.seconds, _peak_megabytes(), len(self.test))

    def _map(self) -> UpgradeMap:
        """Build the map on the pair's own texts: plain English is mostly unknown words to models this small."""
        text = self.data / "calibration.txt"
        return UpgradeMap.build(self.data / "old", self.new, calibration=text, progress=self.progress)

    def _upgrade(self, upgrade_map: UpgradeMap, method: str, options: Mapping[str, Any]) -> Upgraded:
        """Upgrade by one method; the prompts are training items without their answers."""
        return upgrade(
            self.data / "adapter", upgrade_map, method=method, options=options, old=self.data / "old", new=self.new,
            prompts=[format_example(item, self.template) for item in self.train[:PROMPTS]], seed=self.seed,
            progress=self.progress,
        )  # fmt: skip

    def _vanilla(self) -> Row:
        """Train a fresh LoRA on the same samples, with the learning rate that served it best when the pair was made."""
        import peft
        import torch

        best = self._best_vanilla
        config = peft.LoraConfig(
            r=best["rank"], lora_alpha=2 * best["rank"], target_modules=self._sites, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            fresh = peft.get_peft_model(self._load(), config)
        name = f"vanilla LoRA, {self.samples} samples"
        trained = self._timed(name, lambda: self._fit(fresh, learning_rate=best["lr"], warmup=best["warmup"]))
        return self._row(name, trained, name)

    def _tuned(self, upgraded: Upgraded) -> Row:
        model = attach(self._load(), upgraded, is_trainable=True)
        name = f"upgraded by behavior, then {self.samples} samples"
        rate = self._best_vanilla["lr"]  # the same for both: neither side is handicapped
        trained = self._timed(name, lambda: self._fit(model, learning_rate=rate, modules=self._sites))
        folder = self.output / "upgraded-finetuned"
        folder.mkdir()
        write_peft_model(trained, folder)
        return self._row(name, trained, name)

    def _retrained(self) -> Row:
        """Return the row that was measured when the pair was made: it takes all training items."""
        known = self.reference["new_retrained"]
        label = f"full retraining, {known['samples']} samples (precomputed)"
        return Row(label, known["accuracy"], known["nll"], round(60 * known["minutes"], 1))

    @property
    def _best_vanilla(self) -> dict[str, Any]:
        return min(self.reference["new_vanilla_100"], key=lambda row: row["nll"])

    @property
    def _sites(self) -> list[str]:
        return [site.path.rpartition(".")[2] for site in self.new.arch.sites]

    def _fit(self, model: Any, learning_rate: float = 1e-3, warmup: float = 0.0, modules: Sequence[str] = ()) -> Any:
        return finetune(
            model, self.train, samples=self.samples, template=self.template, seed=self.seed, modules=modules,
            tokenizer=self.new.tokenizer, learning_rate=learning_rate, warmup=warmup, progress=self.progress,
        )  # fmt: skip

    def _load(self) -> Any:
        return Backbone.open(self.data / "new").load(dtype="float32")

    def _row(self, label: str, model: Any, step: str | None = None) -> Row:
        found: Score = score(model.eval(), self.new.tokenizer, self.test, self.template, progress=self.progress)
        return Row(label, round(found.accuracy, 4), round(found.nll, 4), self.seconds.get(step) if step else None)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return done


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _peak_megabytes() -> int:
    if sys.platform == "win32":  # it does not say
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))

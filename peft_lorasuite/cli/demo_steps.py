"""The steps of ``demo``: upgrade an adapter of a small backbone to another one, fine-tune it, and score every step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..adapters.writing import write_peft_model
from ..errors import LoraSuiteError
from ..io.output import atomic_folder
from ..mapping.upgrade_map import UpgradeMap
from ..model import attach
from ..models.backbone import Backbone
from ..progress import Progress, no_progress, stage
from ..reporting.map_figures import layer_map_figure
from ..text.examples import format_example, read_examples
from ..training.finetune import finetune
from ..training.scoring import Score, score
from ..upgrading.upgrade import Upgraded, upgrade

PICTURE, FIGURES, TABLE = "layer_map.png", "demo.json", "table.md"
PROMPTS = 600
"""Number of unlabeled prompts of the methods that transfer behavior."""
BEHAVIOR_OPTIONS = {"prompts": PROMPTS, "length": 8}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "upgraded by weights (lorasuite), no prompts": ("lorasuite", {}),
    f"upgraded by behavior (transplant), {PROMPTS} prompts without labels": (
        "transplant",
        {**BEHAVIOR_OPTIONS, "rank": 64},
    ),
    f"upgraded and distilled, {PROMPTS} prompts without labels": (
        "distill",
        {**BEHAVIOR_OPTIONS, "epochs": 5, "learning_rate": 3e-3},
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: What was scored.
        accuracy: Share of test items answered correctly, from 0 to 1.
        nll: Negative log-likelihood in nats per response token.
        seconds: Time to make the adapter, without scoring; None if no adapter was made.
    """

    label: str
    accuracy: float
    nll: float
    seconds: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo.

    Attributes:
        rows: The lines of the table.
        seconds: Step -> seconds.
        peak_megabytes: Peak memory of the process.
        test_items: Number of test items.
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
            seconds = "-" if row.seconds is None else f"{row.seconds:.1f} s"
            lines.append(f"| {row.label} | {row.accuracy:.1%} | {row.nll:.3f} | {seconds} |")
        steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        caption = f"{self.test_items} test items, greedy answers. {steps}. Peak memory {self.peak_megabytes} MB."
        return "\n".join([*lines, "", caption])


def run_demo(
    output: str | Path, *, samples: int = 100, seed: int = 0, overwrite: bool = False, progress: Progress = no_progress
) -> DemoResult:
    """Run the demo, and write adapters, table and the figure of the layer map into a folder.

    Args:
        output: The output folder.
        samples: Number of labeled samples for fine-tuning.
        seed: Seed of the samples and of the training.
        overwrite: Replace the folder if it is not empty.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: If the package lacks the pair, or the folder is not empty.
    """
    with (
        resources.as_file(resources.files("peft_lorasuite") / "data" / "demo") as data,
        atomic_folder(output, overwrite=overwrite) as part,
    ):
        if not (data / "task.json").is_file():
            raise LoraSuiteError("the installed package lacks the demo pair", where=data.name, do="install it again")
        result = _Demo(data, part, samples, seed, progress).run()
        (part / TABLE).write_text(result.table() + "\n", encoding="utf-8")
        (part / FIGURES).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


class _Demo:
    def __init__(self, data: Path, output: Path, samples: int, seed: int, progress: Progress) -> None:
        self.data, self.output, self.progress = data, output, progress
        self.samples, self.seed = samples, seed
        self.template = str(_read_json(data / "task.json")["template"])
        self.reference = _read_json(data / "reference.json")
        self.train, self.test = (read_examples(data / f"{name}.json") for name in ("train", "test"))
        self.seconds: dict[str, float] = {}
        self.new = Backbone.open(data / "new")

    def run(self) -> DemoResult:
        upgrade_map = self._time("map", self._build_map)
        if find_spec("matplotlib"):  # of the extra `report`: the rest of the demo needs no figure
            layer_map_figure(upgrade_map).savefig(self.output / PICTURE)
        weights, behavior, distilled = (
            self._time(label, lambda method=method: self._upgrade(upgrade_map, *method))
            for label, method in METHODS.items()
        )
        distilled.save(self.output / "upgraded")
        rows = (
            self._score("no adapter", self._load()),
            self._train_fresh(),
            *(
                self._score(label, attach(self._load(), upgraded), label)
                for label, upgraded in zip(METHODS, (weights, behavior, distilled), strict=True)
            ),
            self._finetune_upgraded(behavior),
            self._reference_row(),
        )
        return DemoResult(rows, self.seconds, _peak_megabytes(), len(self.test))

    def _build_map(self) -> UpgradeMap:
        """Build the map on the pair's own texts: models this small do not know plain English."""
        text = self.data / "calibration.txt"
        return UpgradeMap.build(self.data / "old", self.new, calibration=text, progress=self.progress)

    def _upgrade(self, upgrade_map: UpgradeMap, method: str, options: Mapping[str, Any]) -> Upgraded:
        """Upgrade with one method; the prompts are training items without their answers."""
        return upgrade(
            self.data / "adapter", upgrade_map, method=method, options=options, old=self.data / "old", new=self.new,
            prompts=[format_example(item, self.template) for item in self.train[:PROMPTS]], seed=self.seed,
            progress=self.progress,
        )  # fmt: skip

    def _train_fresh(self) -> Row:
        """Train a new LoRA on the same samples, with the best settings found when the pair was made."""
        import peft
        import torch

        best = self._best_settings
        config = peft.LoraConfig(
            r=best["rank"], lora_alpha=2 * best["rank"], target_modules=self._module_names, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            fresh = peft.get_peft_model(self._load(), config)
        name = f"new LoRA, {self.samples} samples"
        trained = self._time(name, lambda: self._fit(fresh, learning_rate=best["lr"], warmup=best["warmup"]))
        return self._score(name, trained, name)

    def _finetune_upgraded(self, upgraded: Upgraded) -> Row:
        model = attach(self._load(), upgraded, is_trainable=True)
        name = f"upgraded by behavior, then {self.samples} samples"
        rate = self._best_settings["lr"]  # the same for both
        trained = self._time(name, lambda: self._fit(model, learning_rate=rate, modules=self._module_names))
        folder = self.output / "upgraded-finetuned"
        folder.mkdir()
        write_peft_model(trained, folder)
        return self._score(name, trained, name)

    def _reference_row(self) -> Row:
        """Return the result of full retraining, measured when the pair was made."""
        reference = self.reference["new_retrained"]
        label = f"full retraining, {reference['samples']} samples (precomputed)"
        return Row(label, reference["accuracy"], reference["nll"], round(60 * reference["minutes"], 1))

    @property
    def _best_settings(self) -> dict[str, Any]:
        return min(self.reference["new_vanilla_100"], key=lambda row: row["nll"])

    @property
    def _module_names(self) -> list[str]:
        return [site.path.rpartition(".")[2] for site in self.new.arch.sites]

    def _fit(self, model: Any, learning_rate: float = 1e-3, warmup: float = 0.0, modules: Sequence[str] = ()) -> Any:
        return finetune(
            model, self.train, samples=self.samples, template=self.template, seed=self.seed, modules=modules,
            tokenizer=self.new.tokenizer, learning_rate=learning_rate, warmup=warmup, progress=self.progress,
        )  # fmt: skip

    def _load(self) -> Any:
        return Backbone.open(self.data / "new").load(dtype="float32")

    def _score(self, label: str, model: Any, step: str | None = None) -> Row:
        with stage(self.progress, f"scoring {label}"):
            scored: Score = score(
                model.eval(), self.new.tokenizer, self.test, self.template, progress=self.progress
            )  # fmt: skip
        return Row(label, round(scored.accuracy, 4), round(scored.nll, 4), self.seconds.get(step) if step else None)

    def _time(self, name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with stage(self.progress, name):
            result = function()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return result


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _peak_megabytes() -> int:
    if sys.platform == "win32":  # it has no module resource
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))

"""Heads that read what a LoRA writes: ridge regression with leave-one-out predictions, and the written components."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from pico import pico_model, pico_tokenizer, save_backbone
from pico_classifiers import WORDS, texts

from peft_lorasuite import Backbone, LoraSuiteError
from peft_lorasuite.linalg.ridge import RidgePath, solve_ridge
from peft_lorasuite.methods.behavior.class_features import fit_classifier
from peft_lorasuite.methods.behavior.class_states import ClassProblem, read_features
from peft_lorasuite.methods.behavior.fact_editing import apply_update
from peft_lorasuite.models.classification import encode_for, padding_of
from peft_lorasuite.models.task import DECODER, Task
from peft_lorasuite.progress import no_progress
from peft_lorasuite.text.texts import Text


@pytest.mark.parametrize("shape", [(12, 5), (8, 20)])
def test_left_out_predictions_are_those_of_fits_without_the_example(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).double() + 1
    y = torch.randn(shape[0], 3, generator=generator).double()
    path, ridge = RidgePath(x, y, intercept=False), 0.1
    for number in range(len(x)):
        rest = [other for other in range(len(x)) if other != number]
        part = RidgePath(x[rest], y[rest], intercept=False)
        weight, _ = part.solve(ridge * path.level / part.level)  # the penalty is that of all examples
        torch.testing.assert_close(path.left_out(ridge)[number], weight @ x[number])


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("shape", [(12, 5), (8, 20)])
def test_one_ridge_is_solved_as_on_the_path(shape: tuple[int, int], intercept: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(*shape, generator=generator).double() + 1, torch.randn(shape[0], 3, generator=generator).double()
    for one, other in zip(
        RidgePath(x, y, intercept=intercept).solve(0.1), solve_ridge(x, y, 0.1, intercept=intercept), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_left_out_predictions_with_an_intercept_are_those_of_fits_with_a_constant() -> None:
    """An unpenalized constant: the fit to the others has a mean of its own."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(10, 3, generator=generator).double() + 2, torch.randn(10, 1, generator=generator).double()
    path, ridge = RidgePath(x, y, intercept=True), 0.2
    penalty = torch.diag(torch.tensor([0.0, *[ridge * path.level] * 3], dtype=torch.float64))
    wide = torch.cat([torch.ones(10, 1, dtype=torch.float64), x], dim=1)
    for number in range(10):
        rest = [other for other in range(10) if other != number]
        weight = torch.linalg.solve(wide[rest].T @ wide[rest] + penalty, wide[rest].T @ y[rest])
        torch.testing.assert_close(path.left_out(ridge)[number], (wide[number] @ weight))


def test_states_that_are_all_equal_are_refused() -> None:
    with pytest.raises(LoraSuiteError, match="all equal or not finite"):
        RidgePath(torch.ones(4, 3), torch.rand(4, 2), intercept=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "granite", "gpt2"])
def test_a_head_reads_what_the_attention_of_the_upper_layers_gathers(name: str, tmp_path) -> None:
    """Targets that are linear in the attention's outputs, and not in the final state."""
    new = Backbone.open(save_backbone(tmp_path / "new", pico_model(name), pico_tokenizer(WORDS)))
    read = [Text(text) for text in texts(300, length=6)]
    rows = encode_for(new, read, per_token=False)
    places = [(number, row.places[-1]) for number, row in enumerate(rows)]
    task = Task("SEQ_CLS", ("a", "b", "c"))
    with new.running(task=DECODER) as model:
        problem = ClassProblem(model, new, rows, places, task, False, 3, padding_of(new), 0, no_progress)
        gathered = read_features(problem, places).attention
        weight = torch.randn(3, gathered.shape[1], generator=torch.Generator().manual_seed(0))
        logits = 4 * gathered @ weight.T / (gathered @ weight.T).std()
        found = fit_classifier(problem, logits)
        assert set(found.updates) == set(problem.layers)
        modules = [model.get_submodule(f"{new.arch.layer_path}.{layer}") for layer in found.updates]
        with ExitStack() as stack:
            for module, update in zip(modules, found.updates.values(), strict=True):
                projection = module.get_submodule(new.arch.site("o").path)
                stack.enter_context(apply_update(projection, update))
            states = read_features(problem, places).final
    reached = states @ found.head.weight.T
    assert float((reached.argmax(1) == logits.argmax(1)).float().mean()) > 0.85

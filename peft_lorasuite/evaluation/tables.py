"""Evaluations and comparisons as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import LoraSuiteError, unknown_name_error
from .scores import Comparison, Difference, Evaluation, check_same_items
from .tasks import BENCHMARKS


def markdown_table(
    rows: Mapping[str, Evaluation], *, published: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Return a table of evaluations: one row per model, one column per benchmark, the average last, in percent.

    Args:
        rows: Label -> evaluation, in the order of the table.
        published: Rows of a paper (from `published_rows`), which are added below and marked as published. Their
            average is over the columns of this table.

    Raises:
        LoraSuiteError: If there are no rows, or they were not evaluated on the same items.
    """
    if not rows:
        raise LoraSuiteError("a table must have at least one evaluation")
    check_same_items(rows)
    tasks = next(iter(rows.values())).tasks
    columns = [_column(score.task) for score in tasks]
    lines = [_line(["", *columns, "Avg."]), _line(["---", *["---:"] * (len(columns) + 1)])]
    for label, row in rows.items():
        cells = [_cell(score.value, score.interval) for score in row.tasks]
        lines.append(_line([label, *cells, _cell(row.average, row.interval)]))
    for label, scores in (published or {}).items():
        lines.append(_line([f"{label} *(published)*", *_published_cells(scores, columns)]))
    counts = ", ".join(f"{column} {score.n}" for column, score in zip(columns, tasks, strict=True))
    how = "generated answers" if next(iter(rows.values())).scoring == "generate" else "likelihood of the options"
    caption = f"Accuracy in percent ({how}), 95 % intervals in brackets. Items: {counts}."
    return "\n".join([*lines, "", caption]) + "\n"


def comparison_table(comparison: Comparison) -> str:
    """Return a table of a comparison: difference in percentage points, relative gain, and items won and lost."""
    lines = [_line(["", "Difference", "Relative", "Won", "Lost", "Items"]), _line(["---", *["---:"] * 5])]
    lines += [_difference_line(_column(d.name), d) for d in comparison.tasks]
    lines.append(_difference_line("Avg.", comparison.average))
    caption = "Difference in points of accuracy on the same items, 95 % intervals in brackets."
    return "\n".join([*lines, "", caption]) + "\n"


def _difference_line(label: str, d: Difference) -> str:
    points = f"{100 * d.value:+.1f} [{100 * d.interval[0]:+.1f}, {100 * d.interval[1]:+.1f}]"
    relative = "-" if d.relative is None else f"{100 * d.relative:+.1f} %"
    return _line([label, points, relative, str(d.wins), str(d.losses), str(d.n)])


def _column(task: str) -> str:
    """Return the column of a benchmark of the paper; raise `LoraSuiteError` for any other."""
    found = next((b.column for b in BENCHMARKS if b.name == task), None)
    if found is None:
        raise unknown_name_error("benchmark", task, [b.name for b in BENCHMARKS])
    return found


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _published_cells(scores: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    known = [scores[column] for column in columns if column in scores]
    average = f"{math.fsum(known) / len(known):.2f}" if len(known) == len(columns) else "-"
    return [*(f"{scores[column]:.2f}" if column in scores else "-" for column in columns), average]

"""The notebook runs from its first cell to its last, except for the cells that need the Hub."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from patience import limit

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=int(limit(600)), resources={"metadata": {"path": str(tmp_path)}}).execute()
    before, report, after = (
        next(one["data"] for one in reversed(cell["outputs"]) if "data" in one)
        for cell in book.cells
        if cell["cell_type"] == "code" and any("data" in one for one in cell["outputs"])
    )
    assert "'new model': 0.0" in before["text/plain"]
    assert "<table>" in report["text/html"]
    assert float(after["text/plain"]) > 0.8
    assert (tmp_path / "my-new-lora" / "adapter_model.safetensors").is_file()


def test_the_notebook_has_no_outputs() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)

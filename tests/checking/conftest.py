"""The planted pair of the checks, which is made once."""

from __future__ import annotations

import checked
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> checked.Checked:
    return checked.make(tmp_path_factory.mktemp("checked"))

"""Checks of the values of low-rank updates."""

from __future__ import annotations

import math

import pytest
import torch

from peft_lorasuite import LoraSuiteError
from peft_lorasuite.linalg.lowrank import check_values, decomposition_errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e9])
@pytest.mark.parametrize("place", [0, 1])
def test_values_out_of_range_are_found_in_every_factor(value: float, place: int) -> None:
    factors = [torch.ones(2, 3), torch.ones(3, 2)]
    assert check_values(*factors, where="here") == tuple(factors)
    factors[place][1, 1] = value
    with pytest.raises(LoraSuiteError, match="here: the result's values are out of range"):
        check_values(*factors, where="here", whose="result")


def test_a_matrix_that_cannot_be_decomposed_is_one_error() -> None:
    with pytest.raises(LoraSuiteError, match="a matrix cannot be decomposed"), decomposition_errors():
        torch.linalg.svd(torch.full((3, 3), math.nan))

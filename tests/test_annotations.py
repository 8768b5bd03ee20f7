"""Shapes in signatures are executed in the test run; what is left out for speed is left out safely."""

import jaxtyping
import numpy as np
import pytest
import torch

from interp.core import statistics
from interp.sinks import first_token


@pytest.fixture(autouse=True)
def checked(pytestconfig):
    if not pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("annotations are executed with --jaxtyping-packages (make test) only")


def test_named_axes_are_held_against_each_other():
    assert first_token.importance(torch.ones(2, 3, 5, 5).tril()).shape == (2, 3, 5)
    with pytest.raises(jaxtyping.TypeCheckError):
        first_token.importance(torch.ones(5))  # no head, no query


def test_arguments_without_axes_are_checked_by_beartype_alone():
    with pytest.raises(jaxtyping.TypeCheckError):
        statistics.rate("ten", 12)


def test_closures_and_bare_functions_keep_working():
    found = statistics.correlation(np.arange(9.0), np.arange(9.0), resamples=20)
    assert found.value == 1.0

"""Answers that begin alike are refused by name, and told apart by the token after what they share."""

import numpy as np
import pytest
import torch

from interp.core import PromptError
from interp.prompts.first_token import discriminative, token_id, told_apart

CORNERS = [[1, 3], [1, 4], [2, 3], [2, 4]]


def test_a_shared_first_token_is_refused_by_name():
    names = {1: "top", 2: "bottom", 3: "left", 4: "right"}
    with pytest.raises(PromptError, match="'top left' and 'top right' begin with the same token 'top'"):
        discriminative([1, 3], CORNERS, decode=lambda ids: " ".join(names[i] for i in ids))
    with pytest.warns(UserWarning, match="cannot tell them apart"):
        assert discriminative([1, 3], CORNERS, shared="warn") == 1
    assert discriminative([5, 3], CORNERS) == 5
    assert discriminative([1, 3], [[1, 3], [2, 3]]) == 1  # the answer itself is no other
    with pytest.raises(PromptError, match="empty"):
        discriminative([], CORNERS)


def test_what_is_said_first_leaves_one_token_that_decides():
    assert [told_apart(corner, CORNERS) for corner in CORNERS] == [
        ([1], 3, [4]), ([1], 4, [3]), ([2], 3, [4]), ([2], 4, [3])]
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [rng.integers(3, size=4).tolist() for _ in range(5)]
        before, token, against = told_apart(answers[0], answers)
        rest = [a for a in answers if a != answers[0]]
        n = len(before)
        assert [*before, token] == answers[0][: n + 1]
        assert not any(a[: n + 1] == answers[0][: n + 1] for a in rest)
        assert set(against) == {a[n] for a in rest if a[:n] == before}
    with pytest.raises(PromptError, match="one is the beginning of the other"):
        told_apart([1], [[1, 2]])


def test_one_token_id_may_be_any_kind_of_number():
    assert [token_id(n) for n in (7, np.int64(7), torch.tensor(7))] == [7, 7, 7]

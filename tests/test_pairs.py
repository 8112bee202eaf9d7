"""Every two settings meet in what is tried."""

import itertools

import pytest
from pairs import each, pairs


def test_every_two_values_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = (["a", "b"], [1, 2, 3, 4], [True, False], "xyz")
    monkeypatch.delenv("NMSPARSE_TEST_FULL", raising=False)
    rows = pairs(*axes)
    for (one, first), (other, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) < 16
    monkeypatch.setenv("NMSPARSE_TEST_FULL", "1")
    assert pairs(*axes) == list(itertools.product(*axes))


def test_every_value_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = ([1, 2, 3], ["a", "b"], [True])
    monkeypatch.delenv("NMSPARSE_TEST_FULL", raising=False)
    assert each(*axes) == [(1, "a", True), (2, "b", True), (3, "a", True)]
    monkeypatch.setenv("NMSPARSE_TEST_FULL", "1")
    assert each(*axes) == list(itertools.product(*axes))

"""Every two settings meet in what is tried."""

import itertools

import pytest
from pairs import pairs


def test_every_two_values_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = (["a", "b"], [1, 2, 3, 4], [True, False], "xyz")
    monkeypatch.delenv("NMSPARSE_TEST_FULL", raising=False)
    rows = pairs(*axes)
    for (one, first), (other, second) in itertools.combinations(enumerate(axes), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) < 16
    monkeypatch.setenv("NMSPARSE_TEST_FULL", "1")
    assert pairs(*axes) == list(itertools.product(*axes))

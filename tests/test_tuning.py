"""How the CPU kernel's thresholds are learned from measurements."""

import tuning


def test_the_constants_are_those_that_the_crossings_came_from() -> None:
    shares = {"4:16": 4 / 16, "8:16": 8 / 16, "12:16": 12 / 16, "16:16": 1.0}
    for cost, read in ((60, 10), (200, 9)):
        crossings = {pattern: round(cost / (read - 6 * share)) for pattern, share in shares.items()}
        found = tuning.fitted(crossings)
        assert found is not None
        for pattern, share in shares.items():
            assert abs(found[0] / (found[1] - 6 * share) - crossings[pattern]) < 1.5
    assert tuning.fitted({"8:16": 9}) is None


def test_a_crossing_is_where_panels_are_faster_from_there_on() -> None:
    counts = [4, 8, 16, 32]
    assert tuning.crossing(counts, [0.8, 1.1, 0.9, 1.2]) == 32
    assert tuning.crossing(counts, [0.8, 1.1, 1.2, 1.2]) == 8
    assert tuning.crossing(counts, [1.1, 1.1, 1.2, 1.2]) is None
    assert tuning.crossing(counts, [0.8, 1.1, 1.2, 0.9]) is None


def test_only_the_constants_of_the_header_change() -> None:
    text = (tuning.PLUGINS / tuning.TUNING).read_text()
    changed = tuning.with_constants(text, dict.fromkeys(tuning.FIELDS, (7, 3)))
    assert "Panels of_float{7, 3}, of_sixteen_bits{7, 3}, of_integers{7, 3};" in changed
    assert [a for a, b in zip(text.splitlines(), changed.splitlines(), strict=True) if a != b] == [
        line for line in text.splitlines() if "Panels of_float" in line
    ]
    assert tuning.MEASURED.search(text)

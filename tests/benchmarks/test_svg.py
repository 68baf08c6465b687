"""What charts are drawn with: axis steps, numbers for people, colours."""

import itertools

from cl_adapters.benchmarks.report.svg import amount, colour, duration, ink, rough_duration, thinned, ticks


def test_axis_steps_and_labels() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(-3, 19) == [-5, 0, 5, 10, 15, 20]
    assert ticks(0, 0)[0] == 0
    assert ticks(0, 0)[-1] == 1
    assert thinned(5, 10) == [0, 1, 2, 3, 4]
    assert [position + 1 for position in thinned(20, 10)] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert [position + 1 for position in thinned(20, 5)] == [1, 5, 10, 15, 20]
    for count in (1, 3, 99, 100, 1000):
        assert len(thinned(count, 12)) <= 13


def test_numbers_for_people() -> None:
    assert [amount(n) for n in (0, 950, 36_928, 1_000_000, 999_600)] == ["0", "950", "36.9 k", "1 M", "1.0 M"]
    assert amount(4_100_000, "B") == "4.1 MB"
    assert [duration(s) for s in (0.424, 12.34, 59.96, 200, 7500)] == [
        "0.42 s", "12.3 s", "1 min 00 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip
    assert [rough_duration(s) for s in (12.34, 75, 134, 5000)] == ["12.3 s", "75 s", "2.2 min", "1.4 h"]


def test_colours_get_lighter_and_text_stays_readable() -> None:
    def luminance(fill: str) -> float:
        red, green, blue = (int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return float(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)

    steps = [luminance(colour(share / 100)) for share in range(101)]
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert colour(-1) == colour(0) == "#440154"
    assert colour(2) == "#fde725"
    for share in range(101):
        fill = colour(share / 100)
        text = 1.0 if ink(fill) == "#fff" else 0.0
        low, high = sorted((luminance(fill), text))
        assert (high + 0.05) / (low + 0.05) > 4.5

"""Figures of lesson 07: peaks by category, and bytes over the length of the context."""

from matplotlib import pyplot as plt

from course_lib import show
from course_lib.show import peaks, style

MIB = 2**20


def test_parts_are_in_one_order_and_sum_up() -> None:
    parts = {"activations": 5, "weights": 3, "KV cache": 2, "other": 1}
    ordered = peaks.in_order(parts)
    assert list(ordered) == list(style.MEMORY) and sum(ordered.values()) == 11 and ordered["other"] == 3


def test_peak_bars(capsys) -> None:
    ways = {
        "all kept": ({"weights": 3 * MIB, "activations": 70 * MIB}, 0.04),
        "full": ({"weights": 3 * MIB, "activations": 9 * MIB, "gradients": MIB}, 0.05),
    }
    show.peak_bars(ways, 64 * MIB)
    said = capsys.readouterr().out
    assert "all kept 73.0 MiB and 40.0 ms; full 13.0 MiB and 50.0 ms." in said
    assert "Above the chip's 64.0 MiB: all kept." in said
    ax = plt.gca()
    assert ax.get_xlabel() == "allocated at the peak (MiB)" and ax.get_xlim()[1] > 73
    show.peak_bars({"full": ways["full"]}, 64 * MIB)
    assert "64.0 MiB: none." in capsys.readouterr().out


def test_bytes_over_context(capsys) -> None:
    closed = {"square": [MIB * T * T for T in (1, 2, 4, 8)], "line": [MIB * T for T in (1, 2, 4, 8)]}
    show.bytes_over_context((1, 2, 4, 8), closed, {"square": {1: MIB, 2: 4 * MIB}}, 10 * MIB)
    said = capsys.readouterr().out
    assert "square 1.00 MiB to 64.0 MiB, at the last doubling × 4.00, above the capacity from 4 tokens" in said
    assert "line 1.00 MiB to 8.00 MiB, at the last doubling × 2.00, never above the capacity" in said
    lines = plt.gca().get_lines()
    assert list(lines[1].get_xdata()) == [1, 2] and list(lines[1].get_ydata()) == [1, 4]

"""Numbers with their unit, three digits long: 1.23 GFLOP, 4.50 MiB, 12.3 µs.

>>> from course_lib.show.units import quantity
>>> quantity(4.5 * 2**20, "B"), quantity(12.34e-6, "s"), quantity(0.7655, "%")
('4.50 MiB', '12.3 µs', '76.5 %')
"""

LARGE = ("", "k", "M", "G", "T", "P", "E")
SMALL = ("", "m", "µ", "n", "p")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def quantity(value: float, unit: str = "") -> str:
    """`value` in base units (FLOP, B, s, B/s, …) with a prefix and three digits.

    Bytes count in powers of 1024, everything else, bytes per second too, in powers of 1000. "%" takes a fraction.
    Without a unit: a whole number with its thousands marked, or three digits.
    """
    if unit == "%":
        return f"{100 * value:.1f} %"
    if not unit:
        return f"{value:,}" if isinstance(value, int) else three_digits(value)
    if unit == "B":
        return _scaled(value, 1024, BINARY, "")
    if unit == "s" and 0 < abs(value) < 1:
        return _small(value, unit)
    return _scaled(value, 1000, LARGE, unit)


def three_digits(value: float) -> str:
    """0.123, 1.23, 12.3, 123, 1,234: three digits, or all that stand before the point."""
    size = abs(value)
    if size == 0:
        return "0"
    if 0.01 <= size < 0.9995:
        return f"{value:.3f}"
    if size >= 99.95:
        return f"{value:,.0f}"
    if size < 0.01:
        return f"{value:.2g}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def _scaled(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    step = 0
    while abs(value) >= 0.9995 * base and step < len(prefixes) - 1:
        value, step = value / base, step + 1
    digits = f"{value:,}" if step == 0 and isinstance(value, int) else three_digits(value)
    return f"{digits} {prefixes[step]}{unit}"


def _small(value: float, unit: str) -> str:
    step = 0
    while abs(value) < 0.9995 and step < len(SMALL) - 1:
        value, step = value * 1000, step + 1
    return f"{three_digits(value)} {SMALL[step]}{unit}"

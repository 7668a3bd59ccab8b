"""Sourced figures: one number, its unit, how well it is known, and where it comes from.

Chip and system files are TOML tables of such figures. Reading turns every value into SI (Hz, bytes, B/s, s, W,
FLOP/s) and refuses what cannot be: a wrong unit is the cheapest way to a wrong lesson. A figure that nobody has
published is left out of the file; asked for, it is ``None`` or raises `UnknownFigure`, and is never guessed.

    python -m course_lib.chip ascend-910b2
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

TAGS = {
    "V": "published by the vendor",
    "P": "measured, in a paper or a repository",
    "T": "third-party estimate or press",
    "S": "read through a secondary transcription",
    "D": "arithmetic from other figures",
    "A": "assumed: taken over from another chip, or chosen for an emulated one",
    "C": "calibrated here, on the measurement named",
}
# dimension: (largest possible SI value, {unit: factor to SI}); the first unit is the SI one
DIMENSIONS: dict[str, tuple[float, dict[str, int | Decimal]]] = {
    "count": (1e7, {"1": 1}),
    "frequency": (1e11, {"Hz": 1, "MHz": 10**6, "GHz": 10**9}),
    "bytes": (1e15, {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "GB": 10**9, "TB": 10**12}),
    "bandwidth": (1e16, {"B/s": 1, "MB/s": 10**6, "GB/s": 10**9, "TB/s": 10**12, "Gb/s": 125 * 10**6}),
    "bytes per cycle": (1e6, {"B/cycle": 1}),
    "cycles": (1e6, {"cycle": 1}),
    "ratio": (1, {"1": 1}),
    "time": (1.0, {"s": 1, "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "ns": Decimal("1e-9")}),
    "energy": (1.0, {"J": 1, "pJ": Decimal("1e-12")}),
    "power": (1e8, {"W": 1, "kW": 1000, "MW": 10**6}),
    "rate": (1e20, {"FLOP/s": 1, "GFLOP/s": 10**9, "TFLOP/s": 10**12, "PFLOP/s": 10**15, "TOP/s": 10**12}),
    "FLOP per lane": (64, {"FLOP/cycle": 1}),
    "tile": (4096, {"MAC/cycle": 1}),
    "dtypes": (0, {"dtype": 1}),
}
DTYPES: dict[str, int] = {  # torch's names and their bytes; "tf32" is float32 rounded on the way in (HF32 on Ascend)
    "float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float4_e2m1fn_x2": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8,
    "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "complex32": 4,
}  # fmt: skip


class SpecError(ValueError):
    """A chip or system file, or a name for one, that cannot be used; says which file and key, and what to do."""


class UnknownFigure(LookupError):
    """A figure that the chip's file leaves out because no source gives it."""


@dataclass(frozen=True)
class Figure:
    """``value`` in the SI ``unit``; ``tag`` is a key of `TAGS`; ``written`` is how the file has it ("1.6 TB/s")."""

    value: int | float | tuple
    unit: str
    tag: str
    source: str
    written: str = ""


class Figures(Mapping[str, Figure]):
    """Read-only mapping from a dotted key ("memory.bandwidth") to its `Figure`; hashable, and so is all built on it."""

    def __init__(self, figures: Mapping[str, Figure]) -> None:
        self._figures = dict(figures)
        self._hash = hash(tuple(self._figures.items()))

    def __getitem__(self, key: str) -> Figure:
        return self._figures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Figures) and self._figures == other._figures

    def __reduce__(self) -> tuple:
        return Figures, (self._figures,)  # string hashes differ between processes, so a pickle must not carry one

    def value(self, key: str) -> int | float | tuple | None:
        """The figure's value in SI, or None when it is unknown."""
        figure = self._figures.get(key)
        return None if figure is None else figure.value


def read_toml(file: Path) -> dict:
    """The file's tables, decimals kept exact; raises SpecError for a file that is missing or is not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read ({error}); give a known name or the path of a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{file}: not valid TOML ({error}); correct that line") from None


def read_text(file: Path, tables: dict, key: str, choices: tuple[str, ...] = ()) -> str:
    """Takes the plain text ``key`` out of ``tables``; raises SpecError when it is missing, no text, or no choice."""
    text = tables.pop(key, None)
    if not isinstance(text, str) or not text.strip() or (choices and text not in choices):
        wanted = f"one of {', '.join(choices)}" if choices else f'a text such as {key} = "…"'
        raise SpecError(f"{file}: {key}: expected {wanted}, found {text!r}; write it at the top of its table")
    return text


def read_figures(file: Path, tables: dict, schema: Mapping[str, str], prefix: str = "") -> dict[str, Figure]:
    """Every figure under ``tables`` by dotted key; ``schema`` maps allowed keys to dimensions. Raises SpecError."""
    figures = {}
    for name, raw in tables.items():
        key = prefix + name
        if key in schema:
            figures[key] = _figure(file, key, raw, schema[key])
        elif any(known.startswith(key + ".") for known in schema):
            if not isinstance(raw, dict):
                raise SpecError(f"{file}: {key}: expected a table of figures, found {raw!r}; write [{key}]")
            figures |= read_figures(file, raw, schema, key + ".")
        else:
            near = difflib.get_close_matches(key, schema, 1) or [", ".join(sorted({k.split(".")[0] for k in schema}))]
            raise SpecError(f"{file}: {key}: unknown key; did you mean {near[0]}? Correct or remove it")
    return figures


def _figure(file: Path, key: str, raw: object, dimension: str) -> Figure:
    """Checks one ``{ value, unit, tag, source }`` and turns it into SI."""
    largest, units = DIMENSIONS[dimension]
    example = f'{{ value = …, unit = "{next(iter(units))}", tag = "V", source = "…" }}'
    if not isinstance(raw, dict):
        raise SpecError(f"{file}: {key}: expected {example}, found {raw!r}; a figure needs unit, tag and source")
    for extra in raw.keys() - {"value", "unit", "tag", "source"}:
        raise SpecError(f"{file}: {key}: unknown key {extra!r}; a figure is {example}")
    for part in ("value", "unit", "tag", "source"):
        if part not in raw:
            raise SpecError(f"{file}: {key}: missing {part}; write {example}")
    unit, tag, source = raw["unit"], raw["tag"], raw["source"]
    if not isinstance(unit, str) or unit not in units:
        raise SpecError(f"{file}: {key}: unknown unit {unit!r} for a {dimension}; use one of {', '.join(units)}")
    if not isinstance(tag, str) or tag not in TAGS:
        meanings = ", ".join(f"{tag} ({meaning})" for tag, meaning in TAGS.items())
        raise SpecError(f"{file}: {key}: unknown tag {tag!r}; use one of {meanings}")
    if not isinstance(source, str) or not source.strip():
        raise SpecError(f"{file}: {key}: empty source; say where the figure comes from")
    value = _value(raw["value"], units[unit], dimension, largest)
    written = f"{_plain(raw['value'])} {unit}"
    if value is None:
        raise SpecError(f"{file}: {key}: impossible value {written}; expected {_wanted(dimension, largest, units)}")
    return Figure(value, next(iter(units)), tag, source, written.removesuffix(" 1").removesuffix(" dtype"))


def _value(raw: object, factor: int | Decimal, dimension: str, largest: float) -> int | float | tuple | None:
    """The SI value, whole numbers as int; None when it cannot be."""
    if dimension == "tile":
        whole = isinstance(raw, list) and all(type(side) is int and 0 < side <= largest for side in raw)
        return tuple(raw) if whole and len(raw) == 3 else None
    if dimension == "dtypes":
        known = isinstance(raw, list) and raw and all(isinstance(dtype, str) and dtype in DTYPES for dtype in raw)
        return tuple(raw) if known else None
    if type(raw) not in (int, Decimal) or not Decimal(raw).is_finite() or not 0 < raw * factor <= largest:
        return None
    value = Decimal(raw) * factor
    if dimension in ("count", "bytes per cycle", "cycles", "FLOP per lane") and value != int(value):
        return None
    return int(value) if value == int(value) else float(value)


def _wanted(dimension: str, largest: float, units: Mapping) -> str:
    if dimension == "tile":
        return "three positive whole numbers [M, K, N]"
    if dimension == "dtypes":
        return f"a list of names from {', '.join(DTYPES)}"
    return f"a {dimension} above 0 and at most {largest:.0e} {next(iter(units))}"


def _plain(value: object) -> str:
    """A value as the file has it, for messages and tables."""
    if isinstance(value, list):
        return " × ".join(map(str, value)) if all(type(part) is int for part in value) else ", ".join(map(str, value))
    return repr(value) if isinstance(value, str) else str(value)

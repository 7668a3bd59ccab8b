"""Measured kernels and collectives beside what the chip model says of them: how far our figures can be trusted.

``data/published/kernels.toml`` and ``collectives.toml`` have the rows with their sources. Rows on which a constant was
calibrated say which; all others are predictions, and only these enter the median.

    python -m course_lib.chip.published > docs/kernels.md
"""

import math
import statistics
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from course_lib import data
from course_lib.chip.collectives import transfer
from course_lib.chip.core import Run, empty, launch
from course_lib.chip.core.kernels import matmul as ladder
from course_lib.chip.core.kernels.matmul import matmul
from course_lib.chip.core.kernels.reuse import hit_rate
from course_lib.chip.core.kernels.tiles import largest
from course_lib.chip.cost import Matmul, Work, cost
from course_lib.chip.figures import DTYPES
from course_lib.chip.spec import ChipSpec, load_chip, load_system

PS, TERA, GIGA, MICRO = 1e-12, 1e12, 1e9, 1e-6
LARGE = 8192  # a product of this side is large on every chip
LATENT, ROPE = 512, 64  # widths of DeepSeek's latent keys and values
CONTEXTS, TOKENS = 128, 8192  # of the batch that latent attention decodes
VECTOR_PER_SCORE = 5  # scale, max, subtract, exp, sum
LADDER = (1024, 2048, 1024)


@dataclass(frozen=True)
class Row:
    """One measured kernel and ours, in ``unit``; ``calibrated`` names the constants that this row has set."""

    name: str
    measured: float
    ours: float
    unit: str
    calibrated: str
    reason: str
    source: str

    @property
    def error(self) -> float:
        """Relative error of what ours predicts, positive where we say more."""
        return self.ours / self.measured - 1


@cache
def rows(*beginnings: str) -> tuple[Row, ...]:
    """All kernels' rows, or those whose names begin with one of ``beginnings``, computed."""
    return tuple(
        _row(entry, KINDS[entry["kind"]](load_chip(entry["chip"]), entry)) for entry in _read("kernels", beginnings)
    )


@cache
def collectives(*beginnings: str) -> tuple[Row, ...]:
    """All collectives' rows, or those whose names begin with one of ``beginnings``, computed."""
    return tuple(_row(entry, _collective(entry)) for entry in _read("collectives", beginnings))


def _read(name: str, beginnings: tuple[str, ...]) -> list[dict]:
    text = data.path("published", f"{name}.toml").read_text(encoding="utf-8")
    return [entry for entry in tomllib.loads(text)["row"] if entry["name"].startswith(beginnings or "")]


def median_error(of: tuple[Row, ...] | None = None) -> float:
    """Median of |error| over the predictions."""
    return statistics.median(abs(row.error) for row in of or rows() if not row.calibrated)


def table(of: tuple[Row, ...] | None = None, what: str = "kernel") -> str:
    """The rows as Markdown, worst prediction and median below."""
    lines = [f"| {what} | measured | ours | error | |", "|---|---:|---:|---:|---|"]
    of = of or rows()
    for row in of:
        mark = "calibrated" if row.calibrated else row.reason
        unit = "µs" if row.unit == "us" else row.unit
        lines.append(
            f"| {row.name} | {row.measured:,.4g} {unit} | {row.ours:,.4g} {unit} | {row.error:+.1%} | {mark} |"
        )
    predicted = [row for row in of if not row.calibrated]
    worst = max(predicted, key=lambda row: abs(row.error))
    lines += [
        "",
        f"{len(predicted)} predictions: median error {median_error(of):.1%}, worst {worst.error:+.1%} ({worst.name}).",
    ]
    return "\n".join(lines)


def page() -> str:
    """What docs/kernels.md has."""
    return "\n".join((TITLE, table(), COLLECTIVES, table(collectives(), "collective"))) + "\n"


def _row(entry: dict, ours: float) -> Row:
    rest = (entry["unit"], entry.get("calibrated", ""), entry.get("reason", ""), entry["source"])
    return Row(entry["name"], entry["measured"], ours, *rest)


# -- what is computed for each kind -------------------------------------------------------------------


def _gemm(chip: ChipSpec, entry: dict) -> float:
    m, k, n = entry["shape"]
    if entry.get("engine"):
        return 2 * m * k * n / (PS * _on_the_engine(chip, m, k, n, entry["dtype"]).ps + chip.launch_device) / TERA
    size = DTYPES[entry["dtype"]]
    paid = cost(
        chip, Work((Matmul(1, m, k, n, entry["dtype"]),), bytes_read=size * (m * k + k * n), bytes_written=2 * m * n)
    )
    seconds = PS * (paid.ps if entry.get("launch") else paid.ps - paid.launch_ps)
    return seconds / MICRO if entry["unit"] == "us" else 2 * m * k * n / seconds / TERA


def _busy(chip: ChipSpec, entry: dict) -> float:
    return 100 * _on_the_engine(chip, *entry["shape"], entry["dtype"]).busy[entry["pipe"]]


@lru_cache(maxsize=4)
def _on_the_engine(chip: ChipSpec, m: int, k: int, n: int, dtype: str) -> Run:
    """A product on all cores, instruction by instruction, as it was measured: tile 128 × 64 × 256, sums in float32."""
    operands = empty(m, k, dtype=dtype), empty(k, n, dtype=dtype), empty(m, n, dtype="float32")
    return launch(matmul, chip, *operands, largest(dtype), blocks=chip.cube_cores)


def _peak(chip: ChipSpec, entry: dict) -> float:
    return _gemm(chip, {**entry, "shape": (LARGE, LARGE, LARGE)})


def _copy(chip: ChipSpec, entry: dict) -> float:
    return 2 * GIGA / (PS * cost(chip, Work(bytes_read=10**9, bytes_written=10**9)).memory_ps) / GIGA


def _mla(chip: ChipSpec, entry: dict) -> float:
    """Latent attention as in decoding: all heads of a sequence meet the same latent keys, which are its values too."""
    rows, dtype, scores = entry["rows"], "bfloat16", CONTEXTS * entry["rows"] * TOKENS
    products = (Matmul(CONTEXTS, rows, LATENT + ROPE, TOKENS, dtype), Matmul(CONTEXTS, rows, TOKENS, LATENT, dtype))
    read = CONTEXTS * TOKENS * (LATENT + ROPE) * DTYPES[dtype]
    work = Work(
        products, VECTOR_PER_SCORE * scores, "float32", read, CONTEXTS * rows * LATENT * 2, exchanged=6 * scores
    )
    paid = cost(chip, work)
    seconds = PS * (paid.ps - paid.launch_ps)
    return read / seconds / GIGA if entry["unit"] == "GB/s" else paid.cube_flops / seconds / TERA


def _ladder(chip: ChipSpec, entry: dict) -> float:
    m, k, n = LADDER
    return 100 * _one_core(chip, "k_split", m, k, n) / _one_core(chip, entry["step"], m, k, n)


def _one_core(chip: ChipSpec, step: str, m: int, k: int, n: int) -> int:
    return launch(getattr(ladder, step), chip, empty(m, k), empty(k, n), empty(m, n)).cycles


def _l2(chip: ChipSpec, entry: dict) -> float:
    side = entry["side"]
    return 100 * hit_rate(chip, side, side, side, largest("float16"), entry["group"], chip.cube_cores)


def _collective(entry: dict) -> float:
    """Microseconds; or GB/s, of the payload or of what a ring would carry (``bus``)."""
    system = load_system(entry["system"]).having(**entry.get("change", {}))
    ranks, payload = entry["ranks"], math.prod(entry["payload"])
    seconds = PS * transfer(system, entry["collective"], payload, range(ranks)).ps
    counted = 2 * (ranks - 1) / ranks * payload if entry.get("bus") else payload
    return seconds / MICRO if entry["unit"] == "us" else counted / seconds / GIGA


KINDS: dict[str, Callable[[ChipSpec, dict], float]] = {
    "gemm": _gemm, "busy": _busy, "peak": _peak, "copy": _copy, "mla": _mla, "ladder": _ladder, "l2": _l2,
}  # fmt: skip

TITLE = "# Measured kernels beside ours\n\nMade by `python -m course_lib.chip.published`; sources are in `data/published/kernels.toml`.\n"
COLLECTIVES = "\n# Measured collectives beside ours\n\nSources and payloads are in `data/published/collectives.toml`.\n"

if __name__ == "__main__":
    print(page(), end="")

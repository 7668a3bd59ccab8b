"""Number formats as the core stores them: NumPy has no bfloat16 and no 8-bit floats, so these lie as their bits.

`encode` rounds to nearest, ties to even; `decode` gives float32 (int32 for integers) to calculate with.
"""

import numpy as np

STORED: dict[str, type] = {  # dtype by torch's name → NumPy's type of what lies in memory
    "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32, "int8": np.int8,
    "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8,
}  # fmt: skip


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` rounded to ``dtype``, as bits lie in memory."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    if dtype in EXPONENT_BITS:
        return _nearest(np.asarray(values, np.float32), dtype)
    if dtype in ("int32", "int8") and np.asarray(values).dtype.kind == "f":
        return _whole(np.asarray(values), dtype)
    with np.errstate(over="ignore"):  # beyond float16 lies infinity, as on the chip
        return np.asarray(values).astype(STORED[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """What lies in memory, as float32, or int32 for integers."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype in EXPONENT_BITS:
        return TABLES[dtype][stored]
    return stored.astype(np.int32 if dtype.startswith("int") else np.float32, copy=False)


def _whole(values: np.ndarray, dtype: str) -> np.ndarray:
    """Nearest whole numbers, ties to even; what is too large becomes the largest, NaN becomes 0."""
    limits = np.iinfo(dtype)
    rounded = np.rint(np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=-np.inf))
    return np.clip(rounded, limits.min, limits.max).astype(dtype)


EXPONENT_BITS = {"float8_e4m3fn": 4, "float8_e5m2": 5}


def _table(dtype: str) -> np.ndarray:
    """The 256 values of an 8-bit float (OCP 8-bit floating point specification, revision 1.0)."""
    exponent_bits = EXPONENT_BITS[dtype]
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    code = np.arange(128)
    exponent, mantissa = code >> mantissa_bits, (code % 2**mantissa_bits) / 2**mantissa_bits
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    if dtype == "float8_e4m3fn":
        values[127] = np.nan
    else:
        values[124:] = [np.inf, np.nan, np.nan, np.nan]
    return np.concatenate([values, -values]).astype(np.float32)


TABLES = {dtype: _table(dtype) for dtype in EXPONENT_BITS}


def _nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of the nearest values, ties to the even code; what is too large becomes the largest (saturates)."""
    table = TABLES[dtype][:128]
    finite = table[np.isfinite(table)]
    size = np.minimum(np.abs(values), finite[-1])
    above = np.clip(np.searchsorted(finite, size), 1, len(finite) - 1)
    below = above - 1
    middle = (finite[above].astype(np.float64) + finite[below]) / 2
    code = np.where((size > middle) | ((size == middle) & (above % 2 == 0)), above, below)
    return (np.where(np.isnan(values), 127, code) | np.where(np.signbit(values), 128, 0)).astype(np.uint8)

"""Number formats: rounding to nearest even, infinities and NaN, saturation of 8-bit floats and integers."""

import numpy as np
import pytest
import torch

from course_lib.chip.core.numbers import decode, encode

SPECIAL = [0.0, -0.0, 1.0, -1.5, 65504.0, 65520.0, 1e-8, 6e-8, 3.4e38, np.inf, -np.inf, np.nan, 448.0, 464.0, 0.0009765625]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_as_torch_rounds(dtype: str, random: np.random.Generator) -> None:
    values = np.concatenate([np.array(SPECIAL, np.float32), (random.standard_normal(10000) * 100).astype(np.float32)])
    want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(decode(encode(values, dtype), dtype), want)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_as_torch_rounds_them_within_range(dtype: str, random: np.random.Generator) -> None:
    values = (random.standard_normal(10000) * 50).astype(np.float32)
    want = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(decode(encode(values, dtype), dtype), want)


def test_8_bit_floats_saturate() -> None:
    assert decode(encode(np.float32([1e6, -1e6, np.inf]), "float8_e4m3fn"), "float8_e4m3fn").tolist() == [448, -448, 448]
    assert np.isnan(decode(encode(np.float32([np.nan]), "float8_e5m2"), "float8_e5m2")).all()


def test_to_whole_numbers_ties_go_to_even() -> None:
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2.6, 3e9, -3e9, np.nan])
    assert encode(values, "int32").tolist() == [0, 2, 2, 0, -2, 3, 2**31 - 1, -(2**31), 0]
    assert encode(np.float32([127.6, -129]), "int8").tolist() == [127, -128]

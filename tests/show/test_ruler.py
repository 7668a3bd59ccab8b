"""The ruler of number formats, against torch.finfo and the core's own tables; and where numbers lie on it."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from course_lib import show
from course_lib.chip.core.numbers import TABLES
from course_lib.show.ruler import FORMATS, lost

matplotlib.use("agg")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float4_e2m1fn"])
def test_limits_are_those_of_torch(name: str) -> None:
    each, told = FORMATS[name], torch.finfo(getattr(torch, name))
    assert (each.bits, each.largest, each.smallest_normal, each.spacing) == (told.bits, told.max, told.tiny, told.eps)
    few = torch.tensor([each.smallest, 0.5 * each.smallest], dtype=torch.float64).to(getattr(torch, name)).double()
    assert few.tolist() == [each.smallest, 0]


@pytest.mark.parametrize("name", TABLES)
def test_limits_are_those_of_the_core(name: str) -> None:
    values = TABLES[name][:128]
    values = values[np.isfinite(values) & (values > 0)]
    assert (values.min(), values.max()) == (FORMATS[name].smallest, FORMATS[name].largest)


def test_float4_has_eight_sizes() -> None:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP microscaling formats, revision 1.0)."""
    four = FORMATS["float4_e2m1fn"]
    assert (four.bits, four.smallest, four.smallest_normal, four.largest) == (4, 0.5, 1.0, 6.0)


def test_the_ruler_and_its_sentence(capsys) -> None:
    show.formats(["bfloat16", "float16"])
    said = capsys.readouterr().out
    assert "bfloat16 (1 + 8 + 7 bits): from 2^-133" in said and "to 65,504; next number after 1: +2^-10" in said
    left, right = plt.gcf().axes
    assert left.get_xlabel() == "bits"
    assert [label.get_text() for label in left.get_yticklabels()] == ["bfloat16", "float16"]
    assert "65,504" in [text.get_text() for text in right.texts]


def test_all_formats_have_a_row(capsys) -> None:
    show.formats()
    assert len(capsys.readouterr().out.splitlines()) == len(FORMATS) == 6


def test_magnitudes_and_their_sentence(capsys) -> None:
    sizes = np.array([0.0, 2.0**-30, -(2.0**-25), 2.0**-20, -(2.0**-10), 2.0**17])
    show.magnitudes({"some": sizes, "larger": 2.0**6 * sizes}, "float16", "Numbers", "size")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "some: 40.0 % become zero in float16, 20.0 % lose bits, 20.0 % overflow."
    assert said[1] == "larger: 0.0 % become zero in float16, 40.0 % lose bits, 20.0 % overflow."
    ax = plt.gca()
    assert ax.get_xlabel() == "size" and "(%)" in ax.get_ylabel()
    assert "becomes zero" in [text.get_text() for text in ax.texts]


def test_lost_is_what_torch_rounds_to_zero() -> None:
    sizes = torch.exp2(torch.linspace(-30, -18, 1001, dtype=torch.float64))
    assert lost(sizes.numpy(), "float16") == (sizes.half() == 0).double().mean().item()

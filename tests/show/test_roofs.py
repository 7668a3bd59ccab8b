"""The roofline: its roofs against the chip's figures, its points against the ledger, its sentence against both."""

import pytest
import torch
from matplotlib import pyplot as plt

from course_lib import npu, show
from course_lib.chip import UnknownFigure, chips, load_chip
from course_lib.show.roofs import BOUNDS, Point, Roofs, family, points, sentence


@pytest.fixture(scope="module")
def step() -> npu.Ledger:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256)).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with npu.ledger() as ledger:
        model(torch.randn(512, 256, device="npu")).square().mean().backward()
        optimizer.step()
    return ledger


def test_roofs_of_the_910b2() -> None:
    roofs = Roofs(load_chip("ascend-910b2"), "bfloat16")
    assert roofs.cube == 24 * 1_800_000_000 * 2 * 16**3
    assert roofs.ridge == pytest.approx(221.2, abs=0.1)
    assert 0.75 * roofs.cube < roofs.tiles < roofs.cube
    assert roofs.vector < roofs.cube / 32


def test_unknown_peak_is_said() -> None:
    with pytest.raises(UnknownFigure, match="float64"):
        _ = Roofs(load_chip("ascend-910b2"), "float64").cube


def test_every_chip_with_a_peak_has_its_roofline(capsys) -> None:
    for name in chips():
        spec = load_chip(name)
        if spec.peak("float16") and spec.memory_bandwidth and spec.launch_device:
            show.roofline(spec, dtype="float16")
            assert f"{spec.title} in float16: memory" in capsys.readouterr().out
            plt.close("all")


def test_points_add_up_to_the_ledger(step) -> None:
    found = points(step.records)
    assert sum(point.share for point in found) == pytest.approx(1)
    assert [point.share for point in found] == sorted((point.share for point in found), reverse=True)
    table = step.table(by="bound")
    for bound, share in table.share.items():
        assert sum(point.share for point in found if point.bound == bound) == pytest.approx(share)
    assert set(table.index) <= set(BOUNDS)


def test_no_point_is_above_its_roof(step) -> None:
    roofs = Roofs(npu.runtime.devices[0].spec, "float32")
    for point in points(step.records):
        assert point.rate <= min(roofs.cube, point.intensity * roofs.memory) * (1 + 1e-9), point.name


def test_the_figure_and_its_sentence(step, capsys) -> None:
    show.roofline(npu.runtime.devices[0].spec, step, "float32", named=2)
    said = capsys.readouterr().out
    assert "ridge at 5.57 FLOP/B" in said and "Bound by:" in said and "products at" in said
    ax = plt.gca()
    assert ax.get_xscale() == ax.get_yscale() == "log" and "byte" in ax.get_xlabel()
    names = [text.get_text() for text in ax.texts]
    assert any(name.startswith("products ") for name in names) and any(name.startswith("memory 46.0") for name in names)


def test_other_chips(capsys) -> None:
    show.roofline(load_chip("ascend-910b2"), others=[load_chip("h100")])
    assert "NVIDIA H100 SXM: ridge at 295 FLOP/B." in capsys.readouterr().out


def test_what_is_not_drawn_is_told() -> None:
    roofs = Roofs(load_chip("mini"), "float32")
    said = sentence(roofs, [Point("products", 40.0, 2e11, 0.9, "cube"), Point("cat", 0.0, 0.0, 0.1, "memory")])
    assert "Bound by: cube 90.0 %, memory 10.0 % of the time." in said and "next to no time: 10.0 %." in said


def test_families() -> None:
    named = {op: family(op) for op in ("linear_backward_input", "_fused_adamw", "_fused_rms_norm_backward", "cat")}
    assert list(named.values()) == ["products", "AdamW", "norms", "cat"]
    assert family("_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"


@pytest.mark.parametrize("log", [False, True])
def test_rate_over(log: bool, capsys) -> None:
    show.rate_over([64, 128, 256], {"mine": [1e12, 3e12, 2e12]}, {"cube": 4e12}, "side n", "Rates", {128: "here"}, log)
    said = capsys.readouterr().out
    assert said == "mine: 1.00 TFLOP/s at 64, 2.00 TFLOP/s at 256; steepest fall from 128 to 256, by 33.3 %.\n"


def test_a_rate_that_only_rises(capsys) -> None:
    show.rate_over([1, 2], {"mine": [1e12, 3e12]}, {}, "rows", "Rates")
    assert capsys.readouterr().out == "mine: 1.00 TFLOP/s at 1, 3.00 TFLOP/s at 2.\n"

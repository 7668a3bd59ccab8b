"""The search: quick over 10⁵ layouts, and what it shows is the best of those that fit."""

import time

import numpy as np
import pytest

from course_lib import plan
from course_lib.chip import load_system
from course_lib.plan.__main__ import main
from course_lib.plan.layout import RULES, Layout
from course_lib.plan.search import binds, search
from course_lib.plan.step import plan as plan_step

NODE = load_system("atlas-800t-a2")
LLAMA = plan.load_model("llama-2-7b")


def test_a_hundred_thousand_layouts_of_deepseek_v3() -> None:
    """Over 10⁵ on 2,048 chips in under 10 s; counted in processor time, for the machine may be busy."""
    started = time.process_time()
    found = search(plan.load_model("deepseek-v3"), load_system("h800-cluster"), 4096, 15360, "float8_e4m3fn", copies=4)
    assert found.tried > 100_000 and time.process_time() - started < 10
    assert found.tried == len(found.steps.seconds) + sum(found.refusals.values())
    assert len(found.steps.seconds) > 50_000 and len(found) > 10_000
    assert set(found.refusals) <= set(range(1, len(RULES) + 1))
    best = found.best(1)[0]
    alone = plan_step(best.model, best.system, best.layout, 4096)
    assert alone.seconds == pytest.approx(best.seconds) and alone.fits


def test_the_order_is_by_seconds_and_nothing_shown_overflows() -> None:
    found = search(LLAMA, NODE, 4096, 64)
    seconds, held = found.steps.seconds, found.steps.held
    assert list(seconds[found.order]) == sorted(seconds[found.order])
    capacity = found.steps.chip.memory_bytes
    assert held[found.order].max() <= capacity and len(found) == int((held <= capacity).sum())
    assert found.table(3).count("\n") == 3
    assert f"{found.tried:,} layouts" in found.table(1)


def test_every_layout_that_can_be_is_there() -> None:
    """By brute force over the same degrees, one layout at a time."""
    found = search(
        LLAMA, NODE, 4096, 32, tp=(1, 2), cp=(1, 2), vpp=(1, 2), micro_batch=(1,), zero=(1,), recompute=("full",)
    )
    best = min(
        plan_step(LLAMA, NODE, one, 4096).seconds
        for one in (found.steps.layout[index] for index in range(len(found.steps.seconds)))
        if plan_step(LLAMA, NODE, one, 4096).fits
    )
    assert found.best(1)[0].seconds == pytest.approx(best)
    degrees = {(int(t), int(c), int(p), int(v), str(s)) for t, c, p, v, s in zip(*(
        getattr(found.steps.layout, name) for name in ("tp", "cp", "pp", "vpp", "schedule")))}  # fmt: skip
    assert {(1, 1, 8, 2, "Interleaved1F1B"), (2, 2, 2, 1, "InterleavedZeroBubble"), (1, 1, 1, 1, "1F1B")} <= degrees


def test_nothing_fits() -> None:
    found = search(plan.load_model("llama-3-405b"), NODE, 4096, 64)
    assert len(found) == 0 and found.best() == [] and "0 are left" in found.table()
    assert np.all(found.steps.held > found.steps.chip.memory_bytes)


def test_what_binds() -> None:
    far = plan_step(LLAMA, NODE.having(nodes=2), Layout(tp=16, global_batch=4), 4096)
    assert binds(far) == "link of TP"
    deep = plan_step(LLAMA, NODE, Layout(pp=8, global_batch=8), 4096)
    assert binds(deep) == "bubble"


# -- the command line ---------------------------------------------------------------------------------------------------


def said_of(line: str) -> str:
    """What the command prints for this line of arguments."""
    return main(line.split())


def test_the_command_plans_one_layout() -> None:
    said = said_of("llama-2-70b --system atlas-800t-a2 --chips 32 --tp 8 --pp 4 --sp --global-batch 1024 --tokens 2e12")
    step = plan_step(plan.load_model("llama-2-70b"), NODE.having(nodes=4),
                     Layout(tp=8, pp=4, sp=True, global_batch=1024), 4096)  # fmt: skip
    assert f"{step.seconds:,.3f} s, 4,194,304 tokens" in said and "TP8 PP4 ZeRO-1 SP" in said
    assert f"{step.days(2e12):,.1f} days without a failure" in said and "MWh" in said
    assert "energy of the chips                unknown" in said_of("llama-2-7b --system dgx-h100 --tokens 1e9")


def test_the_command_searches() -> None:
    said = said_of("llama-2-7b --system atlas-800t-a2 --chips 4 --search --global-batch 32")
    assert "layouts:" in said and "binds:" in said and said.count("MFU") == 10


def test_the_present_form_still_works() -> None:
    assert main(["llama-2-7b", "2048"]).startswith("Llama 2 7B, sequences of 2048 tokens")
    assert "deepseek-v3" in main([]).splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("llama-2-7b --system dgx-h100 --tp 3", "makes 6, DGX H100 node, 8 × H100 has 8"),
        ("llama-2-7b --system dgx-h100 --chips 12", "12 are not whole nodes of 8"),
        ("llama-2-7b --system nowhere", "no system named 'nowhere'"),
        ("llama-2-7b --system dgx-h100 --gemm half", "gemm is 'half'; use one of"),
        ("llama-2-7b --system dgx-h100 --pp 8 --global-batch 4", "schedule: 1F1B cannot be with pp 8"),
    ],
)
def test_what_cannot_be_is_said(arguments: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        said_of(arguments)

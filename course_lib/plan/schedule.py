"""A pipeline's bubble: closed forms for the schedules that PyTorch has. Their proof is the replay in timetable.py.

A bubble is the time in which a rank waits because the pipeline fills, drains or alternates. Two conventions are in use
and are often mixed: idle over *ideal* time m·(F + B) is (p − 1)/m for 1F1B (Narayanan et al. 2021, arXiv:2104.04473),
idle over *total* time is (p − 1)/(m + p − 1) (Huang et al. 2019, arXiv:1811.06965). `of_total` turns one into the other.

    >>> bubble("1F1B", pp=8, vpp=1, microbatches=16)  # of the ideal time: 7/16
    0.4375
    >>> print(f"{of_total(0.4375):.4f} {of_total(bubble('Interleaved1F1B', 8, 6, 16)):.4f}")  # Pangu Ultra
    0.3043 0.0680

p ranks (pp), v stages on each (vpp), m micro-batches. F, B, W: seconds of a rank for one micro-batch in all its stages,
forward, whole backward, and the part of B that makes the weights' gradients; I = B − W makes the inputs' gradients.
"""

import numpy as np

from course_lib.plan.layers import Number, exact, most

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", "DualPipe")
TWO_STAGES = ("ZBVZeroBubble", "DualPipeV")  # on each rank, placed as a V: rank r has stages r and 2p − 1 − r


def idle(
    schedule: str,
    pp: Number,
    vpp: Number,
    forward: Number = 1.0,
    backward: Number = 2.0,
    weight: Number | None = None,
    overlapped: Number | None = None,
) -> Number:
    """Seconds in which a rank waits in one step, however many micro-batches; arrays broadcast.

    ``weight`` is B/2 where not given. ``overlapped`` (F&B) is the time of a forward and a backward of one micro-batch
    when they run beside each other; F + B where not given.

    | schedule | idle | source |
    |---|---|---|
    | GPipe, 1F1B | (p − 1)(F + B) | arXiv:1811.06965, arXiv:2104.04473 |
    | Interleaved1F1B | (p − 1)(F + B)/v | arXiv:2104.04473 |
    | InterleavedZeroBubble (v = 1: ZB-H1) | (p − 1)(F + B − 2W)/v | arXiv:2401.10241; DeepSeek-V3, table 2 |
    | ZBVZeroBubble | (p − 1)·max(I, 2(I − W))/2 | the replay of PyTorch's table, where F ≤ I and W ≤ I |
    | DualPipeV | (p − 1)(F&B + B − 3W)/2 | DualPipe of 2p stages, two on each rank |
    | DualPipe | (p/2 − 1)(F&B + B − 3W) | DeepSeek-V3, table 2 (arXiv:2412.19437) |

    All assume equal stages, free messages, and as many micro-batches as `possible` asks for. The zero bubble's W fills
    what it can, not more: where W > F or W > I, (p − 1)·max(F, I)/v remains. ZB-V has no bubble by its paper's count,
    from each rank's own start to its own end, where F = I = W; here a step ends when its last rank does. DualPipeV's is
    exact for F = I, and for the rank that waits most. ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    p, v, F, B = exact(pp), exact(vpp), exact(forward), exact(backward)
    W = B / 2 if weight is None else exact(weight)
    inputs = B - W
    both = F + B if overlapped is None else exact(overlapped)
    if schedule == "DualPipe":
        return most(p / 2 - 1, 0) * (both + B - 3 * W)
    if schedule == "DualPipeV":
        return (p - 1) * (both + B - 3 * W) / 2
    if schedule == "ZBVZeroBubble":
        return (p - 1) * most(inputs, 2 * (inputs - W)) / 2
    if schedule == "InterleavedZeroBubble":
        return (p - 1) * most(F + inputs - W, most(F, inputs)) / v
    return (p - 1) * (F + B) / (v if schedule == "Interleaved1F1B" else 1)


def bubble(
    schedule: str,
    pp: Number,
    vpp: Number,
    microbatches: Number,
    forward: Number = 1.0,
    backward: Number = 2.0,
    weight: Number | None = None,
    overlapped: Number | None = None,
) -> Number:
    """`idle` as a fraction of the ideal time m·(F + B); arrays broadcast. `of_total` gives the other convention."""
    ideal = exact(microbatches) * (exact(forward) + exact(backward))
    return idle(schedule, pp, vpp, forward, backward, weight, overlapped) / ideal


def of_total(fraction: Number) -> Number:
    """A bubble that was a fraction of the ideal time, as a fraction of the total time, bubble included."""
    return fraction / (1 + fraction)


def of_ideal(fraction: Number) -> Number:
    """A bubble that was a fraction of the total time, as a fraction of the ideal time."""
    return fraction / (1 - fraction)


def possible(schedule: str, pp: Number, vpp: Number, microbatches: Number) -> bool | np.ndarray:
    """Whether PyTorch makes such a schedule and the closed form holds for it; arrays broadcast.

    1F1B and interleaved ones need m ≥ p, these also m as a multiple of its rounds of about p; V-shaped ones two stages on each rank and m ≥ 2p − 1 (ZBV) or 2p (DualPipeV); GPipe, 1F1B and DualPipe one.
    """
    p, v, m = np.asarray(pp), np.asarray(vpp), np.asarray(microbatches)
    rounds = np.maximum(m // p, 1)
    holds = {
        "GPipe": (v == 1) & (m >= 1),
        "1F1B": (v == 1) & (m >= p),
        "Interleaved1F1B": (v >= 1) & ((v == 1) | (m >= p)) & (m % rounds == 0),
        "InterleavedZeroBubble": (v >= 1) & (m >= p) & (m % rounds == 0),
        "ZBVZeroBubble": (v == 2) & (m >= 2 * p - 1),
        "DualPipeV": (v == 2) & (m >= 2 * p),
        "DualPipe": (v == 1) & (p % 2 == 0) & (m % 2 == 0) & (m >= 2 * p),
    }[schedule]
    return bool(holds) if holds.ndim == 0 else holds

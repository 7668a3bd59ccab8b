"""Streams and events of torch.npu: asynchrony in emulated time."""

import pytest
import torch

from course_lib import npu
from course_lib.npu import runtime

US = 10**6  # picoseconds


def now() -> int:
    return runtime.host.now


def ready() -> int:
    return runtime.devices[0].current.ready


@pytest.fixture
def x() -> torch.Tensor:
    tensor = torch.ones(512, 512, device="npu")
    torch.npu.synchronize()
    return tensor


def test_an_operator_returns_before_it_is_done(x) -> None:
    before = now()
    x @ x
    assert now() - before == 700_000, "the host pays the launch"
    assert ready() - now() > 100 * US, "the device is still at it"


@pytest.mark.parametrize(
    "wait",
    [
        lambda y: torch.npu.synchronize(), lambda y: torch.npu.synchronize("npu:0"), lambda y: y.sum().item(), lambda y: y.cpu(), lambda y: y.tolist(),
        lambda y: torch.npu.current_stream().synchronize(), lambda y: torch.empty(512, 512).copy_(y), lambda y: y.nonzero(), lambda y: y[y > 0],
        lambda y: print(y), lambda y: bool(y[0, 0]), lambda y: y.to("cpu", torch.float64), lambda y: torch.equal(y, y),
    ],
)  # fmt: skip
def test_what_waits(x, wait) -> None:
    done = (x @ x, ready())[1]
    wait(x @ x)
    assert now() >= done


@pytest.mark.parametrize(
    "go_on",
    [
        lambda y: y + 1, lambda y: y.view(-1), lambda y: y.to("cpu", non_blocking=True), lambda y: y.copy_(torch.ones(512, 512), non_blocking=True),
        lambda y: y.shape, lambda y: y.to(torch.float16), lambda y: torch.npu.current_stream().record_event(),
    ],
)  # fmt: skip
def test_what_does_not_wait(x, go_on) -> None:
    y = x @ x
    done = ready()
    go_on(y)
    assert now() < done


def test_a_copy_to_the_device_waits_for_what_was_before(x) -> None:
    x @ x
    done = ready()
    torch.ones(4).to("npu")
    assert now() > done


def test_views_and_empties_are_free(x) -> None:
    y = x.view(-1)[3:].unsqueeze(0).expand(2, -1)
    before = now(), ready()
    y.t(), y.detach(), torch.empty_like(x), x.unbind(), x.split(2), torch.empty(100, device="npu"), x.reshape(-1)
    assert (now(), ready()) == before


def test_events_measure_the_device(x) -> None:
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    with npu.ledger() as ledger:
        x @ x
    end.record()
    end.synchronize()
    ran = ledger.records[0]
    assert start.elapsed_time(end) == (ran.start + ran.cost.ps - ran.launched + 700_000) / 10**9
    assert now() == ran.start + ran.cost.ps


def test_elapsed_time_refuses_what_it_cannot_know(x) -> None:
    plain, timed, late = torch.npu.Event(), torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        plain.elapsed_time(timed)
    timed.record()
    with pytest.raises(RuntimeError, match="call event.record"):
        timed.elapsed_time(late)
    x @ x
    late.record()
    with pytest.raises(RuntimeError, match="call event.synchronize"):
        timed.elapsed_time(late)
    late.synchronize()
    assert timed.elapsed_time(late) > 0 and late.elapsed_time(timed) < 0
    with pytest.raises(NotImplementedError, match="interprocess"):
        torch.npu.Event(interprocess=True)


def test_asking_in_a_loop_ends(x) -> None:
    x @ x
    event = torch.npu.current_stream().record_event()
    assert not event.query() and not torch.npu.current_stream().query()
    while not event.query():
        pass
    assert torch.npu.current_stream().query()


def elapsed(program) -> int:
    torch.npu.synchronize()
    before = now()
    program()
    torch.npu.synchronize()
    return now() - before


def test_two_streams_overlap(x) -> None:
    side = torch.npu.Stream()

    def on(stream) -> None:
        x @ x
        with torch.npu.stream(stream):
            x @ x

    alone = elapsed(lambda: x @ x)
    assert elapsed(lambda: on(None)) > 1.9 * alone
    assert elapsed(lambda: on(side)) < 1.1 * alone


def test_waiting_for_an_event_or_a_stream_puts_work_in_order(x) -> None:
    side = torch.npu.Stream()

    def by_event() -> None:
        x @ x
        side.wait_event(torch.npu.current_stream().record_event())
        with torch.npu.stream(side):
            x @ x

    def by_stream() -> None:
        x @ x
        side.wait_stream(torch.npu.current_stream())
        with side:
            x @ x

    alone = elapsed(lambda: x @ x)
    assert elapsed(by_event) > 1.9 * alone and elapsed(by_stream) > 1.9 * alone


def test_an_event_waits_only_for_what_was_before_it(x) -> None:
    event = torch.npu.current_stream().record_event()
    x @ x
    event.synchronize()
    assert now() < ready()


def test_which_stream_is_current() -> None:
    first, side = torch.npu.current_stream(), torch.npu.Stream()
    assert first == torch.npu.default_stream() != side and len({first, torch.npu.current_stream(), side}) == 2
    with torch.npu.stream(side):
        assert torch.npu.current_stream() == side
        with torch.npu.stream(None):
            assert torch.npu.current_stream() == side
    assert torch.npu.current_stream() == first
    torch.npu.set_stream(side)
    assert torch.npu.current_stream() == side and side.stream_id != first.stream_id
    with pytest.raises(KeyError), side:
        raise KeyError
    assert torch.npu.current_stream() == side


def test_streams_belong_to_devices() -> None:
    npu.use("mini", count=2)
    other = torch.npu.Stream(device=1)
    with torch.npu.stream(other):
        assert torch.npu.current_device() == 1 and torch.ones(1, device="npu").device.index == 1
    assert torch.npu.current_device() == 0 and other.device == torch.device("npu:1")


def test_devices_run_side_by_side_and_copies_join_them() -> None:
    npu.use("mini", count=2)
    x, y = torch.ones(512, 512, device="npu:0"), torch.ones(512, 512, device="npu:1")
    torch.npu.synchronize(0), torch.npu.synchronize(1)
    before = now()
    x @ x, y @ y
    first, second = (d.current.ready for d in runtime.devices)
    assert abs(first - second) == 700_000 and second - before < 1.1 * (first - before)
    x.to("npu:1")
    assert runtime.devices[1].current.ready > runtime.devices[0].current.ready > first

"""Host clock and streams without tensors: what waits for what."""

import random

from course_lib.npu.clock import Host, Timeline


def test_launching_costs_the_host_and_the_device_follows() -> None:
    host = Host()
    stream = Timeline(0, host, launch_ps=10)
    assert stream.launch(100) == 10 and (host.now, stream.ready) == (10, 110)
    assert stream.launch(100) == 110 and (host.now, stream.ready) == (20, 210), "queued behind the first"
    stream.wait()
    assert host.now == 210
    assert stream.launch(5) == 220, "the device was idle: it starts when the host has launched"


def test_streams_overlap_but_the_host_launches_one_by_one() -> None:
    host = Host()
    a, b = Timeline(0, host, 10), Timeline(1, host, 10)
    a.launch(100), b.launch(100)
    assert (a.ready, b.ready) == (110, 120)


def test_the_host_never_goes_back() -> None:
    host = Host()
    host.wait_until(50)
    host.wait_until(20)
    assert host.now == 50


def test_any_program_keeps_order() -> None:
    rng, host = random.Random(0), Host()
    streams = [Timeline(i, host, 7) for i in range(3)]
    done = [0, 0, 0]
    for _ in range(500):
        i, work, before = rng.randrange(3), rng.randrange(100), host.now
        if rng.random() < 0.1:
            streams[i].wait()
            assert host.now >= streams[i].ready
        start = streams[i].launch(work)
        assert start >= done[i] and start >= host.now >= before + 7
        done[i] = start + work
        assert streams[i].ready == done[i]

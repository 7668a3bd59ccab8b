"""Streams and events made by their names in ``torch`` itself have emulated time."""

import pytest
import torch

from course_lib import npu

WAYS = {"text": lambda: torch.Stream("npu"), "device": lambda: torch.Stream(torch.device("npu:0")), "named": lambda: torch.Stream(device="npu"), "alone": lambda: torch.Stream()}


@pytest.mark.parametrize("way", WAYS)
def test_a_stream(way):
    stream = WAYS[way]()
    assert isinstance(stream, torch.Stream) and type(stream) is torch.npu.Stream
    start, end = (torch.Event("npu", enable_timing=True) for _ in range(2))
    with stream:
        start.record()
        assert torch.npu.current_stream() == stream
        x = torch.ones(64, 64, device="npu")
        x @ x
        end.record()
    assert not stream.query()
    end.synchronize()
    assert start.elapsed_time(end) > 0 and stream.query()
    torch.npu.current_stream().wait_stream(stream)
    stream.record_event().synchronize()


def test_the_same_stream_again():
    stream = torch.Stream("npu")
    assert torch.Stream(stream_id=stream.stream_id, device_index=0, device_type=stream.device_type) == stream


def test_a_device_that_is_not_there():
    npu.use("mini", count=2)
    assert torch.Stream("npu:1").device_index == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        torch.Stream("npu:2")
    assert not isinstance(1, torch.Stream) and issubclass(torch.npu.Event, torch.Event)

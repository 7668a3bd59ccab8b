"""``torch.npu.Stream`` and ``torch.npu.Event``, with the semantics of an asynchronous device.

To PyTorch they are a ``torch.Stream`` and a ``torch.Event`` (``record_stream`` and ``isinstance`` take them), but every
method is ours: PyTorch's own would ask the device's C++ guard, which knows nothing of emulated time.
"""

from typing import Any

import torch

from course_lib.npu import runtime
from course_lib.npu.clock import PS_PER_MS, Timeline

PS_PER_US = PS_PER_MS // 1000
OTHER_PROCESSES = "emulated devices do not share events between processes"


def _index(device: Any) -> int:
    """A device index from None, an int, a string or a torch.device; RuntimeError if there is no such device."""
    if device is None or isinstance(device, int):
        return runtime.device(device).index
    device = torch.device(device)
    if device.type != "npu":
        raise ValueError(f"expected an npu device, got {device}")
    return runtime.device(device.index).index


_NPU = int(torch._C._autograd.DeviceType.PrivateUse1)


class Stream(torch.Stream):
    """A queue of work on one device; work on different streams may run at the same emulated time.

    ``priority`` is kept and changes nothing: emulated streams do not compete for the cores.
    """

    def __new__(cls, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **place: int) -> "Stream":
        """A new stream, or, with ``stream_id``, one that there is (``device_index`` and ``device_type`` then say where)."""
        index = _index(place.get("device_index", device))
        streams = runtime.devices[index].streams
        timeline = runtime.devices[index].new_stream() if stream_id is None else streams[stream_id]
        self = super().__new__(cls, stream_id=timeline.id, device_index=index, device_type=_NPU)
        self.priority, self._timeline, self._outer = priority, timeline, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def npu_stream(self) -> int:
        """A number in place of the address that a real one has."""
        return self._timeline.id

    def is_capturing(self) -> bool:
        return False

    def set_data_preprocess_stream(self, is_data_preprocess_stream: bool = False) -> None:
        """Accepted: it tells a real driver how to schedule, and changes no result."""

    def synchronize(self) -> None:
        """The host waits until all work on this stream is done."""
        self._timeline.wait()

    def query(self) -> bool:
        """Is all work done? Asking costs the host a launch, so that a polling loop ends."""
        self._timeline.host.now += self._timeline.launch_ps
        return self._timeline.host.now >= self._timeline.ready

    def wait_event(self, event: "Event") -> None:
        """Work launched on this stream from now on starts after ``event``."""
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        """Work launched on this stream from now on starts after what ``stream`` has been given so far."""
        self._timeline.ready = max(self._timeline.ready, stream._timeline.ready)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self._timeline is other._timeline

    def __hash__(self) -> int:
        return hash(id(self._timeline))

    def __repr__(self) -> str:
        return f"torch.npu.Stream(device=npu:{self.device_index}, stream_id={self.stream_id})"

    def __enter__(self) -> "Stream":
        device = runtime.devices[self.device_index]
        self._outer.append((runtime.current, device.current))
        runtime.current, device.current = self.device_index, self._timeline
        return self

    def __exit__(self, *exc: object) -> None:
        runtime.current, runtime.devices[self.device_index].current = self._outer.pop()


class SyncLaunchStream(Stream):
    """A stream past the host's task queue. The emulated host has none, so it is a stream like others."""


class Event(torch.Event):
    """A marker on a stream. With ``enable_timing`` it measures emulated time."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> "Event":
        if interprocess:
            raise NotImplementedError(f"Event(interprocess=True): {OTHER_PROCESSES}")
        self = super().__new__(cls, "npu", enable_timing=enable_timing, blocking=blocking)
        self.enable_timing, self._at = enable_timing, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def ipc_handle(self) -> None:
        raise NotImplementedError(f"Event.ipc_handle(): {OTHER_PROCESSES}")

    from_ipc_handle = ipc_handle

    def recorded_time(self) -> int:
        """When the marker was reached, in microseconds of emulated time."""
        if not self.enable_timing or self._at is None:
            raise RuntimeError("recorded_time() needs an event made with Event(enable_timing=True) and recorded")
        return self._at // PS_PER_US

    def record(self, stream: Stream | None = None) -> None:
        """Put the marker behind the work that ``stream`` (the current one) has been given."""
        self._at = (stream or current_stream())._timeline.mark()

    def wait(self, stream: Stream | None = None) -> None:
        """Work launched on ``stream`` from now on starts after this marker."""
        timeline = (stream or current_stream())._timeline
        timeline.ready = max(timeline.ready, self._at or 0)

    def query(self) -> bool:
        """Has the marker been reached? Asking costs the host a launch, so that a polling loop ends."""
        device = runtime.devices[runtime.current]
        device.host.now += device.launch_ps
        return self._at is None or device.host.now >= self._at

    def synchronize(self) -> None:
        """The host waits until the marker is reached."""
        runtime.host.wait_until(self._at or 0)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of emulated time from this marker to ``end``."""
        for event in (self, end):
            if not event.enable_timing:
                raise RuntimeError("elapsed_time() needs both events made with Event(enable_timing=True)")
            if event._at is None:
                raise RuntimeError("elapsed_time() needs both events recorded: call event.record() first")
            if runtime.host.now < event._at:
                raise RuntimeError("elapsed_time() on an event that the device has not reached: call event.synchronize() or torch.npu.synchronize() first")
        return (end._at - self._at) / PS_PER_MS

    def __repr__(self) -> str:
        return f"torch.npu.Event(enable_timing={self.enable_timing}, recorded={self._at is not None})"


def current_stream(device: Any = None) -> Stream:
    index = _index(device)
    return Stream(index, stream_id=runtime.devices[index].current.id)


def default_stream(device: Any = None) -> Stream:
    index = _index(device)
    return Stream(index, stream_id=runtime.devices[index].default.id)


def set_stream(stream: Stream) -> None:
    runtime.current = stream.device_index
    runtime.devices[stream.device_index].current = stream._timeline


class stream:
    """``with torch.npu.stream(s):`` work inside goes to ``s``; None changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self.stream is not None:
            self.stream.__exit__(*exc)

"""Send and receive: two ranks agree on when a message travels, without holding up the host that sends it.

A message starts when sender and receiver are both there and the one before it, on the same way, is through. Each says when it
is there as soon as it is; the other's time is read when somebody needs to know (``wait()``, the next message, a
synchronization). So a rank may send to its neighbour before it receives from it, as pipelines and rings do.
"""

from typing import Any

import torch

from course_lib.npu import links, runtime
from course_lib.npu.hccl import Call, CollectiveMismatch, Communicator, Work, _admit, _slower, _state, finish, stream_of
from course_lib.npu.transport import fill

NUMBERS = 6 + 2 * links.MOST  # what the two tell each other: the call, when they are there, what is under way
DATA, FROM_SENDER, FROM_RECEIVER = range(3)  # kinds of tag


class Message(Work):
    """A send or receive whose end is known once the other side has been heard."""

    def __init__(self, comm: Communicator, tensor: torch.Tensor, peer: int, tag: int, sends: bool) -> None:
        super().__init__(0, [tensor])
        self.comm, self.tensor, self.peer, self.sends = comm, tensor, peer, sends
        self.way = (comm.rank, peer) if sends else (peer, comm.rank)
        device = self.device = runtime.devices[tensor._held.index]
        device.host.now += device.launch_ps
        self.issued = max(device.host.now, device.current.ready)
        self.known, inner = False, tensor._inner
        self.call = Call("send", inner.numel() * inner.element_size(), inner.numel(), inner.dtype)
        self.handles: list[Any] = []
        if comm.transport is not None:
            self._post(inner, tag)
        device.messages.setdefault((comm.name, *self.way), []).append(self)

    def _post(self, inner: torch.Tensor, tag: int) -> None:
        """Tell the other side, and let the numbers go on their way."""
        transport, mine, theirs = self.comm.transport, FROM_SENDER, FROM_RECEIVER
        if not self.sends:
            mine, theirs = theirs, mine
        said = torch.tensor([*self.call.numbers(), *_state(self.device, self.issued)], dtype=torch.int64)
        self.heard = torch.empty(NUMBERS, dtype=torch.int64)
        self.handles.append(transport.send(said, self.peer, 3 * tag + mine))
        self.hearing = transport.receive(self.heard, self.peer, 3 * tag + theirs)
        self.row = None
        if inner.device.type == "meta" or not inner.numel():
            return
        if self.sends:
            self.handles.append(transport.send(inner, self.peer, 3 * tag + DATA))
        else:
            self.row = torch.empty(self.call.nbytes, dtype=torch.uint8)
            self.handles.append(transport.receive(self.row, self.peer, 3 * tag + DATA))

    def resolve(self) -> None:
        """Learn when this message travels; those before it on the same way come first."""
        queue = self.device.messages[(self.comm.name, *self.way)]
        while not self.known:
            queue.pop(0)._settle()

    def _settle(self) -> None:
        self.known, states = True, [_state(self.device, self.issued)]
        if self.comm.transport is not None:
            self.hearing[0].wait()
            theirs = self.heard.tolist()
            if theirs[:5] != self.call.numbers():
                me, other = self.comm.ranks[self.comm.rank], self.comm.ranks[self.peer]
                verbs = ("sends", "receives") if self.sends else ("receives", "sends")
                raise CollectiveMismatch(f"rank {me} {verbs[0]} {Call.read(self.call.numbers())} while rank {other} {verbs[1]} {Call.read(theirs[:5])}: a message needs the same shape and dtype on both sides")
            states.append(theirs[5:])
        stream = stream_of(self.device, f"{self.comm.name} {self.way[0]}→{self.way[1]}", buffer=False)
        price = self.comm.price("send", self.call.nbytes, tuple(self.comm.ranks[r] for r in self.way))
        start = max(stream.ready, *(s[0] for s in states)) if len(states) > 1 else max(stream.ready, self.issued)
        end = start + price.ps + _slower(states, start, price)
        if self.sends:
            _admit(self.device, start, price)
        for handle, _ in self.handles:
            handle.wait()
        if self.comm.transport is not None and self.row is not None:
            fill(self.tensor._inner, self.row)
        finish(self.device, stream, "send" if self.sends else "receive", [self.tensor], (self.issued, start, end), price, self)

    def wait(self, timeout: Any = None) -> bool:
        self.resolve()
        self.tensor = None
        return super().wait()

    def is_completed(self) -> bool:
        self.resolve()
        return super().is_completed()


def send(comm: Communicator, tensor: torch.Tensor, to: int, tag: int) -> Message:
    return Message(comm, tensor, to, tag, True)


def receive(comm: Communicator, tensor: torch.Tensor, source: int, tag: int) -> Message:
    return Message(comm, tensor, source, tag, False)

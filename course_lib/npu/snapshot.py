"""The allocator's state and history, in the form that PyTorch's memory viewer reads (pytorch.org/memory_viz).

``memory_snapshot()`` lists segments and the blocks that they are cut into: fragmentation is what is "inactive" between
blocks that live. ``_record_memory_history()`` makes the allocator keep what it does, with the Python stack and the
emulated time of each step.
"""

import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from course_lib.npu.memory import Block, CachingAllocator, Segment

_HERE = __name__.rpartition(".")[0]  # frames of the emulation itself are left out


class History:
    """What an allocator did: "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free" and "oom"."""

    def __init__(self, clock: Callable[[], int], stacks: bool, max_entries: int) -> None:
        self.clock, self.stacks = clock, stacks
        self.events: deque[dict] = deque(maxlen=max_entries)
        self.frames: dict[int, list[dict]] = {}  # by address of a block in use: where it was allocated

    def note(self, action: str, address: int, size: int) -> None:
        frames = stack() if self.stacks else []
        if action == "alloc":
            self.frames[address] = frames
        elif action == "free_completed":
            self.frames.pop(address, None)
        self.events.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.clock(), "frames": frames})


def stack() -> list[dict]:
    """The program's Python stack, innermost first."""
    out, frame = [], sys._getframe(2)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_HERE):
            out.append({"filename": frame.f_code.co_filename, "line": frame.f_lineno, "name": frame.f_code.co_name})
        frame = frame.f_back
    return out


def segments(memory: "CachingAllocator") -> list[dict]:
    """Each segment, by address, with the blocks that it is cut into, also by address."""
    memory.settle()
    frames = memory.history.frames if memory.history else {}
    return [_segment(memory.index, segment, frames) for _, segment in sorted(memory.segments.items())]


def _segment(index: int, segment: "Segment", frames: dict[int, list[dict]]) -> dict:
    blocks = [_block(block, frames) for block in segment.blocks()]
    active = [block for block in blocks if block["state"] == "active_allocated"]
    size = sum(block["size"] for block in active)
    return {
        "device": index, "address": segment.address, "total_size": segment.size, "allocated_size": size,
        "active_size": size, "requested_size": sum(block["requested_size"] for block in active), "stream": 0,
        "segment_type": segment.pool, "segment_pool_id": (0, 0), "is_expandable": False, "frames": [], "blocks": blocks,
    }  # fmt: skip


def _block(block: "Block", frames: dict[int, list[dict]]) -> dict:
    state = "active_allocated" if block.used else "inactive"
    requested = block.requested if block.used else 0
    return {"address": block.address, "size": block.size, "requested_size": requested, "state": state, "frames": frames.get(block.address, [])}

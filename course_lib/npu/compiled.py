"""``torch.compile`` with a Python backend such as "eager": Dynamo traces the program and leaves the emulation alone.

The device is Python too, so Dynamo would try to trace what happens inside an operator. It is told to skip these
packages, but only once a program asks for ``torch.compile``: importing Dynamo takes seconds.
"""

import functools
from typing import Any

import torch

_compile = torch.compile


@functools.cache
def skip_us() -> None:
    from torch._dynamo import trace_rules

    for package in ("course_lib.npu", "course_lib.chip"):
        trace_rules.add(package)


@functools.wraps(_compile)
def compile(*args: Any, **kwargs: Any) -> Any:
    skip_us()
    return _compile(*args, **kwargs)


def attach() -> None:
    torch.compile = compile

"""Errors in backward come to the caller as they are, and the process goes on."""

import _thread
import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from course_lib import npu


class Mine(Exception):
    pass


def fail(*_: object) -> None:
    raise Mine


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise Mine


def in_function(x: torch.Tensor) -> torch.Tensor:
    return FailsInBackward.apply(x)


def in_leaf_hook(x: torch.Tensor) -> torch.Tensor:
    x.register_hook(fail)
    return x * 2


def in_hook(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(fail)
    return y


def in_node_hook(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.grad_fn.register_hook(fail)
    return y


def in_node_prehook(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.grad_fn.register_prehook(fail)
    return y


def in_accumulation_hook(x: torch.Tensor) -> torch.Tensor:
    x.register_post_accumulate_grad_hook(fail)
    return x * 2


def in_module_hook(x: torch.Tensor) -> torch.Tensor:
    module = nn.Identity()
    module.register_full_backward_hook(fail)
    return module(x) * 2


def in_unpacking(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        return x * x  # its own result, saved through such a hook, would be a cycle


def in_recomputation(reentrant: bool):
    def program(x: torch.Tensor) -> torch.Tensor:
        calls = []

        def block(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return fail() if len(calls) == 2 else x.exp().exp()

        return checkpoint(block, x, use_reentrant=reentrant)

    return program


PLACES = [
    in_function, in_leaf_hook, in_hook, in_node_hook, in_node_prehook, in_accumulation_hook, in_module_hook, in_unpacking,
    in_recomputation(True), in_recomputation(False),
]  # fmt: skip


def works() -> bool:
    x = torch.ones(2, device="npu", requires_grad=True)
    (x * 3).sum().backward()
    return x.grad.tolist() == [3, 3]


@pytest.mark.parametrize("program", PLACES)
def test_an_error_of_the_user(program) -> None:
    x = torch.ones(2, device="npu", requires_grad=True)
    with pytest.raises(Mine):
        program(x).sum().backward()
    assert works()


class Operator(torch.autograd.Function):
    """Backward runs whatever operator it was given."""

    @staticmethod
    def forward(ctx, x, operator):
        ctx.operator = operator
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.operator(grad), None


WRONG = [
    (lambda g: g @ torch.ones(7, 7, device="npu"), RuntimeError, "cannot be multiplied"),
    (lambda g: g + torch.ones(2, 2), RuntimeError, "same device"),
    (lambda g: torch.ones(2**30, device="npu"), torch.OutOfMemoryError, "NPU out of memory"),
    (lambda g: torch.empty(2**50, device="npu"), torch.OutOfMemoryError, "Tried to allocate 4194304.00 GiB"),
]


@pytest.mark.parametrize("operator, error, words", WRONG)
@pytest.mark.parametrize("as_hook", [False, True])
def test_an_error_of_the_device(operator, error, words, as_hook) -> None:
    x = torch.ones(2, 2, device="npu", requires_grad=True)
    y = x * 2 if as_hook else Operator.apply(x, operator)
    if as_hook:
        y.register_hook(operator)
    with pytest.raises(error, match=words):
        y.sum().backward()
    assert works()


def test_out_of_memory_in_a_modules_backward_and_then_smaller() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6)]).to("npu")

    gc.collect()
    before = torch.npu.memory_allocated()

    def forward(rows: int) -> torch.Tensor:
        return model(torch.ones(rows, 512, device="npu")).sum()

    loss = forward(1000)
    torch.npu.empty_cache()
    torch.npu.set_per_process_memory_fraction(torch.npu.memory_reserved() / torch.npu.mem_get_info()[1])
    try:
        loss.backward()
        pytest.fail("it fitted")
    except torch.OutOfMemoryError:
        pass
    del loss
    model.zero_grad()
    assert torch.npu.memory_allocated() == before, "something of the failed step lives on"
    forward(10).backward()
    assert model[0][0].weight.grad is not None


def test_backward_inside_backward() -> None:
    def inner(grad: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = torch.ones(2, 2, device="npu", requires_grad=True)
            try:
                in_hook(x).sum().backward()
            except Mine:
                return grad * 5

    x = torch.ones(2, 2, device="npu", requires_grad=True)
    Operator.apply(x, inner).sum().backward()
    assert x.grad.unique().tolist() == [5]


def test_on_another_device() -> None:
    npu.use("mini", count=2)
    model = nn.Linear(2, 2).to("npu:1")
    model(torch.ones(1, 2, device="npu:1")).sum().backward()
    assert model.weight.grad.device == torch.device("npu:1")
    with pytest.raises(Mine):
        in_hook(torch.ones(1, device="npu:1", requires_grad=True)).sum().backward()


def test_threads_do_not_take_each_others_errors() -> None:
    swapped = []

    def work(name: str) -> None:
        def hook(grad: torch.Tensor) -> None:
            raise Mine(name)

        for _ in range(20):
            y = torch.ones(4, device="npu", requires_grad=True) * 2
            y.register_hook(hook)
            try:
                y.sum().backward()
                swapped.append("none")
            except Mine as error:
                swapped.extend([str(error)] * (str(error) != name))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not swapped


def test_ctrl_c_waits_for_the_engine() -> None:
    x = torch.ones(2, device="npu", requires_grad=True)
    seen = []
    x.register_hook(lambda grad: _thread.interrupt_main())
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with pytest.raises(KeyboardInterrupt):
        (x * 2).sum().backward()
    assert seen, "backward was not finished"
    assert works()


def test_a_keyboard_interrupt_of_a_hook() -> None:
    x = torch.ones(2, device="npu", requires_grad=True)

    def hook(grad: torch.Tensor) -> None:
        raise KeyboardInterrupt

    x.register_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        (x * 2).sum().backward()
    assert works()


def test_an_uncaught_error_ends_the_process_as_python_does() -> None:
    script = (
        "import torch, course_lib.npu\n"
        "x = torch.ones(2, 2, device='npu', requires_grad=True)\n"
        "x.register_hook(lambda g: torch.ones(2**30, device='npu'))\n"
        "(x * 2).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("torch.OutOfMemoryError: NPU out of memory. Tried to allocate 4.00 GiB")

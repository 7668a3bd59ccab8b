"""How fast the emulation is on this machine: ``make bench``. Figures, no test: machines differ and are noisy.

Each comparison is made in pairs in one process, the two sides in turn, and quoted as the median of the ratios.
Where the time of the device goes, ``where_it_goes`` measures by stopwatches around the parts of its code.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch

from course_lib import npu
from course_lib.llm.config import Config, preset
from course_lib.llm.model import Transformer
from course_lib.npu import linear, memory, price, runtime, tensor, transfer

IMPORT = "import json,time; a=time.perf_counter(); import torch; b=time.perf_counter(); import course_lib.npu; print(json.dumps([b-a, time.perf_counter()-b]))"


def import_times(runs: int = 5) -> tuple[float, float]:
    """Median seconds of (import torch, what import course_lib.npu adds), each in a fresh process."""
    times = [json.loads(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout) for _ in range(runs + 1)]
    torch_s, added_s = zip(*times[1:])
    return statistics.median(torch_s), statistics.median(added_s)


def training_step(name: str, device: str, batch: int = 8) -> Callable[[], None]:
    """One step of preset ``name`` on ``device``: forward, backward, clipping, fused AdamW."""
    config = preset(name, vocab_size=512)
    model = Transformer(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(512, (batch, config.context), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        model(tokens, tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.npu.synchronize()
            torch.npu.memory_allocated()  # the allocator's work for this step, which it would put off, belongs to it

    return step


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step_ratio(name: str, pairs: int) -> tuple[float, float, float, int]:
    """Medians: step on npu with an open ledger over step on cpu; seconds of each; operators of a step."""
    on_cpu, on_npu = training_step(name, "cpu"), training_step(name, "npu")
    rows = []
    for pair in range(pairs + 2):
        with npu.ledger() as ledger:
            n = seconds(on_npu)
        rows.append((n / (c := seconds(on_cpu)), c, n))
    return *(statistics.median(column) for column in zip(*rows[2:])), len(ledger.records)


def operator_overhead(calls: int = 2000, pairs: int = 7) -> tuple[float, float]:
    """Median microseconds of adding two 8 × 8 tensors: on cpu, on npu with an open ledger."""
    tensors = {device: torch.ones(8, 8, device=device) for device in ("cpu", "npu")}

    def loop(device: str) -> None:
        x = tensors[device]
        for _ in range(calls):
            x + x
        if device == "npu":
            torch.npu.memory_allocated()

    cpu, emulated = [], []
    for _ in range(pairs):
        cpu.append(seconds(lambda: loop("cpu")))
        with npu.ledger():
            emulated.append(seconds(lambda: loop("npu")))
    return tuple(1e6 * statistics.median(column) / calls for column in (cpu, emulated))


class Bare(torch.Tensor):
    """The least that a device in Python can do: compute on the host's tensor and wrap the result."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None) -> torch.Tensor:
        return Bare.around(func._op(*[a._inner for a in args]))

    @staticmethod
    def around(inner: torch.Tensor) -> "Bare":
        out = torch.Tensor._make_wrapper_subclass(Bare, inner.shape, inner.stride(), dtype=inner.dtype, device="npu:0")
        out._inner = inner
        return out


def bare_overhead(calls: int = 2000, runs: int = 7) -> float:
    """Median microseconds of adding two 8 × 8 tensors in a bare wrapper: PyTorch's own share."""
    x = Bare.around(torch.ones(8, 8))
    return 1e6 * statistics.median(seconds(lambda: [x + x for _ in range(calls)]) for _ in range(runs)) / calls


class Stopwatches:
    """Time spent in functions of the device, each without those that it calls and that have a stopwatch too."""

    NUMBERS = "numbers: PyTorch's kernels, on the host"
    VIEWS = "views on the host"
    REST = "the dispatch itself"
    PARTS = {
        "arguments: host tensors for device tensors": [(tensor, "_unwrap"), (tensor, "_unwrap_kwargs"), (tensor, "_one_device")],
        NUMBERS: [(tensor, "_compute"), (linear, "gradients")],
        "memory: a block for each new storage, and back": [(runtime, "hold"), (runtime, "_release"), (memory.CachingAllocator, "settle")],
        "results: wrapper objects": [(tensor, "_view"), (tensor, "_wrap_result")],
        "price: looking up what the operator costs": [(tensor, "price"), (linear, "price_of")],
        "clock": [(tensor, "charge"), (linear, "charge"), (transfer, "charge")],
        "ledger: rows, phase and module": [(npu.Ledger, "record"), (npu.Ledger, "memory_changed")],
    }

    def __enter__(self) -> "Stopwatches":
        self.seconds, self.calls, self.inside = Counter(), Counter(), [0.0]
        self.before = [(owner, name, getattr(owner, name)) for functions in self.PARTS.values() for owner, name in functions]
        for part, functions in self.PARTS.items():
            for owner, name in functions:
                setattr(owner, name, self.watched(part, getattr(owner, name)))
        self.views = [(info, info.kernel) for info in tensor._infos.values() if info.handler is tensor.look]
        for info, kernel in self.views:
            info.kernel = self.watched(self.VIEWS, kernel)
        self.dispatch = tensor.NpuTensor.__dict__["__torch_dispatch__"]
        tensor.NpuTensor.__torch_dispatch__ = classmethod(self.watched(self.REST, self.dispatch.__func__))
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, function in self.before:
            setattr(owner, name, function)
        for info, kernel in self.views:
            info.kernel = kernel
        tensor.NpuTensor.__torch_dispatch__ = self.dispatch

    def watched(self, part: str, function: Callable) -> Callable:
        clock = time.perf_counter

        def call(*args: object, **kwargs: object) -> object:
            self.inside.append(0.0)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - start
                self.seconds[part] += took - self.inside.pop()
                self.inside[-1] += took
                self.calls[part] += 1

        return call


def where_it_goes(name: str, steps: int = 10) -> None:
    """Print the parts of a training step on npu. The stopwatches cost time themselves, so the sum is above the plain step's."""
    step = training_step(name, "npu")
    step()
    with Stopwatches() as watches, npu.ledger():
        whole = sum(seconds(step) for _ in range(steps))
        empty, calls = watches.watched("empty", lambda: None), sum(watches.calls.values())
        each = seconds(lambda: [empty() for _ in range(20000)]) / 20000
    dispatches = watches.calls[watches.REST] / steps
    bare = bare_overhead()
    print(f"where a step of {name} goes: {dispatches:.0f} dispatches, {1e3 * whole / steps:.1f} ms; a stopwatch costs {1e6 * each:.1f} µs, {1e3 * each * calls / steps:.1f} ms in all")
    del watches.seconds["empty"]
    for part, took in watches.seconds.most_common():
        print(f"  {1e3 * took / steps:7.2f} ms  {1e6 * took / steps / dispatches:6.1f} µs a dispatch  {part}")
    outside = whole - sum(watches.seconds.values())
    print(f"  {1e3 * outside / steps:7.2f} ms  {1e6 * outside / steps / dispatches:6.1f} µs a dispatch  outside the device: PyTorch's modules, autograd and its way into Python ({bare:.1f} µs for a bare wrapper in a hot loop)")


def shape_only_step() -> tuple[float, float, float]:
    """Host seconds of one training step of a Llama-like model without numbers; parameters in billions; peak memory in GB."""
    npu.use("ascend-910b2", numerics=False)
    memory = runtime.devices[0].memory
    memory.capacity = memory.limit = 2**42  # a chip that is large enough
    config = Config(vocab_size=32000, context=4096, width=8192, layers=80, heads=64, kv_heads=8, feed_forward=28672, tied=False)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(1, config.context, dtype=torch.long, device="npu")

    def step() -> None:
        with npu.ledger():
            model(tokens, tokens).backward()
            optimizer.step()

    return seconds(step), model.num_parameters() / 1e9, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    torch.set_num_threads(1)
    npu.use("ascend-910b2")
    torch_s, added_s = import_times()
    print(f"import course_lib.npu adds {added_s:.2f} s to the {torch_s:.2f} s of import torch (to reach: 0.5 s)")
    for name, pairs, goal in (("tiny", 25, "1.10"), ("small", 7, "1.05")):
        ratio, cpu, emulated, operators = step_ratio(name, pairs)
        print(f"training step of {name}: {1e3 * emulated:.1f} ms on npu with ledger, {1e3 * cpu:.1f} ms on cpu, median ratio {ratio:.2f} (to reach: {goal}); {operators} operators")
    cpu_us, npu_us = operator_overhead()
    print(f"smallest operator: {npu_us:.1f} µs on npu with ledger, {cpu_us:.1f} µs on cpu (to reach: 15 more)")
    where_it_goes("tiny")
    took, billions, gib = shape_only_step()
    print(f"shape-only step of {billions:.1f} B parameters: {took:.2f} s of host time, {gib:.2f} GiB in all (to reach: 5 s, 2 GB)")


if __name__ == "__main__":
    main()

"""How fast the emulation is on this machine: ``make bench``. Figures, no test: machines differ and are noisy.

Each comparison is made in pairs in one process, the two sides in turn, and quoted as the median of the ratios.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from course_lib import npu
from course_lib.llm.config import Config, preset
from course_lib.llm.model import Transformer
from course_lib.npu import runtime

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

    cpu, emulated = [], []
    for _ in range(pairs):
        cpu.append(seconds(lambda: loop("cpu")))
        with npu.ledger():
            emulated.append(seconds(lambda: loop("npu")))
    return tuple(1e6 * statistics.median(column) / calls for column in (cpu, emulated))


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
    for name, pairs, goal in (("tiny", 15, "1.25"), ("small", 5, "none yet")):
        ratio, cpu, emulated, operators = step_ratio(name, pairs)
        print(f"training step of {name}: {1e3 * emulated:.1f} ms on npu with ledger, {1e3 * cpu:.1f} ms on cpu, median ratio {ratio:.2f} (to reach: {goal}); {operators} operators")
    cpu_us, npu_us = operator_overhead()
    print(f"smallest operator: {npu_us:.1f} µs on npu with ledger, {cpu_us:.1f} µs on cpu")
    took, billions, gib = shape_only_step()
    print(f"shape-only step of {billions:.1f} B parameters: {took:.2f} s of host time, {gib:.2f} GiB in all (to reach: 5 s, 2 GB)")


if __name__ == "__main__":
    main()

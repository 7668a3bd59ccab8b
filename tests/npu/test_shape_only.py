"""Shape-only mode: the same program without numbers has the same ledger, and what needs a number says so."""

import gc
import resource

import pytest
import torch

from course_lib import npu
from course_lib.llm.config import Config, preset
from course_lib.llm.model import Transformer
from course_lib.npu import runtime

LLAMA_70B = Config(vocab_size=32000, context=4096, width=8192, layers=80, heads=64, kv_heads=8, feed_forward=28672, tied=False)


@pytest.fixture
def shape_only():
    gc.collect()
    npu.use("mini", numerics=False)
    yield
    gc.collect()
    npu.use("mini")


def step(config: Config, batch: int) -> npu.Ledger:
    """The ledger of the second training step of a model that was built without numbers."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(batch, config.context, dtype=torch.long, device="npu")
    for _ in range(2):
        with npu.ledger() as ledger:
            model(tokens, tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return ledger


def test_same_ledger_with_and_without_numbers():
    gc.collect()
    ledgers = []
    for numerics in (True, False):
        npu.use("ascend-910b2", numerics=numerics)
        ledgers.append(step(preset("micro", 64), batch=2))
        gc.collect()
    npu.use("mini")
    with_numbers, without = ledgers
    assert with_numbers.to_json() == without.to_json()
    assert with_numbers.memory_at_peak() == without.memory_at_peak()


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool((x > 0).any()), lambda x: x.tolist(), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: torch.empty(3).copy_(x), lambda x: x.unique(),
    ],
)  # fmt: skip
def test_what_needs_a_number_says_so(shape_only, asks):
    with pytest.raises(runtime.NeedsValues, match="shape-only mode"):
        asks(torch.ones(3, device="npu"))


def test_prints_without_numbers(shape_only):
    assert repr(torch.ones(3, device="npu")) == "tensor(..., size=(3,), dtype=torch.float32, device='npu:0')"


def test_live_tensors_keep_their_mode(shape_only):
    x = torch.ones(3, device="npu")
    with pytest.raises(RuntimeError, match="live on npu, without numbers; delete their tensors first"):
        npu.use("mini")
    assert x.shape == (3,)


def test_memory_is_still_counted(shape_only):
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(65 * 2**20, dtype=torch.uint8, device="npu")


def test_a_model_of_70_billion_parameters_trains_a_step_on_a_laptop():
    """Forward, backward and AdamW, in no memory to speak of; how long it takes: make bench."""
    gc.collect()
    npu.use("ascend-910b2", numerics=False)
    memory = runtime.devices[0].memory
    memory.capacity = memory.limit = 2**42  # a chip that is large enough
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    totals = step(LLAMA_70B, batch=1).totals()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    gc.collect()
    npu.use("mini")
    with torch.device("meta"):
        model = Transformer(LLAMA_70B)
    # the ledger counts flash attention's backward with five products of T² where the convention has four
    attention = 80 * 4096 * 8192 * 4097
    assert totals.cube_flops == 4096 * model.flops_per_token("6N+attention causal") + attention
    assert totals.peak_memory > 16 * model.num_parameters()
    assert grown < 2**21, f"{grown} KiB"

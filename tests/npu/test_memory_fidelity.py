"""Peak memory is what a hand ledger of the tensors gives, to the byte; fragmentation can be provoked and seen."""

import gc

import pytest
import torch
import torch.nn.functional as F

from course_lib import npu
from course_lib.llm.config import preset
from course_lib.llm.model import Transformer

B, D, H, O = 640, 96, 224, 32  # batch, inputs, hidden, outputs


def block(*shape: int) -> int:
    """Bytes of a float32 tensor's block: rounded up to 512."""
    return -(-4 * torch.Size(shape).numel() // 512) * 512


@pytest.fixture(autouse=True)
def fresh_memory():
    gc.collect()
    npu.use("mini")
    yield
    gc.collect()


def test_peak_of_a_training_step_by_hand():
    x, w1, w2 = torch.randn(B, D, device="npu"), torch.randn(H, D, device="npu"), torch.randn(O, H, device="npu")
    w1.requires_grad_(), w2.requires_grad_()
    torch.npu.reset_peak_memory_stats()
    F.linear(F.linear(x, w1).relu(), w2).sum().backward()

    held = block(B, D) + block(H, D) + block(O, H)
    forward = [
        held + 2 * block(B, H),  # hidden before and after relu; only the second is saved
        held + block(B, H) + block(B, O),
        held + block(B, H) + block(B, O) + block(1),  # the loss
    ]
    loss = 2 * block(1)  # and its gradient, a one, which is expanded without memory of its own
    backward = [
        held + loss + block(B, H) + block(B, H) + block(O, H),  # saved hidden, its gradient, the gradient of w2
        held + loss + block(B, H) + 2 * block(B, H) + block(O, H),  # relu's backward: gradients on both sides of it
        held + loss + block(B, H) + block(O, H) + block(H, D),  # the gradient of w1; x needs none
    ]
    assert torch.npu.max_memory_allocated() == max(forward + backward)
    assert torch.npu.memory_allocated() == held + block(H, D) + block(O, H)


def test_after_forward_lies_there_what_autograd_saved():
    """Of the course's model: parameters, buffers, input, loss, and each storage that a node saved, once."""
    model = Transformer(preset("micro", 64)).to("npu")
    tokens = torch.randint(64, (4, 64)).to("npu")
    storages = {}

    def saved(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    for t in (*model.parameters(), *model.buffers(), tokens):
        saved(t)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        loss = saved(model(tokens, tokens))
    assert torch.npu.memory_allocated() == sum(-(-size // 512) * 512 for size in storages.values())
    loss.backward()
    gradients = sum(block(*p.shape) for p in {id(p): p for p in model.parameters()}.values())
    del loss
    still = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers(), tokens)}
    assert torch.npu.memory_allocated() == sum(-(-size // 512) * 512 for size in still.values()) + gradients


def test_fragmentation_can_be_provoked_and_seen():
    size = 4096  # on mini a segment of 20 KiB holds five of them
    tensors = [torch.empty(size, dtype=torch.uint8, device="npu") for _ in range(40)]
    reserved = torch.npu.memory_reserved()
    assert reserved == 8 * 20 * 1024
    del tensors[::2]  # half of it is free, in pieces
    pieces = [b["size"] for segment in torch.npu.memory_snapshot() for b in segment["blocks"] if b["state"] == "inactive"]
    assert pieces == 20 * [size]
    assert torch.npu.memory_stats()["inactive_split_bytes.all.current"] == sum(pieces) == reserved - torch.npu.memory_allocated()
    large = torch.empty(2 * size, dtype=torch.uint8, device="npu")  # half is free, and no gap holds two neighbours
    assert torch.npu.memory_reserved() == reserved + 20 * 1024
    del large, tensors
    torch.npu.empty_cache()
    assert torch.npu.memory_reserved() == 0

"""What the device lacks says so; what wants some operands on the host gets them there."""

import pytest
import torch
import torch.nn.functional as F

from course_lib import npu

pieces = [torch.ones(2), torch.ones(3)]
NESTED = {
    "from the host": lambda: torch.nested.nested_tensor(pieces, device="npu"),
    "from the device": lambda: torch.nested.nested_tensor([p.to("npu") for p in pieces]),
    "as nested": lambda: torch.nested.as_nested_tensor([p.to("npu") for p in pieces]),
    "moved": lambda: torch.nested.nested_tensor(pieces).to("npu"),
    "jagged": lambda: torch.nested.nested_tensor(pieces, device="npu", layout=torch.jagged),
    "jagged moved": lambda: torch.nested.nested_tensor(pieces, layout=torch.jagged).to("npu"),
    "from jagged": lambda: torch.nested.nested_tensor_from_jagged(torch.ones(5, 2, device="npu"), torch.tensor([0, 2, 5], device="npu")),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", NESTED)
def test_nested_tensors(case):
    with pytest.raises(NotImplementedError, match="nested tensors have no form .* pad them"):
        NESTED[case]()
    nested = torch.nested.nested_tensor(pieces, layout=torch.jagged)  # on the host as ever
    assert (nested + 1).sum() == 10


LAZY = {
    "moved": lambda: torch.nn.LazyLinear(4).to("npu"),
    "made there": lambda: torch.nn.LazyLinear(4, device="npu"),
    "buffers": lambda: torch.nn.LazyBatchNorm2d().to("npu"),
}


@pytest.mark.parametrize("case", LAZY)
def test_lazy_modules(case):
    with pytest.raises(NotImplementedError, match="run one batch through it on the cpu"):
        LAZY[case]()


def test_lazy_modules_once_they_know_their_shapes():
    module = torch.nn.LazyLinear(4)
    module(torch.ones(2, 3))
    module.to("npu")(torch.ones(2, 3, device="npu")).sum().backward()
    assert module.weight.grad.shape == (4, 3) and module.weight.grad.device.type == "npu"


def test_data_parallel():
    npu.use("mini", count=2)
    with pytest.raises(NotImplementedError, match="use DistributedDataParallel"):
        torch.nn.DataParallel(torch.nn.Linear(3, 2).to("npu"))(torch.ones(4, 3, device="npu"))


LENGTHS = {"lists": lambda t: t.tolist(), "host": lambda t: t, "device": lambda t: t.to("npu")}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("where", LENGTHS)
def test_ctc_loss(where, reduction):
    scores, targets = torch.randn(10, 2, 5), torch.randint(1, 5, (2, 4))
    lengths = torch.tensor([10, 9]), torch.tensor([4, 3])
    mine, reference = scores.to("npu").requires_grad_(), scores.clone().requires_grad_()
    want = F.ctc_loss(reference.log_softmax(-1), targets, *lengths, reduction=reduction)
    got = F.ctc_loss(mine.log_softmax(-1), targets.to("npu"), *map(LENGTHS[where], lengths), reduction=reduction)
    torch.testing.assert_close(got.detach().cpu(), want.detach())
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(mine.grad.cpu(), reference.grad)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_a_compiled_optimizer_step(name):
    torch._dynamo.reset()
    weights = []
    for device, step in (("cpu", lambda o: o.step), ("npu", lambda o: torch.compile(o.step, backend="eager"))):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).to(device)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        model(torch.ones(4, 3, device=device)).square().sum().backward()
        for _ in range(2):
            step(optimizer)()
        weights.append(model.weight.detach().cpu())
    torch.testing.assert_close(*weights)

"""Tensors on the device, against the same program on the CPU."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import npu

DEVICE = torch.device("npu:0")


def same(program, *shapes: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Run ``program`` on the CPU and on the device with equal inputs; the results and the inputs must be equal."""
    inputs = [torch.randn(s).mul(5).to(dtype) for s in shapes]
    there = [t.to("npu") for t in inputs]
    expected, got = program(*inputs), program(*there)
    assert got.device == DEVICE
    for ours, theirs in zip([got, *there], [expected, *inputs]):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours.cpu(), theirs)
    return got


# -- making ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.empty(2, 3, device=d),
        lambda d: torch.zeros(2, dtype=torch.bool, device=d),
        lambda d: torch.ones(0, 3, device=d),
        lambda d: torch.full((2,), 7, device=d),
        lambda d: torch.arange(5, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
        lambda d: torch.tensor(3.5, device=d),
        lambda d: torch.tensor([torch.tensor(1.0, device=d), 2]).to(d),
        lambda d: torch.as_tensor(np.ones(3), device=d),
        lambda d: torch.asarray([1, 2], device=d),
        lambda d: torch.from_numpy(np.arange(3)).to(d),
        lambda d: torch.empty_like(torch.ones(3), device=d),
        lambda d: torch.ones(2).new_zeros(3, device=d),
        lambda d: torch.ones(2, device=d).new_tensor([1.0, 2.0]),
        lambda d: torch.ones(2, 3, device=d).new_empty((3, 2)),
        lambda d: torch.empty_strided((2, 3), (1, 2), device=d),
        lambda d: torch.ones(2, dtype=torch.uint8, device=d) + 255,
        lambda d: torch.ones(2, dtype=torch.float64, device=d),
        lambda d: torch.tril_indices(3, 3, device=d),
        lambda d: torch.randperm(5, device=d).sort()[0],
    ],
)
def test_factories(make) -> None:
    ours, theirs = make("npu"), make("cpu")
    assert ours.device == DEVICE and ours.is_npu and not ours.is_cpu
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


def test_the_device_can_be_the_default() -> None:
    with torch.device("npu"):
        assert torch.ones(2).device == nn.Linear(2, 2).weight.device == DEVICE


@pytest.mark.parametrize("back", [lambda x: x.cpu(), lambda x: x.new_ones(2, device="cpu"), lambda x: torch.zeros_like(x, device="cpu")])
def test_what_is_asked_for_on_the_host_is_there(back) -> None:
    assert type(back(torch.ones(2, device="npu"))) is torch.Tensor


def test_a_copy_does_not_share_the_host_memory() -> None:
    source = np.zeros(2)
    moved = torch.from_numpy(source).to("npu")
    source[0] = 1
    assert moved.tolist() == [0, 0]


# -- changing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.view(6, 4).t(),
        lambda x: x[1, ..., None],
        lambda x: x.transpose(0, 1).reshape(-1),
        lambda x: x.permute(2, 0, 1)[1:, ::2],
        lambda x: torch.stack(x.unbind(1)),
        lambda x: torch.cat(x.split(1, dim=2)),
        lambda x: x.diagonal(dim1=1, dim2=2),
        lambda x: x.unfold(2, 2, 1),
        lambda x: x[:, :1].expand(2, 3, 4) + x,
        lambda x: x.add_(1).mul_(2),
        lambda x: x[0].zero_(),
        lambda x: x.transpose_(0, 1).unsqueeze_(0),
        lambda x: x.squeeze_().t_() if x.dim() == 2 else x.swapaxes_(1, 2),
        lambda x: x.fill_diagonal_(7) if x.dim() == 2 else x.clamp_(min=0),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.mul(x, x, out=torch.empty_like(x)),
        lambda x: torch.sum(x, 1, out=torch.empty(0, device=x.device)),
        lambda x: x.detach().mul_(0),
        lambda x: x.data.add_(1),
        lambda x: x.to(torch.float64).sum().float(),
        lambda x: x.half().float(),
        lambda x: x.view(torch.int32),
        lambda x: x.contiguous(memory_format=torch.contiguous_format).softmax(-1),
    ],
)
def test_views_and_writes(program) -> None:
    same(program, (2, 3, 4))


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([2, 0, 2])],
        lambda x: x[:, [1, 0]],
        lambda x: x[np.array([1, 2])],
        lambda x: x[torch.arange(4) > 1],
        lambda x: x[torch.tensor([0, 1], device=x.device), torch.tensor([1, 2])],
        lambda x: x[torch.tensor(3, device=x.device)],
        lambda x: x.index_put_((torch.tensor([1, 1]),), torch.ones(2, 5, device=x.device), accumulate=True),
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0, x, 0.0),
    ],
)
def test_indexing(program) -> None:
    same(program, (4, 5))


@pytest.mark.parametrize(
    "index, value",
    [(0, 1.0), ((slice(None), 1), 2.0), (slice(1, 3), torch.ones(2, 5)), (torch.tensor([0, 2]), 3.0), (torch.tensor([[True] * 5] * 4), 0.0)],
)
def test_assignment(index, value) -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        x[index] = value
        return x

    same(write, (4, 5))


def test_iterating_and_scalars() -> None:
    x = torch.arange(4, device="npu")
    assert [int(v) for v in x] == [0, 1, 2, 3] and len(x) == 4
    assert float(x[2]) == 2.0 and bool(x[1]) and ["a", "b"][x[1]] == "b"


def test_resize_and_out_of_another_size_take_the_memory_they_need() -> None:
    before = torch.npu.memory_allocated()
    x = torch.zeros(4, device="npu")
    x.resize_(1000)
    assert torch.npu.memory_allocated() - before == 4096
    y = torch.empty(0, device="npu")
    torch.add(torch.ones(500, device="npu"), 1, out=y)
    assert y.shape == (500,) and torch.npu.memory_allocated() - before == 4096 + 2048
    x.untyped_storage().resize_(0)
    assert torch.npu.memory_allocated() - before == 2048


def test_assigning_data_replaces_memory_and_numbers() -> None:
    model = nn.Linear(2, 2).to("npu")
    model.weight.data, model.bias.data = torch.ones(3, 2, device="npu"), torch.zeros(3, device="npu")
    assert model(torch.ones(1, 2, device="npu")).tolist() == [[2, 2, 2]]
    with pytest.raises(RuntimeError, match=r"cannot assign a tensor on cpu to .data of a tensor on npu:0; move it first"):
        model.weight.data = torch.ones(2, 2)


def test_set_takes_over_memory() -> None:
    x = torch.zeros(2, device="npu").set_(torch.ones(5, device="npu"))
    assert x.tolist() == [1] * 5
    with pytest.raises(RuntimeError, match="same device"):
        x.set_(torch.ones(5))


def test_complex_conjugates() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x)
        assert z.conj().is_conj() and z.conj().imag.is_neg()
        return torch.view_as_real((z.mH @ z) * z.conj().sum() + z.conj().imag.sum())

    same(program, (3, 4, 2))


def test_a_write_through_a_conjugate_is_seen() -> None:
    z = torch.ones(2, dtype=torch.complex64, device="npu")
    z.conj()[0] = 1j
    assert z.tolist() == [-1j, 1]


# -- out of the device -------------------------------------------------------------------------------


def test_printing_and_formatting() -> None:
    assert repr(torch.arange(2, device="npu")) == "tensor([0, 1], device='npu:0')"
    assert "requires_grad=True" in repr(torch.ones(1, device="npu", requires_grad=True))
    assert "grad_fn=<MulBackward0>" in repr(torch.ones(1, device="npu", requires_grad=True) * 2)
    assert f"{torch.tensor(1.5, device='npu'):.2f}" == "1.50"
    assert str(nn.Parameter(torch.ones(1, device="npu"))).startswith("Parameter containing:\ntensor([1.], device='npu:0'")


def test_lists_and_numpy() -> None:
    x = torch.arange(3, device="npu")
    assert x.tolist() == [0, 1, 2]
    assert x.numpy(force=True).tolist() == [0, 1, 2]
    for to_numpy in (lambda: x.numpy(), lambda: np.array(x), lambda: x * np.ones(3)):
        with pytest.raises(TypeError, match="can't convert npu:0 device type tensor to numpy. Use Tensor.cpu()"):
            to_numpy()


def test_equal_and_close() -> None:
    x = torch.ones(2, device="npu")
    assert torch.equal(x, x.clone()) and torch.allclose(x, x + 1e-9) and not torch.equal(x, x + 1)
    torch.testing.assert_close(x, x.clone())


def test_data_pointers_tell_storages_apart() -> None:
    x, y = torch.ones(4, device="npu"), torch.ones(4, device="npu")
    assert x.data_ptr() != y.data_ptr() and x[1:].data_ptr() == x.data_ptr() + 4 == x.untyped_storage().data_ptr() + 4


# -- copies, files, other processes ------------------------------------------------------------------


def test_deepcopy_keeps_what_is_shared_inside() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)).to("npu")
    model[1].weight = model[0].weight
    model(torch.tensor([1], device="npu")).sum().backward()
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight is not model[0].weight
    assert isinstance(twin[0].weight, nn.Parameter) and twin[0].weight.device == DEVICE
    torch.testing.assert_close(twin[0].weight.grad, model[0].weight.grad)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


def reloaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), {"npu:0": "cpu"}, lambda storage, location: storage.cpu()])
def test_saved_on_the_device_loaded_on_the_host(place) -> None:
    loaded = reloaded(torch.arange(3, device="npu"), map_location=place)
    assert type(loaded) is torch.Tensor and loaded.device.type == "cpu" and loaded.tolist() == [0, 1, 2]


@pytest.mark.parametrize("source, place", [("npu", None), ("npu", "npu"), ("cpu", "npu:0"), ("cpu", torch.device("npu"))])
def test_loaded_onto_the_device(source, place) -> None:
    before = torch.npu.memory_allocated()
    loaded = reloaded(torch.arange(3, device=source), map_location=place)
    assert loaded.device == DEVICE and (loaded + 1).tolist() == [1, 2, 3]
    assert torch.npu.memory_allocated() - before == 512


def test_views_and_ties_survive_a_file() -> None:
    x = torch.zeros(3, device="npu")
    for options in ({}, {"map_location": "cpu"}):
        whole, part = reloaded((x, x[1:]), **options)
        whole[1] = 5
        assert part.tolist() == [5, 0]


def test_a_file_for_a_device_that_is_not_there() -> None:
    npu.use("mini", count=2)
    file = io.BytesIO()
    torch.save(torch.ones(1, device="npu:1"), file)
    npu.use("mini")
    file.seek(0)
    with pytest.raises(RuntimeError, match="invalid device ordinal 1; this process has 1"):
        torch.load(file)


def test_pickle() -> None:
    model = nn.Linear(2, 2).to("npu")
    twin = pickle.loads(pickle.dumps(model))
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.device == DEVICE
    assert torch.equal(twin.weight, model.weight)


def test_state_of_an_optimizer_through_a_file() -> None:
    model = nn.Linear(2, 2).to("npu")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2, device="npu")).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(reloaded(optimizer.state_dict(), map_location="cpu"))
    assert other.state[model.weight]["exp_avg"].device == DEVICE


def numbers(rows: int) -> torch.utils.data.Dataset:
    return torch.utils.data.TensorDataset(torch.arange(float(rows)))


@pytest.mark.parametrize("options", [{}, {"pin_memory": True}, {"num_workers": 1}], ids=str)
def test_batches_of_a_dataloader(options) -> None:
    loader = torch.utils.data.DataLoader(numbers(8), batch_size=4, **options)
    assert [batch.to("npu", non_blocking=True).sum().item() for (batch,) in loader] == [6, 22]


def test_device_tensors_do_not_leave_the_process() -> None:
    with pytest.raises(RuntimeError, match="cannot be shared with another process: send tensor.cpu()"):
        ForkingPickler.dumps(torch.ones(4, device="npu"))


def test_storages() -> None:
    before = torch.npu.memory_allocated()
    storage = torch.UntypedStorage(12, device="npu")
    assert (storage.device, storage.nbytes()) == (DEVICE, 12) and torch.npu.memory_allocated() - before == 512
    x = torch.arange(3.0, device="npu")
    for twin in (x.untyped_storage().clone(), copy.deepcopy(x.untyped_storage())):
        assert torch.empty(0, device="npu").set_(twin).tolist() == [0, 1, 2] and twin.data_ptr() != x.data_ptr()
    assert torch.UntypedStorage(4).device.type == "cpu" and torch.UntypedStorage([1, 2]).tolist() == [1, 2]


# -- modules -----------------------------------------------------------------------------------------


def test_moving_a_module_keeps_ties_and_the_parameter_objects() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    weight = model[0].weight
    model.to("npu")
    assert model[0].weight is model[1].weight is weight and weight.device == DEVICE
    model.cpu()
    assert model[0].weight is weight and type(weight) is nn.Parameter


def test_buffers_parameters_and_empty_modules() -> None:
    norm = nn.BatchNorm1d(3).to("npu")
    assert norm.running_mean.device == norm.num_batches_tracked.device == DEVICE
    norm.weight = nn.Parameter(torch.ones(3, device="npu"))
    assert norm(torch.randn(4, 3, device="npu")).shape == (4, 3)
    with torch.device("meta"):
        hollow = nn.Linear(2, 2)
    assert hollow.to_empty(device="npu").weight.device == DEVICE
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        nn.Linear(2, 2, device="meta").to("npu")


def test_state_dicts_between_devices() -> None:
    here, there = nn.Linear(2, 2), nn.Linear(2, 2).to("npu")
    there.load_state_dict(here.state_dict())
    assert torch.equal(there.weight.cpu(), here.weight) and there.weight.device == DEVICE
    here.load_state_dict(there.state_dict(), assign=True)
    assert here.weight.device == DEVICE


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)), (3, 5, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(6, 2, 3)), (2, 4, 8, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 5, 4)),
    "norms": (lambda: nn.Sequential(nn.RMSNorm(4), nn.GroupNorm(5, 5), nn.SiLU(), nn.Softmax(-1)), (2, 5, 4)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), (5, 2, 4)),
    "lstm without bias": (lambda: nn.LSTM(4, 3, bias=False, proj_size=2), (5, 2, 4)),
    "gru": (lambda: nn.GRU(4, 3, num_layers=2, bidirectional=True), (5, 2, 4)),
    "gru without bias": (lambda: nn.GRU(4, 3, bias=False), (5, 2, 4)),
    "rnn": (lambda: nn.RNN(4, 3), (5, 2, 4)),
}


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_gradients(name) -> None:
    build, shape = MODULES[name]
    here = build()
    there = copy.deepcopy(here).to("npu")
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().to("npu").requires_grad_()
    for model, inputs in ((here, x), (there, y)):
        output(model, inputs).square().sum().backward()
    torch.testing.assert_close(y.grad.cpu(), x.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_inference_mode(name) -> None:
    build, shape = MODULES[name]
    here, x = build().eval(), torch.randn(shape)
    with torch.inference_mode():
        there = copy.deepcopy(here).to("npu")
        got = output(there, x.to("npu"))
        assert got.is_inference()
        torch.testing.assert_close(got.cpu(), output(here, x))


def test_views_in_inference_mode_stay_what_their_base_is() -> None:
    x = torch.zeros(4, 2, device="npu")
    with torch.inference_mode():
        view, parts = x[1:], x.split(2)
        view.add_(1)
        assert not view.is_inference() and not parts[0].is_inference() and (x * 2)[0].is_inference()
    assert x.sum() == 6


def test_packed_sequences() -> None:
    lstm = nn.LSTM(3, 4)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        packed, _ = model(nn.utils.rnn.pack_padded_sequence(x, lengths))
        return nn.utils.rnn.pad_packed_sequence(packed)[0]

    torch.testing.assert_close(run(copy.deepcopy(lstm).to("npu"), x.to("npu")).cpu(), run(lstm, x))


# -- autograd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant) -> None:
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()).to("npu")
    x = torch.randn(2, 4, device="npu", requires_grad=True)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        run(x).sum().backward()
        grads.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*grads)  # dropout draws the same numbers again


def test_higher_order_gradients() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()
        inner = F.linear(x, x.detach() + 1).tanh().sum() + (x**3).sum()
        (first,) = torch.autograd.grad(inner, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    x = torch.randn(3, 3)
    torch.testing.assert_close(program(x.to("npu")).cpu(), program(x))


def test_gradcheck() -> None:
    x = torch.randn(3, dtype=torch.float64, device="npu", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (x.exp() * x).cumsum(0), x)


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.func.vmap(lambda a: a.tanh() * 2)(x),
        lambda x: torch.func.grad(lambda a: (a**3).sum())(x),
        lambda x: torch.func.jacrev(lambda a: a**2)(x[0]),
        lambda x: torch.func.jvp(lambda a: a**2, (x,), (torch.ones_like(x),))[1],
        lambda x: torch.autograd.functional.hessian(lambda a: (a**3).sum(), x[0]),
    ],
)
def test_function_transforms(transform) -> None:
    same(transform, (3, 2))


def test_gradients_and_hooks() -> None:
    x = torch.ones(2, device="npu", requires_grad=True)
    seen = []
    x.register_hook(lambda grad: seen.append(grad.device))
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.tolist()))
    for _ in range(2):
        (x * 2).sum().backward()
    assert seen == [DEVICE, [2, 2], DEVICE, [4, 4]]
    x.grad = None
    x.grad = torch.zeros(2, device="npu")
    with pytest.raises(RuntimeError, match="device type 'cpu'"):
        x.grad = torch.zeros(2)


def test_gradients_cross_devices() -> None:
    host, device = torch.ones(2, requires_grad=True), torch.ones(2, device="npu", requires_grad=True)
    (host.to("npu") * device).cpu().sum().backward()
    assert type(host.grad) is torch.Tensor and device.grad.device == DEVICE


def test_a_write_that_spoils_backward_is_found() -> None:
    y = torch.ones(2, device="npu", requires_grad=True).exp()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- optimizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
    ],
)
def test_optimizers(make) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(8, 3)

    def train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        optimizer = make(model.parameters())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [p.detach().cpu() for p in model.parameters()]

    torch.testing.assert_close(train(copy.deepcopy(model).to("npu"), x.to("npu")), train(model, x), rtol=1e-4, atol=1e-5)


def test_grad_scaler() -> None:
    x = torch.ones(3, device="npu", requires_grad=True)
    scaler, optimizer = torch.amp.GradScaler("npu"), torch.optim.SGD([x], lr=0.1)
    scaler.scale(x.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(x.detach().cpu(), torch.full((3,), 0.9))


# -- random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(8, device="npu"),
        lambda: F.dropout(torch.ones(64, device="npu")),
        lambda: torch.empty(8, device="npu").uniform_(),
        lambda: torch.bernoulli(torch.full((64,), 0.5, device="npu")),
        lambda: torch.randperm(16, device="npu"),
        lambda: torch.multinomial(torch.ones(16, device="npu"), 8),
        lambda: nn.init.kaiming_uniform_(torch.empty(4, 4, device="npu")),
        lambda: torch.randint(0, 1000, (8,), device="npu"),
        lambda: torch.normal(torch.zeros(8, device="npu"), 1.0),
    ],
)
def test_seeded_whatever_ran_on_the_host(draw) -> None:
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    torch.randn(100)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


def test_the_device_leaves_the_host_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    F.dropout(torch.ones(9, device="npu"))
    torch.randn(5, device="npu")
    assert torch.equal(torch.randn(4), expected)


def test_generator_states() -> None:
    state = torch.npu.get_rng_state()
    first = torch.randn(3, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.randn(3, device="npu"), first)
    with torch.random.fork_rng(device_type="npu"):
        torch.randn(3, device="npu")
    torch.npu.manual_seed(5)
    assert torch.npu.initial_seed() == 5


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: x @ y,
        lambda x, y: torch.cat([y, x]),
        lambda x, y: F.linear(y, x),
        lambda x, y: y.add_(x),
        lambda x, y: torch.add(x, 1, out=torch.empty(2, 2)),
        lambda x, y: torch.add(y, 1, out=torch.empty(2, 2, device="npu")),
        lambda x, y: torch.equal(x, y),
        lambda x, y: F.embedding(torch.tensor([0]), x),
        lambda x, y: y[torch.tensor([0], device="npu")],
    ],
)
def test_mixing_devices(mix) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(2, 2, device="npu"), torch.ones(2, 2))


def test_host_scalars_may_join() -> None:
    x = torch.ones(2, device="npu")
    assert (torch.tensor(2.0) * x).tolist() == (x * torch.tensor(2.0)).tolist() == [2, 2]


@pytest.mark.parametrize("make", [lambda: torch.eye(2).to_sparse().to("npu"), lambda: torch.eye(2, device="npu").to_sparse()])
def test_sparse_is_refused_with_a_way_out(make) -> None:
    with pytest.raises(NotImplementedError, match="layout torch.sparse_coo are not supported; use dense tensors"):
        make()


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (lambda: torch.ones(2, 3, device="npu") @ torch.ones(2, 3, device="npu"), RuntimeError, "cannot be multiplied"),
        (lambda: torch.ones(3, device="npu").view(2), RuntimeError, "invalid for input of size 3"),
        (lambda: F.embedding(torch.tensor([9], device="npu"), torch.ones(3, 4, device="npu")), IndexError, "out of range"),
        (lambda: torch.ones(2, device="npu:3"), RuntimeError, "invalid device ordinal 3; this process has 1"),
        (lambda: torch.ones(2, 2, device="npu", dtype=torch.float64) @ torch.ones(2, 2, device="npu", dtype=torch.float64), RuntimeError, "no matrix product in float64"),
    ],
)
def test_errors_of_operators(wrong, error, words) -> None:
    with pytest.raises(error, match=words):
        wrong()
    assert (torch.ones(1, device="npu") + 1).item() == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_histogram_of_integers_as_on_accelerators(dtype: torch.dtype) -> None:
    chosen = torch.tensor([0, 3, 3, 1, 7, 3, 9])
    found = torch.histc(chosen.to("npu", dtype), bins=8, min=0, max=7)
    assert found.dtype == dtype and found.cpu().tolist() == [1, 1, 0, 3, 0, 0, 0, 1]

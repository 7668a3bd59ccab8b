"""PyTorch's own operator database, every sample, on npu against cpu: ``make conformance``.

For each operator and each of five dtypes that it supports: values, shapes, strides, dtypes and device of all results, and for
differentiable float32 samples the gradients. A sample *agrees*, or it *raises* NotImplementedError for a reason listed in
KNOWN, or it is *wrong*, which nothing may be.

Half precision is held to the float32 result, not to the CPU's half: an NPU's cube rounds once, the CPU at times after each
addition. A result may be as far from float32 as the CPU's is, or as far as two roundings take it. Gradients are sums of
terms that may cancel, so they are held to 1e-5 of the largest of their tensor.

    python tests/conformance.py [operator ...]
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

from course_lib import npu

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
HALF = (torch.float16, torch.bfloat16)
# Relative to 1 + |value|: 1e-5, and in half precision two roundings, of an intermediate result and of the last.
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in HALF}

# Operators whose samples may raise NotImplementedError, and why.
SPARSE = "sparse layouts: the device has dense tensors only"
INT64 = "the chip multiplies no int64 matrices, and nobody has published how a real one emulates it"
KNOWN = {
    "sparse_sampled_addmm": SPARSE, "sparse_mm_reduce": SPARSE, "to_sparse": SPARSE,
    **dict.fromkeys(
        ("addmm", "addmm_decomposed", "addmv", "addbmm", "baddbmm", "dot", "vdot", "bmm", "mv", "matmul", "mm", "__rmatmul__",
         "einsum", "inner", "tensordot", "linalg_multi_dot", "nn_functional_linear", "nn_functional_conv1d",
         "nn_functional_conv2d", "nn_functional_conv3d", "nn_functional_conv_transpose1d", "nn_functional_conv_transpose2d",
         "nn_functional_conv_transpose3d"), INT64),
}  # fmt: skip
# Where scores of some hundreds go through exp, float32 itself is no better; PyTorch's own tests of this operator allow as much.
WIDER = {"nn.functional.scaled_dot_product_attention": 5e-5}
UNINITIALISED = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted")  # no values to compare
INDICES_ON_HOST = ("tensor_split",)  # PyTorch wants its tensor argument there


@dataclass
class Report:
    """What came out: counts of samples, and of the first words of each complaint by operator and dtype."""

    agree: int = 0
    raised: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)

    def note(self, name: str, dtype: torch.dtype, found: str | Exception) -> None:
        if found == "":
            self.agree += 1
        elif isinstance(found, NotImplementedError) and name in KNOWN:
            self.raised[name, KNOWN[name]] += 1
        else:
            words = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else found
            self.wrong[name, str(dtype).removeprefix("torch."), words[:140]] += 1

    def __str__(self) -> str:
        lines = [f"{self.agree:,} samples agree, {self.raised.total():,} raise for a known reason, {self.wrong.total():,} are wrong"]
        lines += [f"  raises {count:4}  {name}: {why}" for (name, why), count in self.raised.items()]
        lines += [f"  WRONG  {count:4}  {name} {dtype}: {what}" for (name, dtype, what), count in self.wrong.items()]
        return "\n".join(lines)


def to_npu(value: object) -> object:
    """A sample's argument on the device: tensors, and words that name the device."""
    if isinstance(value, torch.Tensor):
        moved = value.detach().to("npu")
        if value.layout == torch.strided and value.untyped_storage().nbytes() > value.numel() * value.element_size():
            whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # the sample looks at a part of it
            moved = whole.to("npu").as_strided(value.shape, value.stride(), value.storage_offset())
        return moved.requires_grad_(value.requires_grad)
    return torch.device("npu", 0) if isinstance(value, torch.device) else "npu" if value == "cpu" else value


def wide(value: object) -> object:
    """The same argument in float32, for an oracle."""
    if isinstance(value, torch.Tensor):
        return value.detach().float() if value.dtype in HALF else value.detach()
    return torch.float32 if value in HALF else value


def near(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor | None, of_largest: bool, float32: float) -> bool:
    """Are the values equal, or within float tolerance, or in half precision as near to float32 as the CPU's are?"""
    if not want.dtype.is_floating_point and not want.dtype.is_complex:
        return torch.equal(got, want)
    limit = TOLERANCE.get(want.dtype, float32)
    largest = float(want.abs().nan_to_num(0, 0, 0).max()) if of_largest and want.numel() else 0.0
    if torch.allclose(got, want, rtol=limit, atol=limit * max(1.0, largest), equal_nan=True):
        return True
    if exact is None or exact.shape != want.shape:
        return False
    error, allowed = (got.float() - exact).abs(), (want.float() - exact).abs()
    return bool(((error <= allowed.max() + limit * (1 + exact.abs())) | error.isnan()).all())


def difference(want: object, got: object, exact: object = None, gradient: bool = False, values: bool = True, float32: float = 1e-5) -> str:
    """What is different between results on cpu and on npu, in a few words; "" if nothing is."""
    ours, theirs = tree_leaves(got), tree_leaves(want)
    if len(ours) != len(theirs):
        return f"{len(ours)} results, not {len(theirs)}"
    oracle = tree_leaves(exact) if exact is not None else []
    for number, (a, b) in enumerate(zip(ours, theirs)):
        if not isinstance(b, torch.Tensor):
            if not (a == b or (a != a and b != b)):
                return f"{a}, not {b}"
            continue
        if not isinstance(a, torch.Tensor) or a.device.type != "npu":
            return f"stayed on {getattr(a, 'device', type(a).__name__)}"
        for what in ("shape", "dtype", *([] if gradient or not b.numel() else ["stride"])):
            x, y = (getattr(t, what) for t in (a, b))
            x, y = (x(), y()) if what == "stride" else (x, y)
            if x != y:
                return f"{what} {x}, not {y}"
        reference = oracle[number] if len(oracle) == len(theirs) and isinstance(oracle[number], torch.Tensor) else None
        if values and not near(a.detach().cpu(), b.detach(), reference, gradient, float32):
            return "values differ"
    return ""


def gradients(outputs: object, inputs: object) -> list[torch.Tensor | None]:
    """Gradients of all differentiable inputs for random, but always the same, gradients of the outputs."""
    outs = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad and t.dtype.is_floating_point]
    ins = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outs or not ins:
        return []
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in outs]
    return list(torch.autograd.grad(outs, ins, seeds, allow_unused=True))


def outcome(op: object, sample: object, dtype: torch.dtype) -> str | Exception | None:
    """"" if the sample agrees, else what is wrong; None if it does not run on the cpu either."""
    host, kwargs = (sample.input, *sample.args), sample.kwargs
    try:
        device = tree_map(to_npu, (host, kwargs))
    except NotImplementedError as error:
        return error
    nowhere = not any(isinstance(t, (torch.Tensor, torch.device)) or t == "cpu" for t in tree_leaves((host, kwargs)))
    if op.name in INDICES_ON_HOST:
        device = (device[0][0], *host[1:]), kwargs

    def call(arguments: tuple) -> object:
        torch.manual_seed(0)
        return op(*arguments[0], **arguments[1])

    try:
        want = call((host, kwargs))
        want_gradients = gradients(want, (host, kwargs)) if dtype == torch.float32 and op.supports_autograd else []
    except Exception:
        return None
    try:
        exact = call(tree_map(wide, (host, kwargs))) if dtype in HALF else None
    except Exception:
        exact = None
    try:
        with torch.device("npu") if nowhere else nullcontext():  # a factory, and the sample does not say where
            got = call(device)
        wrong = difference(want, got, exact, values=op.name not in UNINITIALISED)
        if wrong or not want_gradients:
            return wrong
        wrong = difference(want_gradients, gradients(got, device), gradient=True, float32=WIDER.get(op.name, 1e-5))
        return f"gradient: {wrong}" if wrong else ""
    except Exception as error:
        return error


def samples(op: object) -> Iterator[tuple[torch.dtype, object]]:
    """Every sample of an operator that the cpu supports."""
    for dtype in DTYPES:
        if op.supports_dtype(dtype, "cpu"):
            yield from ((dtype, s) for s in op.sample_inputs("cpu", dtype, requires_grad=dtype == torch.float32 and op.supports_autograd))


def run(names: set[str] | None = None, every: int = 1) -> Report:
    """Check operators (all, or those with these names), each ``every``-th sample."""
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if names is None or op.name in names or op.formatted_name in names:
                for number, (dtype, sample) in enumerate(samples(op)):
                    if number % every == 0 and (found := outcome(op, sample, dtype)) is not None:
                        report.note(op.formatted_name, dtype, found)
    return report


def main() -> int:
    torch.set_num_threads(1)
    npu.use("ascend-910b2")
    report = run(set(sys.argv[1:]) or None)
    print(f"{len(op_db)} operators of torch {torch.__version__}: {report}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a cell defines runs in ranks and comes back: functions, classes, closures; and what cannot go is named."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from course_lib.lessons.notebooks import KERNEL_ENV
from course_lib.parallel.portable import dumps

ROOT = Path(__file__).parents[2]

MAIN = """
import abc, collections, dataclasses, enum, functools, math, os.path, typing
import torch, torch.nn as nn, torch.distributed as dist, torch.distributed.tensor.parallel
from course_lib.parallel import launch

SCALE, unused = 3, open(__file__)

class Base(abc.ABC):
    made = 0
    @abc.abstractmethod
    def area(self): ...
    @staticmethod
    def square(side): return Square(side)

@dataclasses.dataclass(frozen=True)
class Square(Base):
    side: float
    marks: list = dataclasses.field(default_factory=list)
    def area(self): return self.side ** 2
    @property
    def double(self): return 2 * self.side
    @functools.cached_property
    def half(self): return self.side / 2
    @classmethod
    def unit(cls): return cls(1.0)

class Point(typing.NamedTuple):
    x: int
    y: int = 7

class Slotted:
    __slots__ = ("a",)

class Colour(enum.Enum):
    RED = 1
    GREEN = 2
    def other(self): return Colour.GREEN if self is Colour.RED else Colour.RED

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return g * 2

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 1)
    def forward(self, x): return Twice.apply(self.layer(x))

class Wrong(Exception):
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)

@functools.lru_cache(maxsize=4)
def scaled(x): return SCALE * x

@torch.no_grad()
def quiet(x): return (x * 2).requires_grad

def counter():
    count = 0
    def add():
        nonlocal count
        count += 1
    def get(): return count
    return add, get

def work(add, get, net, shape, *, power=2):
    add(); add()
    local = Square(2.0)
    slotted = Slotted(); slotted.a = 5
    x = torch.ones(1, 2, requires_grad=True)
    net(x).sum().backward()
    fresh = Net(2)
    total = sum(v for v in (scaled(i) for i in range(3)))
    names = [f.name for f in dataclasses.fields(local)]
    return dict(
        count=get(), even=even(10), total=total, power=math.pow(2, power), same=type(shape) is Square, area=shape.area(),
        unit=Square.unit(), half=local.half, double=local.double, marks=Square(1.0).marks, square=Base.square(3.0).side, names=names,
        point=Point(1), slotted=slotted.a, colour=Colour.RED.other(), grad=x.grad, weight=net.layer.weight.grad is not None, net=fresh,
        quiet=quiet(x), style=torch.distributed.tensor.parallel.ColwiseParallel.__name__, function=even, inner=lambda y: y + SCALE,
        joined=os.path.join("a", "b"), rank=dist.get_rank(),
    )

add, get = counter()
net = Net(2)
results = launch(functools.partial(work, power=3), add, get, net, Square(4.0), ranks=2, device="cpu")
for rank, r in enumerate(results):
    assert r["rank"] == rank and r["count"] == 2 and r["even"] and r["total"] == 9 and r["power"] == 8, r
    assert r["same"] and r["area"] == 16 and r["half"] == 1 and r["double"] == 4 and r["marks"] == [] and r["square"] == 3, r
    assert r["unit"] == Square(1.0) and type(r["unit"]) is Square and r["names"] == ["side", "marks"], r
    assert r["point"] == Point(1) == (1, 7) and type(r["point"]) is Point and r["slotted"] == 5, r
    assert r["colour"] is Colour.GREEN and not r["quiet"] and r["style"] == "ColwiseParallel", r
    assert torch.equal(r["grad"], 2 * net.layer.weight.detach()) and r["weight"] and type(r["net"]) is Net, r
    assert r["function"] is even and r["inner"](1) == 4 and r["joined"] == os.path.join("a", "b"), r
assert get() == 0  # ranks have copies

def wrong(): raise Wrong(1, 2)
try:
    launch(wrong, ranks=1, device="cpu")
except Exception as error:
    assert "rank 0 of 1 raised Wrong: 1 and 2" in str(error), error
print("all well")
"""


def test_a_main_module_without_a_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.stdout, done.stderr) == ("all well\n", "")


CELLS = [
    "import torch, torch.distributed as dist\nfrom torch import nn\nfrom course_lib.parallel import launch\nfrom course_lib import npu",
    "class Net(nn.Linear):\n    pass\n\nwidth = 3\nnoise = (i for i in range(3))",
    "def f(seed):\n    torch.manual_seed(seed)\n    x = Net(width, 1).to('npu').weight.detach().sum()\n    dist.all_reduce(x)\n"
    "    print('here', dist.get_rank())\n    return x\n\na, b = launch(f, 0, ranks=2, system='mini-node')\nprint(a == b, a.device)",
    "def g():\n    x = 1\n    return x / dist.get_rank()  # the line to show\n\nlaunch(g, ranks=2)",
    "launch(lambda: list(noise), ranks=2)",
    "width = 5\nprint(launch(lambda: Net(width, 1).weight.shape, ranks=1, device='cpu'))",
]


def test_cells_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KERNEL_ENV.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    run, failed, refused, again = (cell.outputs for cell in notebook.cells[2:])
    assert [o.get("name") for o in run] == ["stdout"], "nothing on stderr"
    assert run[0].text == "[rank 0] here 0\n[rank 1] here 1\ntensor(True) cpu\n"
    assert failed[0].evalue.startswith("rank 0 of 2 raised ZeroDivisionError: division by zero")
    assert "return x / dist.get_rank()  # the line to show" in failed[0].evalue
    assert refused[0].ename == "TypeError"
    assert "variable noise in <lambda>, a generator, cannot go to another process" in refused[0].evalue
    assert again[0].text == "[torch.Size([1, 5])]\n"


class Holder:
    def __init__(self, content: object) -> None:
        self.content = content

    def use(self) -> object:
        return self.content


def test_what_cannot_go_is_named() -> None:
    from course_lib import npu  # noqa: F401

    stream = open(os.devnull)  # noqa: SIM115
    on_npu, generator = torch.ones(2, device="npu"), (i for i in ())
    for obj, message in (
        (
            (Holder([1, {"deep": stream}]).use, ()),
            r"\(fn, args\)\[0\].__self__.content\[1\]\['deep'\], a TextIOWrapper, .*make it inside",
        ),
        ((lambda: stream, ()), "variable stream in .*<lambda>, a TextIOWrapper"),
        ((lambda x=generator: x, ()), "default 0 of .*<lambda>, a generator"),
        ((print, ({"w": on_npu},)), r"\(fn, args\)\[1\]\[0\]\['w'\], a .*Tensor, .*it lies on npu:0.*pass x.cpu\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            dumps(obj, "(fn, args)")
    stream.close()

"""How a model is laid out on chips: the degrees of each parallelism, the batch, the schedule; one layout or 10⁵ at once.

Ranks are numbered with TP innermost, then CP, then DP, PP outermost: tensor-parallel neighbours share a node, pipeline
neighbours are far apart. EP takes ranks out of CP × DP, whose tokens it exchanges; ZeRO divides states over the same.
A field is a number, or an array with one entry for each layout. What cannot be is refused with the reason: `check` for
one layout, `refused` for many.

    >>> from course_lib.plan import load_model
    >>> from course_lib.chip import load_system
    >>> check(Layout(dp=8, tp=3), load_model("llama-2-7b"), load_system("dgx-h100").having(nodes=3), context=4096)
    Traceback (most recent call last):
    course_lib.plan.layout.LayoutError: heads: 32 are not divisible by tp 3; use a divisor of 32
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from course_lib.chip import SystemSpec
from course_lib.chip.figures import DTYPES
from course_lib.plan import schedule as pipeline
from course_lib.plan.memory import PRECISIONS
from course_lib.plan.model import Model

RECOMPUTE = ("none", "cheap", "selective", "full")
KERNELS = ("fused", "eager")
PLACEHOLDERS = 2  # places for layers that may stay empty: embedding and unembedding take one each
Degree = int | np.ndarray


class LayoutError(ValueError):
    """A layout that cannot be; says which degree, what it has to divide, and what to use."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, batches in sequences, and how a step is run; letters as in the field's papers.

    ``zero``: stage 0 to 3. ``sp``: sequence parallelism over the ranks of TP. ``recompute``: "cheap" repeats norms,
    SwiGLU and the expansion of latents (DeepSeek-V3), "selective" the attention core, "full" whole layers. ``schedule``:
    a name of `plan.schedule`. ``gemm``: dtype of products with weights; attention, router and unembedding stay in
    bfloat16. ``precision``: of weights, gradients and states, a key of memory.PRECISIONS. ``attention``: "flash" or
    "plain" (scores in memory); None: plain for GELU models, as their authors ran them. ``kernels``: "fused", one kernel
    each for norm, rotation, SwiGLU, as Megatron has; "eager", operator by operator, as the course's model runs.
    ``overlap_ep``: a forward hides the all-to-all of a backward and vice versa (DualPipe). ``overlap_dp``: gradients go
    while the last backward runs. ``comm_cores``: cores that serve communication and not products (DeepSeek-V3: 20).
    ``gemm_share``: of the peak, that ``gemm`` products in 8 bits reach where the chip's file has none of their own.
    ``pace``: at what share of the cost model's speed kernels run; 1 unless calibrated, see published_runs.py.
    ``copies`` of a token that go to experts: None, one for each; DeepSeek-V3 sends one per node, to at most 4.
    """

    dp: Degree = 1
    tp: Degree = 1
    cp: Degree = 1
    pp: Degree = 1
    vpp: Degree = 1
    ep: Degree = 1
    zero: Degree = 1
    micro_batch: Degree = 1
    global_batch: Degree = 1
    sp: bool | np.ndarray = False
    recompute: str | np.ndarray = "none"
    schedule: str | np.ndarray = "1F1B"
    overlap_ep: bool | np.ndarray = False
    overlap_dp: bool | np.ndarray = True
    gemm: str = "bfloat16"
    precision: str = "bfloat16, Megatron"
    attention: str | None = None
    kernels: str = "fused"
    comm_cores: int = 0
    copies: float | None = None
    gemm_share: float | None = None
    pace: float = 1.0

    @property
    def chips(self) -> Degree:
        """How many this layout takes."""
        return self.dp * self.tp * self.cp * self.pp

    @property
    def microbatches(self) -> Degree:
        """m, of each pipeline in one step."""
        return self.global_batch // (self.dp * self.micro_batch)

    def __len__(self) -> int:
        return max(np.size(getattr(self, field.name)) for field in fields(self))

    def many(self) -> "Layout":
        """The same with an array in each field that differs between layouts."""
        n = len(self)
        wide = {f.name: np.broadcast_to(np.asarray(getattr(self, f.name)), n) for f in fields(self)[:14]}
        return replace(self, **wide)

    def __getitem__(self, which: int | np.ndarray) -> "Layout":
        """One of many layouts as plain numbers, or some of them."""
        wide = self.many()
        taken = {f.name: getattr(wide, f.name)[which] for f in fields(self)[:14]}
        return replace(self, **{k: v.item() if np.ndim(v) == 0 else v for k, v in taken.items()})

    def __str__(self) -> str:
        """The degrees in one line, those of 1 left out."""
        degrees = [f"{name.upper()}{getattr(self, name)}" for name in ("tp", "cp", "pp", "vpp", "ep", "dp")
                   if getattr(self, name) != 1]  # fmt: skip
        more = [f"ZeRO-{self.zero}", *(["SP"] if self.sp else []), f"micro-batch {self.micro_batch}"]
        more += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return " ".join(degrees + more + ([self.schedule] if self.pp > 1 else []))


def places(layout: Layout) -> Degree:
    """Pipeline stages; DualPipe's ranks hold two of them each, in opposite directions."""
    return layout.pp * layout.vpp


def refused(layout: Layout, model: Model, system: SystemSpec, context: int) -> np.ndarray:
    """For each layout 0 where it can be, else the place in `RULES`, counted from 1, of the first rule that it breaks."""
    _words(layout)
    wide = layout.many()
    codes = np.zeros(len(layout), dtype=np.int8)
    whole = np.ones(len(layout), dtype=bool)
    for name in DEGREES:
        value = getattr(wide, name)
        whole &= (value >= 1) & (value == value.astype(np.int64))
    codes[~whole | (wide.zero < 0) | (wide.zero > 3)] = 1
    safe = replace(wide, **{name: np.maximum(getattr(wide, name).astype(np.int64), 1) for name in DEGREES})
    for code, rule in enumerate(RULES[1:], 2):
        broken = rule(safe, model, system, context)
        codes[(codes == 0) & broken] = code
    return codes


def check(layout: Layout, model: Model, system: SystemSpec, context: int) -> None:
    """LayoutError with the reason where one layout cannot be."""
    code = int(refused(layout, model, system, context)[0])
    if code:
        raise LayoutError(reason(code, layout, model, system, context))


DEGREES = ("dp", "tp", "cp", "pp", "vpp", "ep", "micro_batch", "global_batch")


def reason(code: int, layout: Layout, model: Model, system: SystemSpec, context: int) -> str:
    """In words why ``refused`` gave this code for one layout."""
    lay, e = layout, model.experts
    if code == 1:
        return f"degrees are whole numbers of at least 1, ZeRO stages 0 to 3; found {layout}, dp {lay.dp}, batch {lay.global_batch}"
    return {
        2: f"chips: dp·tp·cp·pp = {lay.dp}·{lay.tp}·{lay.cp}·{lay.pp} makes {lay.chips}, {system.title} has {system.chips}; "
        "change dp or the system",
        3: f"heads: {model.heads} are not divisible by tp {lay.tp}; use a divisor of {model.heads}",
        4: f"kv_heads: {model.kv_heads} and tp {lay.tp}: neither divides the other; use a divisor of {model.kv_heads}",
        5: f"feed-forward: width {_inner(model)} is not divisible by tp {lay.tp}; use a divisor",
        6: f"layers: {model.layers + model.mtp} on pp·vpp = {lay.pp * lay.vpp} stages leave more than {PLACEHOLDERS} "
        "places empty, those of embedding and unembedding; change pp or vpp",
        7: f"experts: {e.routed if e else 'none'} are not divisible by ep {lay.ep}; use a divisor, 1 without experts",
        8: f"ep: {lay.ep} does not divide cp·dp = {lay.cp * lay.dp}, whose ranks it takes; change ep",
        9: f"global_batch: {lay.global_batch} is not divisible by dp·micro_batch = {lay.dp}·{lay.micro_batch}",
        10: f"schedule: {lay.schedule} cannot be with pp {lay.pp}, vpp {lay.vpp} and {lay.microbatches} micro-batches; "
        "see plan.schedule.possible",
        11: f"context: {context} tokens cannot be cut into 2·cp = {2 * lay.cp} equal parts; change cp",
        12: f"placing: groups {lay.tp} and {lay.tp * lay.cp} ranks apart lie unevenly in nodes of {system.reach}; let tp and "
        f"tp·cp divide {system.reach} or be multiples of it",
    }[code]


RULES = (
    lambda lay, model, system, context: False,
    lambda lay, model, system, context: lay.chips != system.chips,
    lambda lay, model, system, context: model.heads % lay.tp != 0,
    lambda lay, model, system, context: _apart(model, lay.tp),
    lambda lay, model, system, context: _inner(model) % lay.tp != 0,
    lambda lay, model, system, context: -(model.layers + model.mtp) % places(lay) > PLACEHOLDERS,
    lambda lay, model, system, context: (model.experts.routed if model.experts else 1) % lay.ep != 0,
    lambda lay, model, system, context: (lay.cp * lay.dp) % lay.ep != 0,
    lambda lay, model, system, context: lay.global_batch % (lay.dp * lay.micro_batch) != 0,
    lambda lay, model, system, context: ~_possible(lay),
    lambda lay, model, system, context: (lay.cp > 1) & (context % (2 * lay.cp) != 0),
    lambda lay, model, system, context: (
        _uneven(system.reach, lay.tp) | _uneven(system.reach, lay.tp * lay.cp) | _uneven(system.reach, lay.tp * lay.ep)
    ),
)


def _inner(model: Model) -> int:
    return model.experts.width if model.experts else model.feed_forward


def _apart(model: Model, tp: np.ndarray) -> np.ndarray:
    if model.latent or model.compressed:
        return np.zeros(len(tp), dtype=bool)
    return (model.kv_heads % tp != 0) & (tp % model.kv_heads != 0)


def _uneven(reach: int, stride: np.ndarray) -> np.ndarray:
    return (reach % stride != 0) & (stride % reach != 0)


def _possible(lay: Layout) -> np.ndarray:
    """A pipeline of one stage is none, whatever the schedule."""
    found = (lay.pp == 1) & (lay.vpp == 1)
    for name in np.unique(lay.schedule):
        made = np.asarray(pipeline.possible(str(name), lay.pp, lay.vpp, lay.microbatches))
        found = found | ((lay.schedule == name) & (lay.pp > 1) & made)
    return found


def _words(layout: Layout) -> None:
    """LayoutError for a word that is none of those known."""
    known = {"recompute": RECOMPUTE, "schedule": pipeline.SCHEDULES, "kernels": KERNELS,
             "attention": (None, "flash", "plain"), "precision": tuple(PRECISIONS), "gemm": tuple(DTYPES)}  # fmt: skip
    for name in (*DEGREES, "zero"):
        if np.asarray(getattr(layout, name)).dtype.kind not in "iuf":
            raise LayoutError(f"{name} is {getattr(layout, name)!r}; give a whole number, or an array of them")
    for name, words in known.items():
        value = getattr(layout, name)
        for word in [value] if value is None or isinstance(value, str) else np.unique(value):
            if word not in words:
                raise LayoutError(f"{name} is {word!r}; use one of {', '.join(map(str, words))}")

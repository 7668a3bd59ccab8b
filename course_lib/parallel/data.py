"""Data parallelism: every rank has the whole model and a share of the rows, and gradients are averaged over the ranks.

    naive      after backward, one all-reduce for each gradient, one after another
    bucketed   backward fills flat buckets from the last layer to the first; a full one travels while backward goes on
    ddp        the same by PyTorch: DistributedDataParallel, with its `bucket_cap_mb` (arXiv:2006.15704)

The mean over all rows is the mean of the ranks' means, for their shares are equal. So gradients are summed and divided
by P. They are clipped after that: then every rank sees the whole gradient's norm, and scales alike.

P ranks, n numbers.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MB = 2**20  # bytes, as DDP's bucket_cap_mb counts them
WAYS = ("naive", "bucketed", "ddp")


def ring_all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum the ranks' x (n,) in place by a ring: 2(P-1) steps, in each of which a rank sends n/P numbers to the next.

    In the first P-1 steps partial sums travel on until each rank has one part in full (reduce-scatter); in the others
    the full parts travel round (all-gather).
    """
    P, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = x.tensor_split(P)  # (n/P,) each
    for step in range(2 * (P - 1)):
        given, taken = parts[(rank - step) % P], parts[(rank - step - 1) % P]  # (n/P,) each
        came = torch.empty_like(taken)  # (n/P,)
        send = dist.P2POp(dist.isend, given, group=group, group_peer=(rank + 1) % P)
        receive = dist.P2POp(dist.irecv, came, group=group, group_peer=(rank - 1) % P)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        taken.copy_(taken + came if step < P - 1 else came)  # (n/P,)
    return x


def share(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's rows: the first B/P of (B, …) on rank 0, and so on. ValueError where they do not divide evenly."""
    P = dist.get_world_size(group)
    if len(rows) % P:
        raise ValueError(f"{len(rows)} rows do not divide among {P} ranks; give a batch that is a multiple of {P}")
    return rows.chunk(P)[dist.get_rank(group)]


@torch.no_grad()
def mean(loss: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of the ranks' losses, a scalar; it has no gradient and is for the record."""
    loss = loss.detach().clone()
    dist.all_reduce(loss, group=group)
    return loss / dist.get_world_size(group)


def same_start(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the weights and buffers of the first."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)


@torch.no_grad()
def average(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Naive: after backward, average the gradients over the ranks one by one. Links idle in backward, compute here."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


class Buckets:
    """Gradients in flat tensors of about `megabytes`, each all-reduced as soon as backward has filled it.

    One all-reduce of many gradients pays the latency once, and it runs beside the rest of backward. `wait()` comes
    between backward and the optimizer. Where gradients accumulate over several passes, set `travel` for the last alone.
    """

    def __init__(self, model: nn.Module, megabytes: float = 25.0, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.travel = group, True
        self.place: dict[Tensor, tuple[int, Tensor]] = {}  # weight → number of its bucket, and its part of that
        self.flats: list[Tensor] = []
        for number, bucket in enumerate(fill([p for p in model.parameters() if p.requires_grad][::-1], megabytes * MB)):
            self.flats.append(bucket[0].new_zeros(sum(p.numel() for p in bucket)))  # (n,)
            for p, part in zip(bucket, self.flats[-1].split([p.numel() for p in bucket])):
                self.place[p] = number, part.view_as(p)
                p.register_post_accumulate_grad_hook(self.collect)
        self.begin()

    def begin(self) -> None:
        """No gradient has come yet, and nothing travels."""
        numbers = [number for number, _ in self.place.values()]
        self.missing = [numbers.count(number) for number in range(len(self.flats))]
        self.under_way: list[dist.Work] = []

    def collect(self, p: Tensor) -> None:
        """Called by backward when the gradient of `p` is there: it moves into its bucket, and a full bucket leaves."""
        if not self.travel:
            return
        number, part = self.place[p]
        part.copy_(p.grad)
        p.grad = part
        self.missing[number] -= 1
        if not self.missing[number]:
            self.under_way.append(dist.all_reduce(self.flats[number], group=self.group, async_op=True))

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for what is under way; then each gradient is the average. RuntimeError where some weight got none."""
        if any(self.missing):
            raise RuntimeError(
                f"{sum(self.missing)} weights got no gradient, and their buckets wait; freeze them before"
            )
        for work in self.under_way:
            work.wait()
        for flat in self.flats:
            flat /= dist.get_world_size(self.group)
        self.begin()


def fill(parameters: list[Tensor], most: float) -> list[list[Tensor]]:
    """The parameters in order, in lists of at most `most` bytes, or of one where that is larger."""
    lists, held = [], 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if not lists or held + size > most:
            lists, held = [*lists, []], 0
        lists[-1].append(p)
        held += size
    return lists


def replicate(model: nn.Module, way: str = "ddp", megabytes: float = 25.0, group: dist.ProcessGroup | None = None
              ) -> tuple[nn.Module, Callable[[], None]]:  # fmt: skip
    """The model to call, and what to call between backward and the optimizer. All ranks start with the first's weights."""
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; expected one of {', '.join(WAYS)}")
    if way == "ddp":
        return DistributedDataParallel(model, process_group=group, bucket_cap_mb=megabytes), lambda: None
    same_start(model, group)
    return model, Buckets(model, megabytes, group).wait if way == "bucketed" else partial(average, model, group)

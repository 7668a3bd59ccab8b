"""Context parallelism: each rank has a part of every sequence, and attention alone needs the other parts.

    gather   naive: all-gather keys and values of the whole sequence, then attend with one's own queries; their gradients
             are reduce-scattered. Memory for keys and values grows with T (as in Llama 3, arXiv:2407.21783)
    ring     keys and values travel round, n/P numbers at a time, while the rank attends to those that it has; results
             are joined by an online softmax. In backward they travel again, with their gradients (arXiv:2310.01889)

A token attends to those before it, so the rank with the last tokens has most to do. In zig-zag order each rank has two
pieces, one from either end, and all have the same (as in Llama 3). The loss of a rank is the mean over its tokens; the
gradients of weights are averaged over ranks, as in data parallelism.

B batch, T tokens of a sequence, t = T/P of a rank, m of a piece, H heads, G key/value heads, K head width, P ranks.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.layers import Attention, attend
from course_lib.llm.model import Transformer


class Order:
    """Which pieces of a sequence a rank has: piece r of P, or in zig-zag order pieces r and 2P-1-r of 2P."""

    def __init__(self, zigzag: bool = True, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.P, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.pieces = pieces(self.P, zigzag)  # of each rank

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of x (B, T, …) along `dim`: (B, t, …). ValueError where they do not divide evenly."""
        count = self.P * len(self.pieces[0])
        if x.shape[dim] % count:
            raise ValueError(f"{x.shape[dim]} tokens do not divide into {count} pieces; give sequences that do")
        cut = x.chunk(count, dim)
        return torch.cat([cut[i] for i in self.pieces[self.rank]], dim)

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """The pieces (B, H, m, K) of a rank's x (B, H, t, K)."""
        return x.chunk(len(self.pieces[0]), dim=-2)

    def visible(self, theirs: tuple[int, ...]) -> list[tuple[int, int, bool]]:
        """Which of this rank's pieces sees which of another's: the places of both, and whether they are the same."""
        mine = self.pieces[self.rank]
        return [(a, b, i == j) for a, i in enumerate(mine) for b, j in enumerate(theirs) if j <= i]

    def pass_on(self, x: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Send x to the next rank: what comes from the one before, and what to wait for."""
        if self.P == 1:
            return x, []
        x, came = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        send = dist.P2POp(dist.isend, x, group=self.group, group_peer=(self.rank + 1) % self.P)
        receive = dist.P2POp(dist.irecv, came, group=self.group, group_peer=(self.rank - 1) % self.P)
        return came, dist.batch_isend_irecv([send, receive])

    def round(self, x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The pieces and the x of every rank, one's own first; the next x comes while the caller computes with one."""
        for step in range(self.P):
            came, under_way = self.pass_on(x) if step < self.P - 1 else (x, [])
            yield self.pieces[(self.rank - step) % self.P], x
            for work in under_way:
                work.wait()
            x = came


def pieces(P: int, zigzag: bool) -> list[tuple[int, ...]]:
    """The pieces of a sequence that each of P ranks has."""
    return [(r, 2 * P - 1 - r) if zigzag else (r,) for r in range(P)]


def pairs(T: int, P: int, zigzag: bool) -> list[int]:
    """How many (query, key) pairs of T tokens each of P ranks computes. Highest over mean is the imbalance."""
    m = T // len(pieces(P, zigzag)[0]) // P
    return [sum(m * m * i + m * (m + 1) // 2 for i in mine) for mine in pieces(P, zigzag)]


class Gathered(torch.autograd.Function):
    """Every rank's x (…) on every rank: (P, …); backward sums the gradients of each x on its rank."""

    @staticmethod
    def forward(context: object, x: Tensor, order: Order) -> Tensor:
        context.order = order
        every = x.new_empty((order.P, *x.shape))  # (P, …)
        dist.all_gather(list(every), x.contiguous(), group=order.group)
        return every

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        mine = torch.empty_like(gradient[0])
        dist.reduce_scatter(mine, list(gradient.contiguous()), group=context.order.group)
        return mine, None


def gather_attention(order: Order, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of this rank's q (B, H, t, K) to all ranks' k and v (B, G, t, K): (B, H, t, K)."""
    every = Gathered.apply(torch.stack((k, v)), order)  # (P, 2, B, G, t, K)
    found = {i: piece for mine, kv in zip(order.pieces, every) for i, piece in zip(mine, order.cut(kv))}
    k, v = torch.cat([found[i] for i in range(len(found))], dim=-2)  # (B, G, T, K) each
    results = []
    for i, piece in zip(order.pieces[order.rank], order.cut(q)):
        end = (i + 1) * piece.shape[-2]  # what is later is not computed
        results.append(attend(piece, k[:, :, :end], v[:, :, :end]))  # (B, H, m, K)
    return torch.cat(results, dim=-2)


class Ring(torch.autograd.Function):
    """Causal attention, with keys and values that travel round: q (B, H, t, K), k and v (B, G, t, K) to (B, H, t, K).

    Inside, the queries of all heads that share a key lie below each other, (B, G, n, K) with n = m·H/G rows.
    """

    @staticmethod
    def forward(context: object, q: Tensor, k: Tensor, v: Tensor, order: Order) -> Tensor:
        queries = [fold(piece, k.shape[1]) for piece in order.cut(q)]  # (B, G, n, K) each
        outs = [torch.zeros_like(x, dtype=torch.float32) for x in queries]  # (B, G, n, K) each
        sums = [x.new_full((*x.shape[:-1], 1), -torch.inf) for x in outs]  # (B, G, n, 1) each: log of the sum of exp
        for theirs, kv in order.round(torch.stack((k, v))):
            for a, b, same in order.visible(theirs):
                keys, values = order.cut(kv)[b]  # (B, G, m, K) each
                s = scores(queries[a], keys, same)  # (B, G, n, m)
                log_sum = torch.logaddexp(sums[a], s.logsumexp(-1, keepdim=True))  # (B, G, n, 1)
                outs[a] = outs[a] * (sums[a] - log_sum).exp() + (s - log_sum).exp().to(v.dtype) @ values
                sums[a] = log_sum
        out = torch.cat([unfold(x, q.shape[1]) for x in outs], dim=-2).to(q.dtype)  # (B, H, t, K)
        context.order = order
        context.save_for_backward(q, k, v, out, torch.stack(sums))
        return out

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, sums), order = context.saved_tensors, context.order
        queries, grads, outs = ([fold(piece, k.shape[1]) for piece in order.cut(x)] for x in (q, gradient, out))
        deltas = [(g * o).sum(-1, keepdim=True) for g, o in zip(grads, outs)]  # (B, G, n, 1) each
        dq = [torch.zeros_like(x) for x in queries]  # (B, G, n, K) each
        came, under_way = torch.zeros(2, *k.shape, dtype=k.dtype, device=k.device), []  # (2, B, G, t, K)
        for theirs, kv in order.round(torch.stack((k, v))):
            dkv = torch.zeros_like(kv)  # (2, B, G, t, K)
            for a, b, same in order.visible(theirs):
                (keys, values), (dk, dv) = order.cut(kv)[b], order.cut(dkv)[b]  # (B, G, m, K) each
                p = (scores(queries[a], keys, same) - sums[a]).exp().to(v.dtype)  # (B, G, n, m)
                ds = p * (grads[a] @ values.mT - deltas[a]) * keys.shape[-1] ** -0.5  # (B, G, n, m)
                dq[a] += ds @ keys
                dk += ds.mT @ queries[a]
                dv += p.mT @ grads[a]
            for work in under_way:
                work.wait()
            came, under_way = order.pass_on(dkv + came)  # on to where these keys go next, and home at the end
        for work in under_way:
            work.wait()
        return torch.cat([unfold(x, q.shape[1]) for x in dq], dim=-2), came[0], came[1], None


def fold(x: Tensor, G: int) -> Tensor:
    """(B, H, m, K) as (B, G, m·H/G, K)."""
    return x.reshape(x.shape[0], G, -1, x.shape[-1])


def unfold(x: Tensor, H: int) -> Tensor:
    """(B, G, m·H/G, K) as (B, H, m, K)."""
    return x.reshape(x.shape[0], H, -1, x.shape[-1])


def scores(q: Tensor, k: Tensor, same: bool) -> Tensor:
    """q (B, G, n, K) times k (B, G, m, K), in float32: (B, G, n, m); causal where both are of the `same` piece."""
    s = (q @ k.mT).float() * k.shape[-1] ** -0.5  # (B, G, n, m)
    if not same:
        return s
    later = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)  # (m, m)
    return s.masked_fill(later.repeat(q.shape[-2] // k.shape[-2], 1), -torch.inf)


def ring_attention(order: Order, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As gather_attention, by a ring."""
    return Ring.apply(q, k, v, order)


WAYS = {"gather": gather_attention, "ring": ring_attention}


class PartAttention(Attention):
    """Attention of a rank's tokens to those of all."""

    order: Order
    way: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return WAYS[self.way](self.order, q, k, v)


class PartTransformer(Transformer):
    """A model that is given a rank's tokens, which have their places in the whole sequence."""

    order: Order

    def angles(self, T: int, cache: Cache | PagedCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None:
            raise ValueError("a sequence that is split over ranks has no cache; generate without context parallelism")
        cos, sin = super().angles(T * self.order.P, None)  # (T, K/2) each
        return self.order.part(cos, 0), self.order.part(sin, 0)  # (t, K/2) each


def split_context(model: Transformer, way: str = "ring", zigzag: bool = True, group: dist.ProcessGroup | None = None
                  ) -> Order:  # fmt: skip
    """Let `model` take parts of sequences; what is returned cuts them: `model(order.part(tokens), order.part(targets))`.

    ValueError for another way, and for models whose layers look at other tokens outside of grouped-query attention.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; expected one of {', '.join(WAYS)}")
    if model.config.latent or model.config.experts or model.config.mtp:
        raise ValueError(
            "context parallelism here is for grouped-query attention and SwiGLU; take a preset without -v3"
        )
    order = Order(zigzag, group)
    model.__class__, model.order = PartTransformer, order  # the same module with other methods, so that names stay
    for block in model.blocks:
        block.attention.__class__, block.attention.order, block.attention.way = PartAttention, order, way
    return order

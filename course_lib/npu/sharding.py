"""How DTensor divides ``F.linear``'s backward, which the device keeps whole where PyTorch takes it apart (see linear.py).

Imported with the first process group, for DTensor takes a while to load.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding


@register_sharding(torch.ops.aten.linear_backward.default)
def linear_backward(x: Any, grad: Any, weight: Any, mask: list[bool]) -> Sequence[tuple[list, list]]:
    """Gradients of input, weight and bias, by how input (…, K), their gradient (…, N) and weight (N, K) are divided."""
    last = len(x.shape) - 1
    ways = [
        ([Replicate(), Replicate(), Replicate()], [Replicate(), Replicate(), Replicate()]),
        ([Partial(), Shard(0), Shard(0)], [Replicate(), Shard(last), Shard(0)]),  # weight by columns
        ([Shard(last), Shard(1), Replicate()], [Shard(last), Replicate(), Shard(1)]),  # weight by rows
        *(([Shard(dim), Partial(), Partial()], [Shard(dim), Shard(dim), Replicate()]) for dim in range(last)),
    ]
    return [([out if wanted else None for out, wanted in zip(outs, mask)], [*ins, None]) for outs, ins in ways]

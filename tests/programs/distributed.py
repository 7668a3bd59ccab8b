"""Data parallel: every rank takes its share of each batch. Under torchrun, by launch(), or alone as the only rank."""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from course_lib.llm.device import mark, seconds_between
from course_lib.parallel import ranks


def train(device: torch.device) -> tuple[list[float], float]:
    """The loss of each step over the whole batch, and the seconds that all of them took."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 32, 16), torch.randn(4, 32, 1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, start = [], mark(device)
    for x, y in zip(inputs, targets):
        loss = F.mse_loss(model(x.chunk(world)[rank].to(device)), y.chunk(world)[rank].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, seconds_between(start, mark(device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--system")
    parser.add_argument("--clock", action="store_true", help="print the seconds too")
    args = parser.parse_args()
    with ranks(args.device, args.system) as device:
        losses, seconds = train(device)
        if dist.get_rank() == 0:
            for step, loss in enumerate(losses):
                print(f"step {step} loss {loss:.6f}")
            if args.clock:
                print(f"{seconds:.12f} s")

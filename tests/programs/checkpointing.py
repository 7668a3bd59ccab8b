"""Gradient checkpointing with dropout: each block is computed again in backward, with the same random numbers."""

import argparse

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
device = torch.device(parser.parse_args().device)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.layers(x)


torch.manual_seed(0)
blocks = nn.ModuleList(Block(32) for _ in range(4)).to(device)
optimizer = torch.optim.Adam(blocks.parameters(), lr=1e-3)
x, y = torch.randn(16, 8, 32, device="cpu").to(device), torch.randn(16, 8, 32, device="cpu").to(device)

for step in range(6):
    optimizer.zero_grad(set_to_none=False)
    h = x
    for number, block in enumerate(blocks):
        h = checkpoint(block, h, use_reentrant=number % 2 == 0 and h.requires_grad)
    loss = (h - y).square().mean()
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item():.6f}")

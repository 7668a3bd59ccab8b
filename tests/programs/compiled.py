"""torch.compile with the eager backend: Dynamo traces the program, PyTorch's own kernels run it."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
device = torch.device(parser.parse_args().device)

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 50)).to(device)
compiled = torch.compile(model, backend="eager")
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
tokens = torch.randint(50, (8, 17)).to(device)

for step in range(6):
    loss = nn.functional.cross_entropy(compiled(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")

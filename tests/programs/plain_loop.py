"""The plainest loop: a small convolutional network, SGD with momentum, a scheduler, evaluation."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
device = torch.device(parser.parse_args().device)

torch.manual_seed(0)
images, labels = torch.randn(256, 1, 12, 12), torch.randint(10, (256,))
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
).to(device)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)

for epoch in range(4):
    model.train()
    for start in range(0, len(images), 64):
        x, y = images[start : start + 64].to(device), labels[start : start + 64].to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        right = (model(images.to(device)).argmax(1) == labels.to(device)).float().mean().item()
    print(f"epoch {epoch} loss {loss.item():.6f} accuracy {right:.6f}")

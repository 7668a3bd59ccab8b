"""A DataLoader with workers and pinned memory feeds an LSTM; the state goes to a file and comes back."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")


class Waves(Dataset):
    """Sine waves; the next value is to be predicted."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        t = torch.arange(21) * (0.1 + 0.01 * index)
        return t.sin()[:-1, None], t.sin()[1:, None]


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 16, num_layers=2, batch_first=True), nn.Linear(16, 1)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def main():
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    model = Predictor().to(device)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-3)
    loader = DataLoader(Waves(), batch_size=16, num_workers=2, pin_memory=device.type != "cpu")
    for epoch in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.huber_loss(model(x.to(device, non_blocking=True)), y.to(device, non_blocking=True))
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item():.6f}")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / "state.pt")
        state = torch.load(Path(folder) / "state.pt", map_location=device)
    again = Predictor().to(device)
    again.load_state_dict(state["model"])
    with torch.no_grad():
        print(f"restored loss {nn.functional.huber_loss(again(x.to(device)), y.to(device)).item():.6f}")


if __name__ == "__main__":
    main()

"""Two processes, the same ledger, byte for byte: whatever hash seed, threads or machine."""

import os
import subprocess
import sys

SCRIPT = """
import sys, torch
from course_lib import npu
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(50, 32), torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.nn.Linear(32, 50)).to("npu")
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
side = torch.npu.Stream()
with npu.ledger() as ledger:
    for _ in range(2):
        ids = torch.randint(50, (4, 16)).to("npu")
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.npu.stream(side):
            loss.item()
sys.stdout.write(ledger.to_json())
print(ledger.memory_at_peak(), sorted(torch.npu.memory_stats().items()), ledger.totals())
"""


def start(hash_seed: str, threads: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, threads], env=env, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_the_same_ledger() -> None:
    runs = [start("1", "1"), start("4242", "2")]
    first, second = (run.communicate(timeout=120)[0] for run in runs)
    assert first.count("\n") > 100 and first == second

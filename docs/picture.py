"""Draws docs/picture.png, the README's picture: ``python docs/picture.py``. All that it shows is computed."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from course_lib import npu, show  # noqa: E402
from course_lib.llm.trainer import Settings, Trainer  # noqa: E402

torch.set_num_threads(1)
trainer = Trainer(Settings(steps=3), "npu")
for number in (1, 2):
    trainer.step(number)
with npu.ledger() as ledger:
    trainer.step(3)
capacity = torch.npu.get_device_properties().total_memory
show.memory_over_step(ledger, capacity, title="One training step: every byte of device memory, and what it is for")
plt.savefig(Path(__file__).with_name("picture.png"), dpi=110)

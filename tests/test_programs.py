"""Scripts that know nothing of the emulation give the same losses on npu as on cpu."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
NUMBER = re.compile(r"-?\d+\.\d+")
# In float16 products round differently with the order of their sums
TOLERANCE = {"mixed_precision": 2e-2}


def run(*command: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(file.stem for file in PROGRAMS.glob("[a-z]*.py")))
def test_same_losses_on_npu_as_on_cpu(name: str) -> None:
    program = str(PROGRAMS / f"{name}.py")
    cpu = run(program, "--device", "cpu")
    output = run("-m", "course_lib.npu", "--chip", "ascend-910b2", program, "--device", "npu")
    npu, ledger = output.split("\n── ")
    assert NUMBER.sub("#", npu).strip() == NUMBER.sub("#", cpu).strip()
    assert len(NUMBER.findall(cpu)) >= 3
    for a, b in zip(NUMBER.findall(npu), NUMBER.findall(cpu)):
        assert float(a) == pytest.approx(float(b), abs=TOLERANCE.get(name, 2e-4))
    for phase in ("forward", "backward", "optimizer"):
        assert re.search(rf"^{phase} +\d", ledger, re.MULTILINE), f"the ledger has no {phase}"

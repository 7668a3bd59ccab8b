"""python -m course_lib.npu runs a script that knows nothing of the emulation."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
model = torch.nn.Linear(64, 64).to("npu")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(torch.randn(32, 64, device="npu")).square().mean()
loss.backward()
optimizer.step()
print("arguments", sys.argv[1:], torch.npu.get_device_name(), __name__)
sys.exit(int(sys.argv[1]))
"""


def run(*arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "course_lib.npu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=60)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def test_summary_arguments_and_exit_status(script, tmp_path):
    trace = tmp_path / "trace.json"
    done = run("--chip", "ascend-910b2", "--trace", str(trace), script, "3", "--chip", "other")
    assert done.returncode == 3
    assert "arguments ['3', '--chip', 'other'] Ascend 910B2 __main__" in done.stdout
    for phase in ("forward", "backward", "optimizer"):
        assert f"\n{phase} " in done.stdout
    assert f"({2 * 2 * 32 * 64 * 64:,} cube" in done.stdout  # forward, and the weight's gradient; the input needs none
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--chip", "nope"), "no chip named 'nope'; there are"), (("--count", "0"), "number of devices"), (("--chip", "ascend-310"), "unknown")],
)
def test_bad_options_are_one_line(script, arguments, message):
    done = run(*arguments, script, "0")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_script():
    done = run("absent.py")
    assert done.returncode == 2
    assert "no script at 'absent.py'" in done.stderr


def test_script_without_device_is_told(tmp_path):
    path = tmp_path / "nothing.py"
    path.write_text("print('hello')")
    assert 'Does the script use device="npu"?' in run(str(path)).stdout


def test_real_torch_npu_comes_first(tmp_path):
    (tmp_path / "torch_npu.py").write_text("")
    code = "from course_lib import npu; print(npu.EMULATED); npu.use()"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "False\n"
    assert "nothing is emulated" in done.stderr
    assert "belongs to the emulated NPU" in done.stderr
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | {"COURSE_EMULATE": "1"}, timeout=60)
    assert (asked.stdout, asked.returncode) == ("True\n", 0)

"""The emulated NPU as a PyTorch device. One line makes it real: ``import course_lib.npu``.

    import torch
    from course_lib import npu                    # where real hardware has: import torch_npu

    npu.use("ascend-910b2", count=8)              # or COURSE_CHIP=ascend-910b2; "mini" by itself
    x = torch.randn(1024, 1024, device="npu")
    with npu.ledger() as ledger:
        y = x @ x
    print(ledger.table(by="op"))

Where a real torch_npu is installed it is used, with a warning, and nothing is emulated: ``EMULATED`` is
False, and ``use`` and ``ledger`` say why they cannot work. ``COURSE_EMULATE=1`` asks for the emulation.
"""

from course_lib.npu import real
from course_lib.npu.ledger import Ledger, ledger
from course_lib.npu.runtime import use

EMULATED = real.emulate()
if EMULATED:
    from course_lib.npu import collectives, device, hccl  # noqa: F401, the first registers its operators

    device.attach(device)
    hccl.attach()
    use()

__all__ = ["EMULATED", "Ledger", "ledger", "use"]

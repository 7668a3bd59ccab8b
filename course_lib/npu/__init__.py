"""The emulated NPU as a PyTorch device. One line makes it real: ``import course_lib.npu``.

    import torch
    from course_lib import npu                    # where real hardware has: import torch_npu

    npu.use("ascend-910b2", count=8)              # or COURSE_CHIP=ascend-910b2; "mini" by itself
    x = torch.randn(1024, 1024, device="npu")
    with npu.ledger() as ledger:
        y = x @ x
    print(ledger.table(by="op"))
"""

from course_lib.npu import device as _device
from course_lib.npu import runtime
from course_lib.npu.ledger import Ledger, ledger
from course_lib.npu.runtime import use

_device.attach(_device)
runtime.use()

__all__ = ["Ledger", "ledger", "use"]

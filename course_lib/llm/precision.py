"""Number formats of training: the same step in float32, bf16, fp16 or fp8, with weights kept in float32.

    float32   all of it
    bf16      matrix products and attention with 8 significant bits and the exponents of float32 (autocast)
    fp16      with 11 significant bits, and exponents down to 2⁻²⁴ only: what is smaller becomes zero. So the loss is
              multiplied by a large number before backward, and the gradients divided by it after (loss scaling)
    fp8       as bf16, with the layers' products of 4 significant bits and a scale per block (fp8.py)

Norms, softmax, the loss, the residual stream and the optimizer stay in float32 (autocast's own rules).
"""

from contextlib import AbstractContextManager, nullcontext

import torch

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
PEAK = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}  # V3's MFU is against bf16 too


def check(precision: str) -> None:
    """ValueError for a precision that there is not."""
    if precision not in AUTOCAST:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(AUTOCAST)}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Within it the forward pass has this precision."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def make_scaler(precision: str, scaling: bool, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: for fp16 from 65536 on, halved after a step that overflows; else it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=scaling and precision == "fp16")

"""``module.to("npu")`` keeps its parameter objects, so that tied weights stay tied and optimizers keep what they hold.

PyTorch does so where it *swaps* the contents of old and new parameter. It has one switch for that, which also makes
``load_state_dict`` swap; there it copies instead, for a recurrent layer's parameters refuse to be swapped.
"""

from typing import Any

import torch
from torch.__future__ import set_swap_module_params_on_conversion

_load_state_dict = torch.nn.Module.load_state_dict


def load_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``Module.load_state_dict`` that copies numbers into the parameters that are there."""
    set_swap_module_params_on_conversion(False)
    try:
        return _load_state_dict(self, *args, **kwargs)
    finally:
        set_swap_module_params_on_conversion(True)


def attach() -> None:
    set_swap_module_params_on_conversion(True)
    load_state_dict.__doc__ = _load_state_dict.__doc__
    torch.nn.Module.load_state_dict = load_state_dict

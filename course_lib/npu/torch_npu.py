"""What a program finds in torch_npu, on the emulated device: ``from course_lib.npu import torch_npu``.

    out = torch_npu.npu_fusion_attention(q, k, v, heads, "BSND", scale=K**-0.5)[0]

Where the real torch_npu is in use, this module *is* that one. Arguments that the emulation lacks raise
NotImplementedError with their name and the reason. The functions also take tensors on ``cpu``, as a reference.
"""

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import npu as emulation

if not emulation.EMULATED:
    sys.modules[__name__] = importlib.import_module("torch_npu")
else:
    from course_lib.npu import device as npu  # noqa: F401  torch_npu.npu is torch.npu
    from course_lib.npu import profiler  # noqa: F401
    from course_lib.npu.fused import npu_add_rms_norm, npu_geglu, npu_rms_norm, npu_rotary_mul, npu_swiglu  # noqa: F401
    from course_lib.npu.fusion_attention import npu_fusion_attention, npu_fusion_attention_v2  # noqa: F401
    from course_lib.npu.fused_experts import (  # noqa: F401
        npu_grouped_matmul, npu_moe_gating_top_k_softmax, npu_moe_token_permute, npu_moe_token_unpermute,
    )  # fmt: skip
    from course_lib.npu.fused_loss import npu_apply_adam_w, npu_cross_entropy_loss, npu_scaled_masked_softmax  # noqa: F401
    from course_lib.npu.fused_serving import (  # noqa: F401
        npu_fast_gelu, npu_ffn, npu_kv_rmsnorm_rope_cache, npu_moe_gating_top_k, npu_moe_init_routing_v2, npu_moe_re_routing, npu_scatter_nd_update,
    )  # fmt: skip
    from course_lib.npu.infer_attention import npu_fused_infer_attention_score, npu_incre_flash_attention, npu_prompt_flash_attention  # noqa: F401
    from course_lib.npu.quantised import (  # noqa: F401
        npu_dequant_swiglu_quant, npu_dynamic_quant, npu_quant_matmul, npu_quantize, npu_weight_quant_batchmatmul,
    )  # fmt: skip
    from course_lib.npu.refused import COLLECTIVES

    globals().update(COLLECTIVES)  # what raises, with its reason


def npu_dtype_cast(self: Tensor, dtype: torch.dtype) -> Tensor:
    return self.to(dtype)


def npu_format_cast(self: Tensor, acl_format: int, *args: Any, **kwargs: Any) -> Tensor:
    """The tensor itself. A real chip may store matrices in 16 × 16 tiles (FRACTAL_NZ); here bytes have one order."""
    return self


def npu_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


def npu_gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(self, approximate=approximate)


def npu_confusion_transpose(self: Tensor, perm: list[int], shape: list[int], transpose_first: bool) -> Tensor:
    """A transposition and a reshape in one copy, in either order."""
    return self.permute(perm).reshape(shape) if transpose_first else self.reshape(shape).permute(perm).contiguous()


def get_npu_format(self: Tensor) -> int:
    """2 (ND), the only order of bytes here."""
    return 2


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch_npu.{name} is not emulated; course_lib.npu.torch_npu has {', '.join(sorted(n for n in globals() if n.startswith('npu_')))}")

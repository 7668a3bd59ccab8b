"""Closed forms for language models: parameters, FLOPs, memory, time, from shapes alone. NumPy only, never torch.

>>> from course_lib import plan
>>> plan.count(plan.load_model("deepseek-v3")).total
671026419200
"""

from course_lib.plan import activations, flops, memory, operators, run
from course_lib.plan.layers import Count, count
from course_lib.plan.model import Model, ModelError, load_model, models, published

__all__ = [
    "Count", "Model", "ModelError", "activations", "count", "flops", "load_model", "memory", "models", "operators",
    "published", "run",
]  # fmt: skip

"""Where in the program an operator is launched: its phase and its module, found without the program's help.

* **phase**: ``backward`` while autograd runs (``recompute`` where it runs a module again, as checkpointing
  does), ``optimizer`` inside an optimizer's step, ``forward`` inside a module's call or on a tensor that
  requires grad, ``other`` elsewhere. ``phase("prefill")`` overrides all of these.
* **module**: the path below the outermost module that is being called. In backward, the path under which
  the operator's autograd node was made: nodes are numbered in order, so it is enough to note the next
  number at each entry and exit.

Hooks are installed only while a ledger listens.
"""

import bisect

import torch
from torch.nn.modules import module as nn_hooks
from torch.optim import optimizer as optim_hooks

_next_node = torch._C._autograd._get_sequence_nr
_in_backward = torch._C._current_graph_task_id
_node = torch._C._current_autograd_node
_UNNUMBERED = 2**62


class Where:
    """The program's place now; one for the process, open while at least one ledger is."""

    def __init__(self) -> None:
        self.listeners, self.handles, self.override = 0, [], []
        self._clear()

    def _clear(self) -> None:
        self.stack: list[str] = []
        self.names: dict[int, str] = {}
        self.roots: dict[int, torch.nn.Module] = {}
        self.starts, self.paths = [0], [""]
        self.stepping = False

    def open(self) -> None:
        self.listeners += 1
        if self.listeners == 1:
            self._clear()
            self.starts[0] = _next_node()
            self.handles = [
                nn_hooks.register_module_forward_pre_hook(self._enter),
                nn_hooks.register_module_forward_hook(self._leave, always_call=True),
                optim_hooks.register_optimizer_step_pre_hook(self._step_begins),
                optim_hooks.register_optimizer_step_post_hook(self._step_ends),
            ]

    def close(self) -> None:
        self.listeners -= 1
        if self.listeners == 0:
            for root in self.roots.values():
                mark((p.grad for p in root.parameters()), "gradients")
            for handle in self.handles:
                handle.remove()
            self._clear()

    # -- the two questions --

    def now(self, tensors: list[torch.Tensor]) -> tuple[str, str]:
        """(phase, module path) of an operator on ``tensors`` that is being launched."""
        backward = _in_backward() != -1
        if self.stack:
            path, phase = self.stack[-1], "recompute" if backward else "optimizer" if self.stepping else "forward"
        elif backward:
            path, phase = self._path_of_node(), "backward"
        elif self.stepping:
            path, phase = "", "optimizer"
        else:
            path, phase = "", "forward" if any([t.requires_grad for t in tensors]) else "other"
        return (self.override[-1] if self.override else phase), path

    def _path_of_node(self) -> str:
        node = _node()
        number = node._sequence_nr() if node is not None else 0
        if number >= _UNNUMBERED:  # AccumulateGrad: made for a parameter, not by an operator
            return self.names.get(id(node.variable), "")
        return self.paths[bisect.bisect_right(self.starts, number) - 1]

    # -- hooks --

    def _enter(self, module: torch.nn.Module, args: tuple) -> None:
        if not self.stack:
            self.stepping = False
            if id(module) not in self.roots:
                self._meet(module)
        path = self.names.get(id(module))
        if path is None:
            path = self.names[id(module)] = f"{self.stack[-1]}.{type(module).__name__}"
        self.stack.append(path)
        self._note(path)

    def _leave(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        if self.stack:
            self.stack.pop()
        self._note(self.stack[-1] if self.stack else "")

    def _note(self, path: str) -> None:
        at = _next_node()
        if at == self.starts[-1]:
            self.paths[-1] = path
        elif at > self.starts[-1]:
            self.starts.append(at)
            self.paths.append(path)

    def _meet(self, root: torch.nn.Module) -> None:
        """Learn the names below an outermost module, and that its parameters are weights."""
        self.roots[id(root)] = root
        top = type(root).__name__
        for name, child in root.named_modules():
            path = f"{top}.{name}" if name else top
            self.names.setdefault(id(child), path)
            for parameter in child.parameters(recurse=False):
                self.names.setdefault(id(parameter), path)
        mark(root.parameters(), "weights")
        mark(root.buffers(), "weights")

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.stepping = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        mark(parameters, "weights")
        mark((p.grad for p in parameters), "gradients")

    def _step_ends(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.stepping = False
        for state in optimizer.state.values():
            mark((t for t in state.values() if isinstance(t, torch.Tensor)), "optimizer state")


def mark(tensors: object, category: str) -> None:
    """Say what the memory of these tensors is for."""
    for t in tensors:
        held = getattr(t, "_held", None)
        if held is not None:
            held.category = category


DEFAULT_CATEGORY = {"forward": "activations", "recompute": "activations", "backward": "temporaries", "optimizer": "temporaries"}


def category_of(phase: str) -> str:
    """What memory is for when nothing more is known than the phase in which it was taken."""
    return DEFAULT_CATEGORY.get(phase, "other")


where = Where()

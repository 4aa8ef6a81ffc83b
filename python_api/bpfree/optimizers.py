"""How a rule's gradients reach the parameters: through a torch optimizer, in one of three ways.

* **fused**: the layer's op computes the gradient and applies it before the weight leaves the chip;
* **applied**: the gradient exists for a moment, and `bpfree_kernels.apply_update` applies it;
* **.grad**: the gradient goes to ``.grad``, and the optimizer's own ``step()`` applies it.

The first two read the hyper-parameters from the torch optimizer's groups at every step and keep
their state in its ``state``, in the layout that torch itself makes: its ``state_dict``, learning
rate schedulers, and a later ``optimizer.step()`` all work on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.stages import Layer
from bpfree_kernels.reference.update import cut
from bpfree_kernels.update import UpdateRule

_NO_STATE = kernels.ParamState()


class Updates(ABC):
    """What becomes of the gradients of one step."""

    @abstractmethod
    def wants(self, param: Tensor) -> bool:
        """Whether a parameter learns."""

    @abstractmethod
    def fused(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[UpdateRule, kernels.LayerState] | None:
        """Rule and state with which an op can update a layer itself; ``None`` if none can."""

    @abstractmethod
    def deliver(self, param: Tensor, grad: Tensor, max_norm: float | None = None) -> None:
        """Hand over the gradient of a parameter; one that does not learn drops it.

        Args:
            param: the parameter.
            grad: its gradient, shaped like it.
            max_norm: length to which a longer gradient is cut; ``None``: whatever its length.
        """

    def wants_any(self, layer: Layer) -> bool:
        """Whether the weight or the bias of a layer learns."""
        return self.wants(layer.weight) or (layer.bias is not None and self.wants(layer.bias))

    def deliver_layer(self, layer: Layer, of_weight: Tensor | None, of_bias: Tensor | None) -> None:
        """Hand over the gradients of a layer's weight and bias, those that there are."""
        if of_weight is not None:
            self.deliver(layer.weight, of_weight)
        if layer.bias is not None and of_bias is not None:
            self.deliver(layer.bias, of_bias)


class GradientStore(Updates):
    """Adds every gradient to the parameter's ``.grad``, as ``loss.backward()`` does."""

    def wants(self, param: Tensor) -> bool:
        """Whether the parameter requires a gradient."""
        return param.requires_grad

    def fused(self, weight: Tensor, bias: Tensor | None) -> None:
        """Nothing is updated, so no op may do so."""

    def deliver(self, param: Tensor, grad: Tensor, max_norm: float | None = None) -> None:
        """Add to ``.grad``."""
        if not param.requires_grad:
            return
        grad = _cut(grad, max_norm)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.add_(grad)


def _cut(grad: Tensor, max_norm: float | None) -> Tensor:
    """A gradient, no longer than `max_norm`."""
    return grad if max_norm is None else cut(grad, max_norm)


class OptimizerBridge(Updates):
    """Runs a torch optimizer: inside the kernels where they know it, else by its own ``step()``."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        in_kernel: bool,
        backend: str | None,
    ) -> None:
        """Check the optimizer.

        Args:
            optimizer: a torch optimizer of parameters of the model; it may leave some out.
            model: the model.
            in_kernel: whether the kernels may run it; ``False`` always takes ``optimizer.step()``.
            backend: backend of the ops, ``None`` for the device's default.

        Raises:
            TypeError: no torch optimizer, or one that calls the model again (`torch.optim.LBFGS`).
            ValueError: a parameter that is not the model's.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer LBFGS needs a closure, which no rule without backprop has.")
        self.optimizer = optimizer
        self._backend = backend
        self._allowed = in_kernel
        self._group_of: dict[Tensor, int] = {}
        self._known = {id(parameter) for parameter in model.parameters()}
        self._members: list[list[int]] = []
        self._groups: list[_GroupRule] = []
        self._delivered = False
        self.refresh()

    def refresh(self) -> None:
        """Read the optimizer's groups again; called before every step, so it is cheap.

        Raises:
            ValueError: a parameter that is not the model's.
        """
        groups = self.optimizer.param_groups
        members = [list(map(id, group["params"])) for group in groups]
        if members != self._members:
            self._check_members(groups)
            self._members = members
            self._group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
            self._groups = [_GroupRule(self.optimizer, self._allowed) for _ in groups]
        hooked = bool(
            self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks
        )
        for rule, group in zip(self._groups, groups, strict=True):
            rule.refresh(group, hooked)

    def _check_members(self, groups: list[dict[str, Any]]) -> None:
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                if id(parameter) not in self._known:
                    raise ValueError(
                        f"optimizer holds a parameter of shape {tuple(parameter.shape)} in group "
                        f"{number} that is not the model's."
                    )

    def begin(self) -> None:
        """Start a step."""
        self.refresh()
        self._delivered = False

    def finish(self) -> None:
        """End a step: let the optimizer apply what went to ``.grad``."""
        if self._delivered:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            # What optimizer.step() leaves for a learning rate scheduler, which else would warn.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def wants(self, param: Tensor) -> bool:
        """Whether the parameter requires a gradient and is the optimizer's."""
        return param.requires_grad and param in self._group_of

    def fused(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[UpdateRule, kernels.LayerState] | None:
        """Rule and state if the kernels run the optimizer and weight and bias learn alike."""
        group = self._common_group(weight, bias)
        if group is None or group.rule is None:
            return None
        of_bias = _NO_STATE if bias is None else self._state(bias)
        return group.rule, kernels.LayerState(self._state(weight), of_bias)

    def can_fuse(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether `fused` would return a rule; makes no state."""
        group = self._common_group(weight, bias)
        return group is not None and group.rule is not None

    def deliver(self, param: Tensor, grad: Tensor, max_norm: float | None = None) -> None:
        """Apply the gradient in the kernels, or keep it in ``.grad`` for `finish`."""
        if not self.wants(param):
            return
        group = self._groups[self._group_of[param]]
        if group.rule is not None:
            kernels.apply_update(
                param, grad, group.rule, self._state(param),
                max_norm=max_norm, backend=self._backend,
            )  # fmt: skip
            return
        if not self._delivered:
            # A gradient left from elsewhere is not part of this step.
            self.optimizer.zero_grad(set_to_none=True)
            self._delivered = True
        param.grad = _cut(grad, max_norm)

    def why(self, param: Tensor) -> str:
        """Why the kernels do not update a parameter, for `Learner.explain`; empty if they do."""
        if not param.requires_grad:
            return "it requires no gradient"
        if param not in self._group_of:
            return "it is not in the optimizer"
        return self._groups[self._group_of[param]].reason

    def _common_group(self, weight: Tensor, bias: Tensor | None) -> _GroupRule | None:
        """The group of weight and bias, ``None`` if they do not learn alike."""
        if not self.wants(weight):
            return None
        group = self._groups[self._group_of[weight]]
        if bias is None:
            return group
        if not self.wants(bias):
            return None
        return group if group.same_rule(self._groups[self._group_of[bias]]) else None

    def _state(self, param: Tensor) -> kernels.ParamState:
        """The state that torch keeps for a parameter; made as torch makes it at the first step."""
        group = self._groups[self._group_of[param]]
        if group.momentum == 0:
            return _NO_STATE
        entry = self.optimizer.state[param]
        if group.momentum is not None:
            if entry.get("momentum_buffer") is None:
                entry["momentum_buffer"] = torch.zeros_like(param)
            return kernels.ParamState(m=entry["momentum_buffer"])
        if not entry:
            on_device = group.values["capturable"] or group.values["fused"]
            wide = torch.get_default_dtype() == torch.float64 and not group.values["fused"]
            entry["step"] = torch.zeros(
                (),
                dtype=torch.float64 if wide else torch.float32,
                device=param.device if on_device else "cpu",
            )
            entry["exp_avg"] = torch.zeros_like(param)
            entry["exp_avg_sq"] = torch.zeros_like(param)
        return kernels.ParamState(entry["exp_avg"], entry["exp_avg_sq"], entry["step"])


class _GroupRule:
    """A parameter group as an update rule of the kernels, made anew when one of its values changed.

    Attributes:
        rule: the update rule; ``None`` if the kernels cannot run this group.
        reason: why they cannot; empty if they can.
        momentum: momentum of SGD; ``None`` for Adam.
        values: the group's dictionary.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, allowed: bool) -> None:
        self.rule: UpdateRule | None = None
        self.reason = ""
        self.momentum: float | None = None
        self.values: dict[str, Any] = {}
        self._read: Callable[[Any], tuple[Any, ...]] | None = None
        self._last: tuple[Any, ...] = ()
        self._hooked = False
        # Exact types: a subclass may do anything in its step().
        if not allowed:
            self.reason = "this rule leaves the update to the optimizer"
        elif type(optimizer) is torch.optim.SGD:
            self._read = itemgetter(*_SGD_VALUES)
        elif type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            self._read = itemgetter(*_ADAM_VALUES)
        else:
            self.reason = f"the kernels have no {type(optimizer).__name__}"
        self._is_sgd = type(optimizer) is torch.optim.SGD

    def refresh(self, group: dict[str, Any], hooked: bool) -> None:
        """Follow the group, which schedulers and load_state_dict change."""
        self.values = group
        if self._read is None:
            return
        values = self._read(group)
        # Identity: to compare learning rates that are tensors would wait for the device.
        if hooked == self._hooked and self._last and all(map(is_, values, self._last)):
            return
        made: UpdateRule | str
        if hooked:
            made = "the optimizer has hooks on its step()"
        else:
            made = _sgd_rule(group) if self._is_sgd else _adam_rule(group)
        self.rule, self.reason = (None, made) if isinstance(made, str) else (made, "")
        self.momentum = group["momentum"] if self._is_sgd else None
        self._last, self._hooked = values, hooked

    def same_rule(self, other: _GroupRule) -> bool:
        """Whether another group has the same rule, with the same values."""
        if self is other:
            return True
        if self.rule is None or other.rule is None:
            return False
        if isinstance(self.rule.lr, Tensor) or isinstance(other.rule.lr, Tensor):
            return False
        return self.rule == other.rule


_SGD_VALUES = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable",
)  # fmt: skip
_ADAM_VALUES = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "differentiable",
    "decoupled_weight_decay",
)  # fmt: skip


def _not_in_kernel(group: dict[str, Any]) -> str | None:
    """Why the kernels cannot run a group of SGD or Adam; ``None`` if they can."""
    for option in ("dampening", "amsgrad", "maximize", "differentiable"):
        if group.get(option):
            return f"the kernels have no {option}"
    if any(isinstance(value, Tensor) for value in (group["weight_decay"], *group.get("betas", ()))):
        return "the kernels take no tensor but lr"
    return None


def _sgd_rule(group: dict[str, Any]) -> UpdateRule | str:
    momentum = group["momentum"]
    # A scheduler may take momentum to 0, and torch ignores nesterov there.
    return _not_in_kernel(group) or kernels.SGD(
        group["lr"], momentum, group["weight_decay"], bool(group["nesterov"] and momentum)
    )


def _adam_rule(group: dict[str, Any]) -> UpdateRule | str:
    make = kernels.AdamW if group["decoupled_weight_decay"] else kernels.Adam
    betas = cast(tuple[float, float], tuple(group["betas"]))
    return _not_in_kernel(group) or make(group["lr"], betas, group["eps"], group["weight_decay"])

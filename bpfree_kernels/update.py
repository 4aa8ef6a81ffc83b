"""Update rules that run inside the kernels, and the state that they keep.

A kernel turns its gradient g into a new weight before the weight leaves the chip. What it needs for
that is a `SGD`, `Adam` or `AdamW` (hyper-parameters, plain values) and a `LayerState` (tensors that
are updated in place). Both follow `torch.optim` to the letter, so the tensors of a torch optimizer's
state can be handed over as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class UpdateArgs(NamedTuple):
    """How an update rule travels to a body: the same values for every rule, in schema order."""

    optimizer: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    nesterov: bool
    lr_tensor: Tensor | None


@dataclass
class ParamState:
    """What one parameter's update rule remembers.

    Attributes:
        m: momentum buffer (SGD) or first moment (Adam); like the parameter. ``None`` for plain SGD.
        v: second moment (Adam); like the parameter. ``None`` for SGD.
        step: number of updates made so far (Adam), one float32 element, on the CPU or on the
            parameter's device. A captured CUDA graph needs it on the device (torch makes it there with
            ``capturable=True``), and keeps a learning rate that is a number. ``None`` for SGD.
    """

    m: Tensor | None = None
    v: Tensor | None = None
    step: Tensor | None = None


@dataclass
class LayerState:
    """The state of a layer's weight and bias, updated in place by the ops named ``*_step``."""

    weight: ParamState
    bias: ParamState


def _check_sizes(rule: object, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            kind = type(rule).__name__
            raise ValueError(f"{name} of {kind} must be finite and not negative, got {value}.")


def _split_lr(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """A learning rate given as a tensor is read by the kernel, so that a CUDA graph follows it."""
    return (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)


@dataclass(frozen=True)
class SGD:
    """Gradient descent as `torch.optim.SGD` does it (without dampening).

    g ← g + weight_decay·w;  m ← momentum·m + g;  w ← w − lr·m  (Nesterov: w ← w − lr·(g + momentum·m)).

    Args:
        lr: learning rate, or a one-element tensor that holds it (for CUDA graphs with a schedule).
        momentum: 0 needs no state.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead; needs momentum.

    Raises:
        ValueError: a negative value, or nesterov without momentum.
    """

    lr: float | Tensor
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        _check_sizes(self, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov of SGD needs a momentum above 0, got momentum 0.")

    def args(self) -> UpdateArgs:
        """The rule as the bodies get it."""
        lr, lr_tensor = _split_lr(self.lr)
        return UpdateArgs(
            "sgd", lr, self.momentum, 0.0, 0.0, self.weight_decay, self.nesterov, lr_tensor
        )

    def new_param_state(self, param: Tensor) -> ParamState:
        """Fresh state for one parameter: a zero momentum buffer, or nothing without momentum."""
        return ParamState(m=torch.zeros_like(param) if self.momentum else None)

    def new_state(self, weight: Tensor, bias: Tensor | None = None) -> LayerState:
        """Fresh state for a layer."""
        return _new_layer_state(self, weight, bias)


@dataclass(frozen=True)
class Adam:
    """Adam as `torch.optim.Adam` does it (without amsgrad).

    m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w − lr/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + eps).

    Args:
        lr: learning rate, or a one-element tensor that holds it.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient (`AdamW` shrinks the weight instead).

    Raises:
        ValueError: a negative value, or a beta outside [0, 1).
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    _name = "adam"

    def __post_init__(self) -> None:
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        _check_sizes(self, lr=lr, eps=self.eps, weight_decay=self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            name = type(self).__name__
            raise ValueError(f"betas of {name} must be two numbers in [0, 1), got {self.betas}.")

    def args(self) -> UpdateArgs:
        """The rule as the bodies get it."""
        lr, lr_tensor = _split_lr(self.lr)
        return UpdateArgs(
            self._name, lr, *self.betas, self.eps, self.weight_decay, False, lr_tensor
        )

    def new_param_state(self, param: Tensor) -> ParamState:
        """Fresh state for one parameter: two zero moments and a step count of 0 on its device."""
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        return ParamState(torch.zeros_like(param), torch.zeros_like(param), step)

    def new_state(self, weight: Tensor, bias: Tensor | None = None) -> LayerState:
        """Fresh state for a layer."""
        return _new_layer_state(self, weight, bias)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`: w ← (1 − lr·weight_decay)·w first."""

    weight_decay: float = 1e-2

    _name = "adamw"


UpdateRule = SGD | Adam
"""An update rule that a kernel can run."""


def _new_layer_state(rule: UpdateRule, weight: Tensor, bias: Tensor | None) -> LayerState:
    bias_state = ParamState() if bias is None else rule.new_param_state(bias)
    return LayerState(rule.new_param_state(weight), bias_state)

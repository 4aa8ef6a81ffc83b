"""Update rules in plain PyTorch (see `bpfree_kernels.update`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpfree_kernels.update import UpdateArgs


def apply_update(param: Tensor, grad: Tensor, scale: float, max_norm: float, *update: Any) -> None:
    """Apply ``scale * grad``, cut to the length `max_norm`, to `param` in place."""
    g = grad.to(torch.promote_types(grad.dtype, torch.float32)) * scale
    apply_rule(param, cut(g, max_norm), *update)


def cut(grad: Tensor, max_norm: float) -> Tensor:
    """A gradient, re-scaled to the length `max_norm` if it is longer."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
    return torch.where(norm > max_norm, grad * (max_norm / norm).to(grad.dtype), grad)


def apply_rule(
    param: Tensor,
    grad: Tensor,
    optimizer: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
    lr_tensor: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
    step: Tensor | None,
) -> None:
    """Apply `grad` to `param` in place. `step` counts the updates made before this one.

    Equations: `bpfree_kernels.update.SGD`, `Adam`, `AdamW`. Sums and products are formed in float32 or
    better, as every kernel does.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    rate = lr if lr_tensor is None else lr_tensor.to(param.device, wide)
    w, g = param.to(wide), grad.to(wide)
    if optimizer == "adamw":
        w = w * (1 - rate * weight_decay)
    else:
        g = g + weight_decay * w
    if optimizer == "sgd":
        direction = g
        if m is not None:
            m_new = beta1 * m.to(wide) + g
            m.copy_(m_new)
            direction = g + beta1 * m_new if nesterov else m_new
        param.copy_(w - rate * direction)
        return
    if m is None or v is None or step is None:
        raise ValueError(f"{optimizer} needs m, v and step")
    m_new = beta1 * m.to(wide) + (1 - beta1) * g
    v_new = beta2 * v.to(wide) + (1 - beta2) * g * g
    m.copy_(m_new)
    v.copy_(v_new)
    count = step.to(param.device, torch.float64) + 1
    scale = (rate / (1 - beta1**count)).to(wide)
    denominator = v_new.sqrt() / (1 - beta2**count).sqrt().to(wide) + eps
    param.copy_(w - scale * m_new / denominator)


def update_layer(
    weight: Tensor,
    bias: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    rule: UpdateArgs,
    state: tuple[Tensor | None, ...],
) -> None:
    """Apply a layer's gradients; `state` is weight m, v, step and bias m, v, step, in schema order."""
    apply_rule(weight, grad_weight, *rule, *state[:3])
    if bias is not None:
        apply_rule(bias, grad_bias, *rule, *state[3:6])


def store_gradient(target: Tensor | None, grad: Tensor, accumulate: bool) -> None:
    """Write `grad` into `target`, or add it; without a target, drop it."""
    if target is None:
        return
    if accumulate:
        target.add_(grad)
    else:
        target.copy_(grad)

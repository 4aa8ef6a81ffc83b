"""What a kernel does with a tile of a gradient: apply an update rule to the parameter, or store it.

The rules are those of `bpfree_kernels.update`, in float32. A kernel takes a `Rule` and, for each
parameter, a `Target`; `prepare` works out the scalars once, `write` then takes any number of tiles.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpfree_kernels.triton.activations import tanh
from bpfree_kernels.update import UpdateArgs


class Rule(NamedTuple):
    """Hyper-parameters of an update rule.

    Rounding β to float32 first would cost 1 − β and log β most of their digits: they come ready made.
    `lr_ptr`, a tensor on the device, replaces `lr`.
    """

    lr: float = 0.0
    lr_ptr: Tensor | None = None
    beta1: float = 0.0
    beta2: float = 0.0
    one_minus_beta1: float = 1.0
    one_minus_beta2: float = 1.0
    log_beta1: float = 0.0
    log_beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0


class Target(NamedTuple):
    """A tensor that a kernel writes, and what the update rule remembers of it.

    `data` is the parameter or, where the gradient is asked for, its gradient (``None``: not wanted).
    `step` counts the updates made before this one; `step_ptr`, a tensor on the device, replaces it.
    """

    data: Tensor | None
    m: Tensor | None = None
    v: Tensor | None = None
    step: float = 0.0
    step_ptr: Tensor | None = None


class Learning(NamedTuple):
    """What a kernel writes for a layer, and the epilogue of `write` that does it: its arguments."""

    weight: Target
    bias: Target
    rule: Rule
    EPILOGUE: str


def _read(value: Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A scalar as (number, tensor): the kernel reads one on its device; on the CPU reading is free.

    Raises:
        RuntimeError: a scalar on the CPU while a CUDA graph is captured, which would never see it change.
    """
    if value.device == device:
        return 0.0, value
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a captured CUDA graph needs step and lr tensors on the device, got one on the CPU; "
            "torch.optim.Adam(..., capturable=True) makes step there."
        )
    return float(value), None


def make_rule(args: UpdateArgs, device: torch.device) -> tuple[Rule, str]:
    """An update rule as a kernel takes it, and its epilogue."""
    lr, lr_ptr = (args.lr, None) if args.lr_tensor is None else _read(args.lr_tensor, device)
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (args.beta1, args.beta2))
    rule = Rule(
        lr, lr_ptr, args.beta1, args.beta2, 1 - args.beta1, 1 - args.beta2, *logs,
        args.eps, args.weight_decay,
    )  # fmt: skip
    return rule, "nesterov" if args.nesterov else args.optimizer


def make_target(
    param: Tensor | None, m: Tensor | None, v: Tensor | None, step: Tensor | None
) -> Target:
    """A parameter and its state as a kernel takes them."""
    if param is None or step is None:
        return Target(param, m, v)
    return Target(param, m, v, *_read(step, param.device))


def learn_in_place(weight: Tensor, bias: Tensor | None, update: tuple[Any, ...]) -> Learning:
    """Update weight and bias; `update` is the rule and the layer's state, in schema order."""
    rule, epilogue = make_rule(UpdateArgs(*update[:8]), weight.device)
    targets = make_target(weight, *update[8:11]), make_target(bias, *update[11:])
    return Learning(*targets, rule, epilogue)


def keep_gradients(grad_weight: Tensor, grad_bias: Tensor | None, accumulate: bool) -> Learning:
    """Write or add the gradients instead of learning from them."""
    epilogue = "accumulate" if accumulate else "store"
    return Learning(Target(grad_weight), Target(grad_bias), Rule(), epilogue)


@triton.jit
def _number(number, address):
    """A scalar argument as float32: what lies at the address, or the number where there is none."""
    if address is not None:
        number = tl.load(address)
    return tl.cast(number, tl.float32)


@triton.jit
def one_minus_power(log_beta, count):
    """1 − βᵗ from log β and t, in the form −2 tanh(u/2) / (1 − tanh(u/2)) with u = t log β.

    The difference itself would lose three digits of 1 − 0.999ᵗ at t = 1.
    """
    half = tanh(0.5 * log_beta * count)
    return -2.0 * half / (1.0 - half)


@triton.jit
def prepare(target, rule, EPILOGUE: tl.constexpr):
    """The scalars of one update, for `write`: learning rate, Adam's step size and √(1 − β₂ᵗ)."""
    lr = 0.0
    step_size = 0.0
    correction = 1.0
    if EPILOGUE != "store" and EPILOGUE != "accumulate":
        lr = _number(rule.lr, rule.lr_ptr)
    if EPILOGUE == "adam" or EPILOGUE == "adamw":
        count = _number(target.step, target.step_ptr) + 1.0
        step_size = lr / one_minus_power(rule.log_beta1, count)
        correction = tl.sqrt(one_minus_power(rule.log_beta2, count))
    return lr, step_size, correction


@triton.jit
def _advance(state_ptr, offsets, mask, decay, increment):
    """state ← decay·state + increment in memory; the new state, unrounded."""
    state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    state = decay * state + increment
    tl.store(state_ptr + offsets, state, mask=mask)
    return state


@triton.jit
def _apply(target, rule, scalars, offsets, mask, w, gradient, EPILOGUE: tl.constexpr):
    """New weights of a tile; what the rule remembers is updated in memory."""
    lr, step_size, correction = scalars
    if EPILOGUE == "adamw":
        w *= 1.0 - lr * rule.weight_decay
    else:
        gradient += rule.weight_decay * w
    if EPILOGUE == "sgd" or EPILOGUE == "nesterov":
        direction = gradient
        if target.m is not None:
            direction = _advance(target.m, offsets, mask, rule.beta1, gradient)
            if EPILOGUE == "nesterov":
                direction = gradient + rule.beta1 * direction
        w -= lr * direction
    else:
        tl.static_assert(EPILOGUE == "adam" or EPILOGUE == "adamw", "unknown epilogue")
        m = _advance(target.m, offsets, mask, rule.beta1, rule.one_minus_beta1 * gradient)
        increment = rule.one_minus_beta2 * gradient * gradient
        v = _advance(target.v, offsets, mask, rule.beta2, increment)
        w -= step_size * (m / (tl.sqrt(v) / correction + rule.eps))
    return w


@triton.jit
def write(target, rule, scalars, offsets, mask, gradient, EPILOGUE: tl.constexpr):
    """Store, add or apply a float32 tile of the gradient; `scalars` come from `prepare`."""
    if EPILOGUE == "store":
        value = gradient
    else:
        old = tl.load(target.data + offsets, mask=mask, other=0.0).to(tl.float32)
        if EPILOGUE == "accumulate":
            value = old + gradient
        else:
            value = _apply(target, rule, scalars, offsets, mask, old, gradient, EPILOGUE)
    tl.store(target.data + offsets, value, mask=mask)

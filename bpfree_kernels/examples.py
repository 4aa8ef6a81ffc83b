"""A small, valid call of every op: what the doctor runs as a smoke test, and the tests as a first check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bpfree_kernels.update import Adam, LayerState

BATCH, IN, OUT, CLASSES = 5, 7, 6, 3


class _Maker:
    """Seeded tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, the same on every device and in every dtype."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(self._device, self._dtype)

    def of(self, values: Tensor) -> Tensor:
        """These values."""
        return values.to(self._device, self._dtype)

    def labels(self) -> Tensor:
        """Labels in which every class appears."""
        return torch.arange(BATCH, device=self._device) % CLASSES

    def adam(self, weight: Tensor, bias: Tensor, feedback: Tensor | None = None) -> tuple[Any, ...]:
        """Update rule and state in schema order."""
        rule = Adam(lr=1e-2)
        state: LayerState = rule.new_state(weight, bias)
        of_weight, of_bias = state.weight, state.bias
        return (
            *rule.args(), of_weight.m, of_weight.v, of_weight.step,
            of_bias.m, of_bias.v, of_bias.step,
            *(() if feedback is None else vars(rule.new_param_state(feedback)).values()),
        )  # fmt: skip


def _dense(make: _Maker) -> tuple[Tensor, Tensor, Tensor]:
    return make.normal(BATCH, IN), make.normal(OUT, IN), make.normal(OUT)


def _drtp_linear_step(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias = _dense(make)
    feedback = make.normal(CLASSES, OUT)
    rule = make.adam(weight, bias)
    return (x, weight, bias, feedback, make.labels(), "tanh", 0.0, *rule)


def _drtp_linear_grad(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias = _dense(make)
    feedback = make.normal(CLASSES, OUT)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias))
    return (x, weight, bias, feedback, make.labels(), "tanh", 0.0, *grads, False)


def _drtp_signal(make: _Maker) -> tuple[Any, ...]:
    z, feedback = make.normal(BATCH, 2, 3, 4), make.normal(CLASSES, 2, 3, 4)
    return (z, feedback, make.labels(), "tanh", 0.0)


def _classifier_forward(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias = make.normal(BATCH, IN), make.normal(CLASSES, IN), make.normal(CLASSES)
    return (x, weight, bias, make.labels(), "ce", 0.0, 0.0)


def _classifier_step(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias = make.normal(BATCH, IN), make.normal(CLASSES, IN), make.normal(CLASSES)
    return (x, weight, bias, make.labels(), "ce", 0.0, 0.0, *make.adam(weight, bias))


def _classifier_grad(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias = make.normal(BATCH, IN), make.normal(CLASSES, IN), make.normal(CLASSES)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias))
    return (x, weight, bias, make.labels(), "ce", 0.0, 0.0, *grads, False)


def _dense_forward(make: _Maker) -> tuple[Any, ...]:
    return (*_dense(make), "tanh", 0.0)


def _dense_step(make: _Maker) -> tuple[Any, ...]:
    pre, weight, bias = _dense(make)
    feedback = make.normal(OUT, IN)
    rule = make.adam(weight, bias, feedback)
    return (make.normal(BATCH, OUT), pre, weight, bias, feedback, 0.5, 0.1, *rule)


def _dense_grad(make: _Maker) -> tuple[Any, ...]:
    pre, weight, bias = _dense(make)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias))
    return (make.normal(BATCH, OUT), pre, 0.5, *grads, False)


def _pepita(make: _Maker) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    pre, weight, bias = _dense(make)
    read = (make.normal(BATCH, OUT), pre, make.normal(BATCH, CLASSES), make.normal(CLASSES, IN))
    mask = (make.normal(BATCH, OUT) > 0).to(pre.dtype)
    return (*read, mask, weight), weight, bias


def _pepita_linear_step(make: _Maker) -> tuple[Any, ...]:
    read, weight, bias = _pepita(make)
    return (*read, bias, "relu", 0.0, *make.adam(weight, bias))


def _pepita_linear_grad(make: _Maker) -> tuple[Any, ...]:
    read, weight, bias = _pepita(make)
    return (*read, "relu", 0.0, torch.zeros_like(weight), torch.zeros_like(bias), False)


def _pepita_difference(make: _Maker) -> tuple[Any, ...]:
    z, basis = make.normal(BATCH, 2, 3, 4), make.normal(CLASSES, 2, 3, 4)
    return (z, make.normal(BATCH, CLASSES), basis, "relu", 0.0)


def _pepita_max_pool(make: _Maker) -> tuple[Any, ...]:
    y = make.normal(BATCH, 5, 4, 3)
    return (y, 0.1 * make.normal(BATCH, 5, 4, 3), 3, 2, 3, 2, 2, 2, 1, 0, 1, 1)


def _local_conv(make: _Maker) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
    """x, weight, bias, signal and geometry: 4 to 6 channels in 2 groups, 5 × 4 maps, stride 2 × 1."""
    x, weight = make.normal(BATCH, 4, 5, 4), make.normal(3, 3, 3, 2, 2, OUT)
    return x, weight, make.normal(3, 3, OUT), make.normal(BATCH, OUT, 3, 3), (2, 1, 1, 0, 1, 1, 2)


def _local_conv_forward(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias, _, geometry = _local_conv(make)
    return (x, weight, bias, "tanh", 0.0, *geometry)


def _local_conv_feedback(make: _Maker) -> tuple[Any, ...]:
    x, weight, _, signal, geometry = _local_conv(make)
    return (signal, weight, x, "tanh", 0.0, 5, 4, *geometry)


def _local_conv_grad(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias, signal, geometry = _local_conv(make)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias))
    return (signal, x, weight > 0, 0.5, *geometry, *grads, False)


def _local_conv_step(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias, signal, geometry = _local_conv(make)
    feedback = make.normal(*weight.shape)
    masks = (weight > 0, feedback > 0)
    rule = make.adam(weight, bias, feedback)
    return (signal, x, weight, bias, feedback, *masks, 0.5, *geometry, *rule)


def _conv(make: _Maker) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
    """x, weight, bias, signal and geometry: as `_local_conv`."""
    x, weight = make.normal(BATCH, 4, 5, 4), make.normal(OUT, 2, 3, 2)
    return x, weight, make.normal(OUT), make.normal(BATCH, OUT, 3, 3), (2, 1, 1, 0, 1, 1, 2)


def _conv_step(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias, signal, geometry = _conv(make)
    feedback = make.normal(*weight.shape)
    rule = make.adam(weight, bias, feedback)
    return (signal, x, weight, bias, feedback, 0.5, 0.1, *geometry, *rule)


def _conv_grad(make: _Maker) -> tuple[Any, ...]:
    x, weight, bias, signal, geometry = _conv(make)
    grads = (torch.zeros_like(weight), torch.zeros_like(bias))
    return (signal, x, 0.5, *geometry, *grads, False)


_POOL = (2, 2, 2, 2, 0, 0, 1, 1)


def _ekdaa_error(make: _Maker) -> tuple[Any, ...]:
    change, z = make.normal(BATCH, 4, 3, 2), make.normal(BATCH, 4, 6, 5)
    return (change, z, 0.9, "argmax", *_POOL, "tanh", 0.0)


def _ekdaa_linear_error(make: _Maker) -> tuple[Any, ...]:
    error, feedback = make.normal(BATCH, OUT), make.normal(OUT, IN)
    return (error, feedback, make.normal(BATCH, IN), 0.9, "tanh", 0.0)


def _ekdaa_conv_error(make: _Maker) -> tuple[Any, ...]:
    x, feedback, _, error, geometry = _conv(make)
    z, size = make.normal(BATCH, 4, 10, 9), tuple(x.shape[2:])
    return (error, feedback, z, 0.9, *geometry, *size, "argmax", *_POOL, "tanh", 0.0)


def _square(make: _Maker) -> Tensor:
    """A nearly orthogonal weight: 4 outputs of windows of 2 × 2."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    return 0.05 * make.normal(4, 1, 2, 2) + make.of(signs).view(4, 1, 2, 2)


def _orthogonality(make: _Maker) -> tuple[Any, ...]:
    return (_square(make),)


def _solve_nearly_orthogonal(make: _Maker) -> tuple[Any, ...]:
    rows = _square(make).flatten(1)
    apart = rows @ rows.t() - make.of(torch.eye(4))
    return (make.normal(BATCH, 4), apart, 0.0, 3)


def _refine_inverse(make: _Maker) -> tuple[Any, ...]:
    weight = _square(make)
    return (weight, weight.clone())


def _orthogonal_update(make: _Maker) -> tuple[Any, ...]:
    weight, grad = _square(make), make.normal(4, 1, 2, 2)
    rule = Adam(lr=1e-2)
    state = rule.new_param_state(weight)
    apart = make.normal(4, 4)
    symmetric = apart + apart.t()
    return (grad, symmetric, weight, 0.1, True, *rule.args(), state.m, state.v, state.step)


def _invertible_conv_reconstruct(make: _Maker) -> tuple[Any, ...]:
    inverse, x, output = _square(make), make.normal(BATCH, 1, 5, 4), make.normal(BATCH, 4, 3, 4)
    bias, target, rate = make.normal(4), make.normal(*output.shape), make.normal(BATCH)
    place = (2, 1, 1, 1, 1, 1, 1)
    return (output, x, inverse, bias, target, rate, *place, "leaky_relu", 0.1)


def _invertible_conv_error(make: _Maker) -> tuple[Any, ...]:
    signal, inverse = make.normal(BATCH, 2, 3, 4), _square(make)[:2]
    gate = make.normal(BATCH, 1, 5, 4)
    return (signal, inverse, gate, 5, 4, 2, 1, 1, 1, 1, 1, 1, "leaky_relu", 0.1)


def _apply_update(make: _Maker) -> tuple[Any, ...]:
    param, grad = make.normal(OUT, IN), make.normal(OUT, IN)
    rule = Adam(lr=1e-2)
    state = rule.new_param_state(param)
    return (param, grad, 0.5, 1.0, *rule.args(), state.m, state.v, state.step)


EXAMPLES: dict[str, Callable[[_Maker], tuple[Any, ...]]] = {
    "drtp_linear_step": _drtp_linear_step,
    "drtp_linear_grad": _drtp_linear_grad,
    "drtp_signal": _drtp_signal,
    "classifier_forward": _classifier_forward,
    "classifier_step": _classifier_step,
    "classifier_grad": _classifier_grad,
    "dense_forward": _dense_forward,
    "dense_step": _dense_step,
    "dense_grad": _dense_grad,
    "pepita_linear_step": _pepita_linear_step,
    "pepita_linear_grad": _pepita_linear_grad,
    "pepita_difference": _pepita_difference,
    "pepita_difference_": _pepita_difference,
    "pepita_max_pool": _pepita_max_pool,
    "local_conv_forward": _local_conv_forward,
    "local_conv_feedback": _local_conv_feedback,
    "local_conv_grad": _local_conv_grad,
    "local_conv_step": _local_conv_step,
    "conv_step": _conv_step,
    "conv_grad": _conv_grad,
    "ekdaa_error": _ekdaa_error,
    "ekdaa_linear_error": _ekdaa_linear_error,
    "ekdaa_conv_error": _ekdaa_conv_error,
    "orthogonality": _orthogonality,
    "solve_nearly_orthogonal": _solve_nearly_orthogonal,
    "refine_inverse": _refine_inverse,
    "orthogonal_update": _orthogonal_update,
    "invertible_conv_reconstruct": _invertible_conv_reconstruct,
    "invertible_conv_error": _invertible_conv_error,
    "apply_update": _apply_update,
}
"""Op name → maker of its arguments, in schema order."""


def example_args(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Arguments of a small, valid call of op `name`, the same values on every device and dtype.

    Raises:
        KeyError: an op without an example.
    """
    return EXAMPLES[name](_Maker(torch.device(device), dtype))

"""What the tests run on: layers with inputs, update rules, snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import golden, golden_ekdaa, golden_local_conv, golden_pepita, plain
from .golden import Array, Rule
from .layer_case import LayerCase

SHAPES = [
    (1, 1, 1, 1), (5, 7, 6, 3), (3, 17, 1, 2), (2, 1, 17, 3), (33, 50, 31, 10), (64, 48, 24, 3),
    (70, 130, 101, 10), (128, 300, 257, 5), (3, 800, 7, 2), (2, 3, 1030, 1),
    (1, 785, 25, 2), (5, 7, 1000, 5), (60, 48, 24, 70), (129, 100, 50, 130), (300, 1, 6, 10),
]  # fmt: skip
"""[batch, in, out, classes]: ones, odd sizes, exactly one block, more than one block of everything."""

INTERPRETED_SHAPES = {
    torch.float32: [
        (1, 1, 1, 1), (5, 7, 6, 3), (3, 17, 1, 2), (2, 1, 17, 3), (19, 70, 37, 5), (4, 32, 48, 3),
        (35, 5, 3, 2), (66, 5, 3, 2), (130, 5, 18, 3), (2, 3, 130, 2), (2, 3, 2050, 2),
    ],
    torch.bfloat16: [(5, 7, 6, 3), (19, 70, 37, 5), (130, 5, 18, 3), (2, 3, 130, 2)],
    torch.float16: [(5, 7, 6, 3), (19, 70, 37, 5), (130, 5, 18, 3), (2, 3, 130, 2)],
}  # fmt: skip
"""For Triton's interpreter, which is thousands of times slower: one dimension beyond a block each."""

SMALL = (5, 7, 6, 3)
"""The shape for tests whose point is not the shape."""

KINKED = ("relu", "leaky_relu", "hardtanh", "sign")
"""Activations with a jump in f′: near it, rounding z differently is a different gradient."""

RULES = {
    "sgd": Rule("sgd"),
    "momentum": Rule("sgd", momentum=0.9),
    "nesterov": Rule("sgd", momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-decay": Rule("sgd", weight_decay=0.1),
    "adam": Rule("adam"),
    "adam-decay": Rule("adam", weight_decay=0.1),
    "adamw": Rule("adamw", weight_decay=0.1),
}
"""Every update rule that the kernels know, with no hyper-parameter at its default."""


def supported_dtypes(backend: str, device: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend computes in on a device."""
    if backend == "triton":
        return (torch.float32, torch.bfloat16, torch.float16)
    if backend == "cuda":
        return (*bk.checks.GPU_DTYPES, torch.float64)
    return bk.checks.GPU_DTYPES if device == "cuda" else bk.checks.CPU_DTYPES


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape)


def _grid(rng: np.random.Generator, *shape: int) -> Array:
    """Multiples of 1/4 up to 1: their sums of products are exact in every dtype, kinks included."""
    return rng.integers(-4, 5, shape) / 4


def drtp_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    activation: str = "tanh",
    slope: float | None = None,
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """A DRTP hidden layer. Inputs lie on a grid where the activation has a kink (see `KINKED`)."""
    batch, inputs, outputs, classes = shape
    rng = np.random.default_rng(seed)
    draw = _grid if activation in KINKED else _normal
    spread = 1.0 if activation in KINKED else max(inputs, 1) ** -0.5
    arrays = {
        "x": draw(rng, batch, inputs),
        "weight": draw(rng, outputs, inputs) * spread,
        "bias": draw(rng, outputs) if bias else None,
        "feedback": _normal(rng, classes, outputs),
    }
    tensors = _tensors(arrays, dtype, device)
    tensors["labels"] = torch.from_numpy(rng.integers(0, classes, batch)).to(device)
    return LayerCase(
        tensors, {"activation": activation, "slope": slope}, bk.drtp_linear_step,
        bk.drtp_linear_grad, _drtp_exact, _drtp_plain,
    )  # fmt: skip


def default_slope(activation: str, slope: float | None) -> float:
    """The slope that the documentation promises where none is given."""
    return {"leaky_relu": 0.01, "hardtanh": 1.0}.get(activation, 0.0) if slope is None else slope


def _drtp_exact(*args: Any) -> golden.Layer:
    return golden.drtp_dense(*args[:-1], default_slope(*args[-2:]))


def _drtp_plain(*args: Any) -> plain.Layer:
    return plain.drtp_dense(*args[:-1], default_slope(*args[-2:]))


def classifier_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    loss: str = "ce",
    margin: float | None = None,
    off_class: float | None = None,
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """An output layer with the shape's third number as its number of classes.

    For ``hinge``, whose gradient jumps, inputs lie on a grid (see `KINKED`).
    """
    batch, inputs, classes, _ = shape
    rng = np.random.default_rng(seed)
    draw, spread = (_grid, 1.0) if loss == "hinge" else (_normal, max(inputs, 1) ** -0.5)
    arrays = {
        "x": draw(rng, batch, inputs),
        "weight": draw(rng, classes, inputs) * spread,
        "bias": draw(rng, classes) if bias else None,
    }
    tensors = _tensors(arrays, dtype, device)
    tensors["labels"] = torch.from_numpy(rng.integers(0, classes, batch)).to(device)
    options = {"loss": loss, "margin": margin, "off_class": off_class}
    return LayerCase(
        tensors, options, bk.classifier_step, bk.classifier_grad,
        _classifier_exact, _classifier_plain,
    )  # fmt: skip


def default_hinge(
    classes: int, loss: str, margin: float | None, off_class: float | None
) -> tuple[float, float]:
    """Margin and weight of the other classes that the documentation promises; 0 for other losses."""
    if loss != "hinge":
        return 0.0, 0.0
    promised = 1 / (classes - 1) if classes > 1 else 0.0
    return 1.0 if margin is None else margin, promised if off_class is None else off_class


def _classifier_exact(*args: Any) -> golden.Classifier:
    return golden.classifier(*args[:-2], *default_hinge(len(args[1]), *args[-3:]))


def _classifier_plain(*args: Any) -> plain.Classifier:
    return plain.classifier(*args[:-2], *default_hinge(len(args[1]), *args[-3:]))


def dense_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    scale: float = -0.3,
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """A dense layer that learns from a signal at its output units."""
    batch, inputs, outputs, _ = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "post": _normal(rng, batch, outputs),
        "pre": _normal(rng, batch, inputs),
        "weight": _normal(rng, outputs, inputs),
        "bias": _normal(rng, outputs) if bias else None,
    }
    return LayerCase(
        _tensors(arrays, dtype, device), {"scale": scale}, bk.dense_step, bk.dense_grad,
        golden_pepita.dense, plain.dense,
    )  # fmt: skip


def pepita_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    activation: str = "relu",
    slope: float | None = None,
    bias: bool = True,
    feedback: bool = True,
    mask: bool = True,
    seed: int = 0,
) -> LayerCase:
    """A PEPITA hidden layer, the first one with `feedback`; the mask keeps three units of four.

    For ``sign``, whose change jumps, everything before it lies on a grid (see `KINKED`).
    """
    batch, inputs, outputs, classes = shape
    rng = np.random.default_rng(seed)
    draw, spread = (_grid, 1.0) if activation == "sign" else (_normal, max(inputs, 1) ** -0.5)
    arrays = {
        "z": draw(rng, batch, outputs),
        "pre": _normal(rng, batch, inputs),
        "change": draw(rng, batch, classes if feedback else inputs),
        "weight": draw(rng, outputs, inputs) * spread,
        "bias": _normal(rng, outputs) if bias else None,
        "feedback": draw(rng, inputs, classes) if feedback else None,
        "mask": (rng.random((batch, outputs)) < 0.75) * 1.25 if mask else None,
    }
    if feedback:  # a change of the input as large as the error; of products of three, few digits
        spread = max(classes, 1) ** -0.5
        arrays["feedback"] = (
            np.round(arrays["feedback"]) if activation == "sign" else arrays["feedback"] * spread
        )
    return LayerCase(
        _tensors(arrays, dtype, device), {"activation": activation, "slope": slope},
        bk.pepita_linear_step, bk.pepita_linear_grad, _pepita_exact, _pepita_plain,
    )  # fmt: skip


def _pepita_exact(*args: Any) -> golden.Layer:
    return golden_pepita.layer(*args[:-1], default_slope(*args[-2:]))


def _pepita_plain(*args: Any) -> plain.Layer:
    return plain.pepita_dense(*args[:-1], default_slope(*args[-2:]))


def local_conv_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """A locally connected layer, 3 × 2 to 2 × 1 maps, that learns from a signal at its output units."""
    batch, inputs, outputs, _ = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "signal": _normal(rng, batch, outputs, 2, 1),
        "x": _normal(rng, batch, inputs, 3, 2),
        "weight": _normal(rng, 2, 1, 2, 2, inputs, outputs),
        "bias": _normal(rng, 2, 1, outputs) if bias else None,
    }
    options = {"scale": -0.3, "stride": (2, 1), "padding": (1, 0), "dilation": 1, "groups": 1}
    return LayerCase(
        _tensors(arrays, dtype, device), options, bk.local_conv_step, bk.local_conv_grad,
        golden_local_conv.gradients, plain.local_conv_gradients,
    )  # fmt: skip


def conv_case(
    shape: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """A convolution, 3 × 2 to 2 × 1 maps, that learns from a signal at its output units."""
    batch, inputs, outputs, _ = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "signal": _normal(rng, batch, outputs, 2, 1),
        "x": _normal(rng, batch, inputs, 3, 2),
        "weight": _normal(rng, outputs, inputs, 3, 2),
        "bias": _normal(rng, outputs) if bias else None,
    }
    options = {"scale": -0.3, "stride": (2, 1), "padding": (1, 0), "dilation": 1, "groups": 1}
    return LayerCase(
        _tensors(arrays, dtype, device), options, bk.conv_step, bk.conv_grad,
        golden_ekdaa.gradients, plain.conv_gradients,
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., LayerCase]] = {
    "drtp": drtp_case,
    "classifier": classifier_case,
    "dense": dense_case,
    "pepita": pepita_case,
    "local_conv": local_conv_case,
    "conv": conv_case,
}
"""Every family of layers with a ``*_step`` and a ``*_grad`` op."""


def _tensors(
    arrays: Mapping[str, Array | None], dtype: torch.dtype, device: str
) -> dict[str, Tensor | None]:
    return {
        name: None if array is None else torch.from_numpy(array).to(device, dtype)
        for name, array in arrays.items()
    }


def library_rule(rule: Rule, lr: float | Tensor | None = None) -> bk.SGD | bk.Adam:
    """The library's form of an update rule; `lr` in the place of the rule's own."""
    lr = rule.lr if lr is None else lr
    if rule.name == "sgd":
        return bk.SGD(lr, rule.momentum, rule.weight_decay, rule.nesterov)
    kind = {"adam": bk.Adam, "adamw": bk.AdamW}[rule.name]
    return kind(lr, rule.betas, rule.eps, rule.weight_decay)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _leaves(f"{prefix}.{entry.name}", getattr(value, entry.name))


class Snapshot:
    """The bits of every tensor in some arguments, those of states and rules too."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._tensors = [leaf for name, v in arguments.items() for leaf in _leaves(name, v)]
        self._bits = [self._bits_of(tensor) for _, tensor in self._tensors]
        self._versions = [tensor._version for _, tensor in self._tensors]

    @staticmethod
    def _bits_of(tensor: Tensor) -> bytes:
        if tensor.is_meta:
            return b""
        tensor = tensor.to_dense()
        return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def check_unchanged(self) -> None:
        """Raise AssertionError if any bit, or any version counter, has changed."""
        for (name, tensor), bits, version in zip(
            self._tensors, self._bits, self._versions, strict=True
        ):
            assert self._bits_of(tensor) == bits, f"{name} has changed"
            assert tensor._version == version, f"{name} counts as changed"

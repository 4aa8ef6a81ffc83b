"""What the tests run on: layers with inputs, update rules, awkward memory layouts, snapshots.

A `LayerCase` holds the arguments of one layer op and knows the float64 formula, the plain PyTorch
formula and the library's functions for it, so that one test serves every family of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bpfree_kernels as bk

from . import golden, plain
from .golden import Array, Rule
from .tolerances import check, to_numpy

SHAPES = [
    (1, 1, 1, 1), (5, 7, 6, 3), (3, 17, 1, 2), (2, 1, 17, 3), (33, 50, 31, 10), (64, 48, 24, 3),
    (70, 130, 101, 10), (128, 300, 257, 5), (3, 800, 7, 2), (2, 3, 1030, 1),
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
    return bk.checks.GPU_DTYPES if device == "cuda" else bk.checks.CPU_DTYPES


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape)


def _grid(rng: np.random.Generator, *shape: int) -> Array:
    """Multiples of 1/4 up to 1: their sums of products are exact in every dtype, kinks included."""
    return rng.integers(-4, 5, shape) / 4


@dataclass
class LayerCase:
    """The arguments of a layer op, by name and in order, and what belongs to it.

    Attributes:
        tensors: x, weight, bias (or ``None``) and what else the op reads.
        options: keyword arguments of the op.
        step_op, grad_op: the library's functions.
        exact_fn, plain_fn: the float64 formula and the plain PyTorch formula.
    """

    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    step_op: Callable[..., Any]
    grad_op: Callable[..., Any]
    exact_fn: Callable[..., tuple[Array, ...]]
    plain_fn: Callable[..., tuple[Tensor, ...]]

    @property
    def weight(self) -> Tensor:
        """The weight; always there."""
        weight = self.tensors["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, if the layer has one."""
        return self.tensors["bias"]

    def using(self, **tensors: Tensor | None) -> LayerCase:
        """The same layer with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def clone(self) -> LayerCase:
        """The same layer with a weight and a bias of its own."""
        bias = None if self.bias is None else self.bias.clone()
        return self.using(weight=self.weight.clone(), bias=bias)

    def step(
        self, update: bk.SGD | bk.Adam, state: bk.LayerState | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The op that learns in place; returns its outputs."""
        result = self.step_op(
            *self.tensors.values(), update, state, backend=backend, **self.options
        )
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def grad(self, backend: str | None = None, **gradients: Any) -> tuple[Tensor, ...]:
        """The op that returns gradients: outputs, then those of weight and bias (if any)."""
        outputs, weight, bias = self.grad_op(
            *self.tensors.values(), backend=backend, **gradients, **self.options
        )
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        assert (bias is None) == (self.bias is None)
        return (*outputs, weight) if bias is None else (*outputs, weight, bias)

    def exact(self) -> tuple[Array, ...]:
        """What `grad` returns, in float64."""
        arrays = [
            None if t is None else t.cpu().numpy() if name == "labels" else to_numpy(t)
            for name, t in self.tensors.items()
        ]
        return self._without_bias(self.exact_fn(*arrays, *self.options.values()))

    def plain(self) -> tuple[Tensor, ...]:
        """What `grad` returns, by plain PyTorch in the same dtype."""
        return self._without_bias(self.plain_fn(*self.tensors.values(), *self.options.values()))

    def _without_bias(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(results) if self.bias is not None else tuple(results)[:-1]

    def check(self, results: Iterable[Tensor]) -> None:
        """Compare outputs (and gradients, where there are any) with the formula."""
        for index, (result, exact, by_torch) in enumerate(
            zip(results, self.exact(), self.plain(), strict=False)
        ):
            check(f"result {index}", result, exact, by_torch)


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
    bias: bool = True,
    seed: int = 0,
) -> LayerCase:
    """An output layer with the shape's third number as its number of classes."""
    batch, inputs, classes, _ = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "x": _normal(rng, batch, inputs),
        "weight": _normal(rng, classes, inputs) * max(inputs, 1) ** -0.5,
        "bias": _normal(rng, classes) if bias else None,
    }
    tensors = _tensors(arrays, dtype, device)
    tensors["labels"] = torch.from_numpy(rng.integers(0, classes, batch)).to(device)
    return LayerCase(
        tensors, {"loss": loss}, bk.classifier_step, bk.classifier_grad,
        golden.classifier, plain.classifier,
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., LayerCase]] = {"drtp": drtp_case, "classifier": classifier_case}
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


Arguments = dict[str, Any]


def _layer(*names: str) -> Arguments:
    tensors = drtp_case().tensors
    return {name: tensors[name] for name in names}


def _drtp() -> Arguments:
    return _layer("x", "weight", "bias", "feedback", "labels")


def _classifier() -> Arguments:
    return _layer("x", "weight", "bias", "labels")


def _learning(arguments: Arguments) -> Arguments:
    rule = bk.Adam(0.1)
    state = rule.new_state(arguments["weight"], arguments["bias"])
    return {**arguments, "update": rule, "state": state}


def _signal() -> Arguments:
    return {"z": torch.randn(5, 6), **_layer("feedback", "labels")}


def _update() -> Arguments:
    param, rule = torch.randn(4, 5), bk.Adam(0.1)
    return {
        "param": param,
        "grad": torch.randn(4, 5),
        "update": rule,
        "state": rule.new_param_state(param),
    }


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "drtp_linear_step": (bk.drtp_linear_step, lambda: _learning(_drtp())),
    "drtp_linear_grad": (bk.drtp_linear_grad, _drtp),
    "drtp_signal": (bk.drtp_signal, _signal),
    "classifier_step": (bk.classifier_step, lambda: _learning(_classifier())),
    "classifier_grad": (bk.classifier_grad, _classifier),
    "apply_update": (bk.apply_update, _update),
}
"""Every public function, with arguments that are right for it."""


@dataclass
class Laid:
    """A tensor inside a larger buffer, with what the buffer held before an op ran.

    Attributes:
        view: the values, laid out awkwardly.
        buffer: the memory around them, filled with a value that nothing computes.
    """

    view: Tensor
    buffer: Tensor
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.buffer.clone()

    def check_surroundings(self) -> None:
        """Raise AssertionError if anything but the view's own elements has changed."""
        expected = self.before.clone()
        expected.as_strided(
            self.view.shape, self.view.stride(), self.view.storage_offset()
        ).copy_(self.view)  # fmt: skip
        assert torch.equal(expected, self.buffer), "memory around the tensor was written"


LAYOUTS = ("transposed", "strided", "offset")
"""Memory layouts that are legal in torch: column-major, every second element, off alignment."""


def laid_out(tensor: Tensor, layout: str) -> Laid:
    """The same values in another memory layout, with guard elements around them."""
    shape = tuple(tensor.shape)
    if layout == "transposed":
        buffer = tensor.new_full((*reversed(shape),), 77)
        view = buffer.permute(*reversed(range(tensor.dim())))
    elif layout == "strided":
        buffer = tensor.new_full((*shape[:-1], 2 * shape[-1] + 1), 77)
        view = buffer[..., 1::2]
    else:
        buffer = tensor.new_full((tensor.numel() + 2,), 77)
        view = buffer[1:-1].view(shape)
    view.copy_(tensor)
    return Laid(view, buffer)


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

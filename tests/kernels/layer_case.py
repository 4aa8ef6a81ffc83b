"""One layer op's arguments, with the float64 formula, the plain PyTorch formula and the library's functions.

So one test serves every family of layers; the families are in `cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import bpfree_kernels as bk

from .golden import Array
from .tolerances import check, to_numpy

SAMPLES = ("x", "labels", "post", "pre", "z", "change", "mask", "signal")
"""Names of what a layer op takes for each sample, with the batch as first dimension."""


@dataclass
class LayerCase:
    """The arguments of a layer op, by name and in order, and what belongs to it.

    Attributes:
        tensors: weight, bias (or ``None``) and what the op reads, in the schema's order but for the
            bias, which comes right after the weight as in the public functions.
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

    @property
    def samples(self) -> dict[str, Tensor]:
        """The tensors that hold one entry for each sample of the batch."""
        found = ((name, self.tensors.get(name)) for name in SAMPLES)
        return {name: tensor for name, tensor in found if tensor is not None}

    @property
    def input(self) -> str:
        """The name of the layer's input, [batch, in]."""
        return "x" if "x" in self.tensors else "pre"

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
            **self.tensors, update=update, state=state, backend=backend, **self.options
        )
        return (result,) if isinstance(result, Tensor) else tuple(result or ())

    def grad(self, backend: str | None = None, **gradients: Any) -> tuple[Tensor, ...]:
        """The op that returns gradients: outputs, then those of weight and bias (if any)."""
        *outputs, weight, bias = self.grad_op(
            **self.tensors, backend=backend, **gradients, **self.options
        )
        if outputs and not isinstance(outputs[0], Tensor):
            outputs = list(outputs[0])
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

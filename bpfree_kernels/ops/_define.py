"""How an op of this library is registered: schema and fake in Python, one body per backend.

The ops learn in place and are not differentiable: they skip autograd, their outputs need no gradient,
and the public functions around them bump the version counters of what they wrote, so that an autograd
graph that still needs an old weight says so instead of using the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bpfree_kernels import backends
from bpfree_kernels.maps import map_order

LIBRARY = torch.library.Library("bpfree", "DEF")

_RULE_SCHEMA = (
    "str optimizer, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool nesterov, Tensor? lr_tensor"
)

UPDATE_SCHEMA = f"{_RULE_SCHEMA}, Tensor(m!)? m, Tensor(v!)? v, Tensor? step"
"""The update rule and the state of one parameter."""

LAYER_UPDATE_SCHEMA = (
    f"{_RULE_SCHEMA}, Tensor(m!)? weight_m, Tensor(v!)? weight_v, Tensor? weight_step, "
    "Tensor(p!)? bias_m, Tensor(q!)? bias_v, Tensor? bias_step"
)
"""The update rule and the state of one layer, as every ``*_step`` op takes them."""

FEEDBACK_STATE_SCHEMA = "Tensor(s!)? feedback_m, Tensor(t!)? feedback_v, Tensor? feedback_step"
"""The state of a feedback weight, where one learns beside the layer."""


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton_module: str | None = None,
) -> None:
    """Register op ``bpfree::name``.

    Args:
        name: the op's name.
        schema: arguments and returns, mutated arguments marked.
        reference: body in plain PyTorch, called with the schema's arguments in order.
        fake: shapes and dtypes of the outputs, for tracing.
        triton_module: module that holds the Triton body under the same name; ``None`` for an op whose
            GPU body is CUDA C++, in the compiled extension.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"bpfree::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    backends.register_bodies(LIBRARY, name, reference, triton_module)


def contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Contiguous stand-ins, the form in which every body takes its tensors."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


class MapOrder:
    """The order in which a body takes maps: that of z in memory, channels last or first.

    For ops that treat every element of a map alike. torch's convolutions and poolings on the CPU are two
    to ten times faster with the channels last, so such maps are taken as they are, and returned alike.
    """

    def __init__(self, z: Tensor) -> None:
        self._channels_last = map_order(z) is torch.channels_last

    def enter(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Contiguous tensors for the body; those of four dimensions are maps."""
        if self._channels_last:
            tensors = tuple(
                t if t is None or t.dim() != 4 else t.permute(0, 2, 3, 1) for t in tensors
            )
        return contiguous(tensors)

    def leave(self, maps: Tensor) -> Tensor:
        """What a body made of maps, in the shape of z."""
        return maps.permute(0, 3, 1, 2) if self._channels_last else maps


def wrote(originals: Iterable[Tensor | None], stand_ins: Iterable[Tensor | None]) -> None:
    """Finish an in-place op: copy stand-ins back where one was needed, and bump the versions."""
    changed = []
    for original, stand_in in zip(originals, stand_ins, strict=True):
        if original is None:
            continue
        if stand_in is not None and stand_in is not original:
            original.copy_(stand_in)
        changed.append(original)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(changed)

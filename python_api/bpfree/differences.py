"""How a difference passes the modules between two layers: pooling, dropout, flattening.

A rule that compares two nearly equal activations y and y + Δy carries Δy itself, because subtracting
the two would lose most digits. This module takes Δy through what lies between two layers::

    outputs, ways = run(modules, y)          # the first pass, which notes what the second needs
    change = pass_on(ways, change)           # modules(y + Δy) − modules(y), without cancellation

Flattening and average pooling are linear, dropout keeps the mask of the first pass, and max pooling
takes its windows' new maxima into account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

import bpfree_kernels as kernels

Way = Callable[[Tensor], Tensor]
"""Takes the change of a module's input to the change of its output."""


def run(
    modules: Iterable[nn.Module], y: Tensor, backend: str | None = None
) -> tuple[Tensor, tuple[Way, ...]]:
    """Apply modules one after another, and note how a difference passes them.

    Forward hooks of the modules do not run.

    Args:
        modules: Flatten, MaxPool2d, AvgPool2d, Dropout or Dropout2d (`bpfree.stages.PASSED_THROUGH`);
            dropout follows their ``training``.
        y: input of the first one, [batch, ...].
        backend: of the kernels, instead of the device's default.

    Returns:
        Output of the last one, and what `pass_on` takes.
    """
    ways = []
    for module in modules:
        if isinstance(module, nn.MaxPool2d):
            y, way = _max_pool(module, y, backend)
        elif isinstance(module, nn.Dropout | nn.Dropout2d):
            mask = dropout_mask(module, y)
            if mask is None:
                continue
            y, way = y * mask, mask.mul
        else:
            y, way = module.forward(y), cast(Way, module.forward)
        ways.append(way)
    return y, tuple(ways)


def pass_on(ways: Iterable[Way], change: Tensor) -> Tensor:
    """How the output of `run` changes if its input does.

    Args:
        ways: from `run`.
        change: Δy, shaped like the y of `run`.

    Returns:
        Change of the output, shaped like the output of `run`.
    """
    for way in ways:
        change = way(change)
    return change


def leading_dropout(
    modules: Sequence[nn.Module], y: Tensor
) -> tuple[Tensor | None, Sequence[nn.Module]]:
    """Split off a dropout at the front: its mask (`dropout_mask`), and the modules behind it.

    Args:
        modules: as for `run`.
        y: what enters the first one.
    """
    if modules and isinstance(modules[0], nn.Dropout | nn.Dropout2d):
        return dropout_mask(modules[0], y), modules[1:]
    return None, modules


def dropout_mask(module: nn.Dropout | nn.Dropout2d, like: Tensor) -> Tensor | None:
    """Draw a dropout module's mask with its factor: 0 or 1 / (1 − p); ``None`` if nothing is dropped.

    Args:
        module: Dropout or Dropout2d.
        like: what it is applied to.

    Returns:
        Shaped like `like`.
    """
    if not module.training or module.p == 0:
        return None
    # The numbers that torch would draw for a contiguous tensor, whatever the order in memory.
    if isinstance(module, nn.Dropout):
        mask = torch.empty_like(like, memory_format=torch.contiguous_format)
        return mask.bernoulli_(1 - module.p).div_(1 - module.p if module.p < 1 else 1)
    return module.forward(torch.ones_like(like, memory_format=torch.contiguous_format))


def _max_pool(module: nn.MaxPool2d, y: Tensor, backend: str | None) -> tuple[Tensor, Way]:
    def pool(change: Tensor | None) -> Tensor:
        return kernels.pepita_max_pool(
            y, module.kernel_size, change, stride=module.stride, padding=module.padding,
            dilation=module.dilation, ceil_mode=module.ceil_mode, backend=backend,
        )  # fmt: skip

    return pool(None), pool

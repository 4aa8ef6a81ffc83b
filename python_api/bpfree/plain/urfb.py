"""URFB as ordinary PyTorch writes it: autograd, with another gradient at the input of every layer.

Each layer runs on an input that is cut off, so that autograd finds the gradients of its own weights; a
function at its output carries the signal to the layer below through R. R is one more parameter of the
optimizer and takes over W's gradient. A locally connected layer copies every window and multiplies by
position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from bpfree.losses import Loss, batch_loss, check_loss, output_of
from bpfree.nn import LocallyConnected2d
from bpfree.results import StepResult
from bpfree.stages import Layer, Stage, parse
from bpfree_kernels.geometry import split_padding


class _CarryDown(torch.autograd.Function):
    """Passes z on; gives x the signal that another way carries down."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, _x: Tensor, carry: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.carry = carry
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, Tensor | None, None]:
        carried = ctx.carry(signals[0]) if ctx.needs_input_grad[1] else None
        return signals[0], carried, None


class PlainURFB:
    """The baseline of `bpfree.URFB` and `bpfree.FRFB`: same model, same start, same result."""

    def __init__(
        self,
        model: nn.Sequential,
        feedback: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Loss = "hinge",
        *,
        learns_feedback: bool = True,
    ) -> None:
        """Make a baseline.

        Args:
            model: as for `bpfree.URFB`.
            feedback: R by the name of each layer but the first; it is copied.
            optimizer: any torch optimizer; R joins it, in a group with its default values.
            loss: as for `bpfree.URFB`.
            learns_feedback: whether R learns (URFB) or stays (FRFB).

        Raises:
            TypeError, ValueError: a model that is not supported, or an unknown loss.
            KeyError: feedback that lacks a layer.
        """
        check_loss(loss)
        self.model = model
        self.loss = loss
        self._network = parse(model)
        stages = self._network.stages[1:]
        self.feedback = {s.name: nn.Parameter(feedback[s.name].clone()) for s in stages}
        self.optimizer = optimizer
        self._learns_feedback = learns_feedback
        if learns_feedback and self.feedback:
            optimizer.add_param_group({"params": list(self.feedback.values())})

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward, backward, update.

        Args:
            x: input, [batch, ...].
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output, of the parameters before the update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        result = self.backward(x, y)
        if self._learns_feedback:
            for stage in self._network.stages[1:]:
                self.feedback[stage.name].grad = stage.layer.weight.grad
        self.optimizer.step()
        return result

    def backward(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward and ``loss.backward()`` only: adds to ``.grad`` of the model."""
        h = self._network.enter(x)
        for stage in self._network.stages:
            z = self._run_layer(stage, h)
            module = stage.activation_module
            h = stage.leave(z if module is None else module(z))
        loss = batch_loss(h, y, self.loss)
        loss.backward()
        return StepResult(loss.detach(), output_of(h.detach(), self.loss))

    def _run_layer(self, stage: Stage, x: Tensor) -> Tensor:
        layer = stage.layer
        cut_off = x.detach()
        z = _by_window(layer, cut_off) if isinstance(layer, LocallyConnected2d) else layer(cut_off)
        feedback = self.feedback.get(stage.name)
        if feedback is None:
            return z

        def carry(signal: Tensor) -> Tensor:
            return _carry(layer, feedback.detach(), signal, x.shape)

        carried: Tensor = _CarryDown.apply(z, x, carry)  # type: ignore[no-untyped-call]
        return carried


def _carry(layer: Layer, feedback: Tensor, signal: Tensor, size: torch.Size) -> Tensor:
    """The signal at a layer's input."""
    if isinstance(layer, nn.Linear):
        return signal @ feedback
    (top, bottom), (left, right) = _padding(layer)
    padded = (size[2] + top + bottom, size[3] + left + right)
    if isinstance(layer, LocallyConnected2d):
        kernels = feedback.unflatten(5, (layer.groups, -1))
        posts = signal.unflatten(1, (layer.groups, -1))
        windows = torch.einsum("ngohw,hwijcgo->ngcijhw", posts, kernels).flatten(1, 4).flatten(2)
        maps = F.fold(windows, padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    else:
        maps = conv2d_input(
            (*size[:2], *padded), feedback, signal, layer.stride, 0, layer.dilation, layer.groups
        )
    return maps[:, :, top : top + size[2], left : left + size[3]]


def _by_window(layer: LocallyConnected2d, x: Tensor) -> Tensor:
    """z of a locally connected layer."""
    (top, bottom), (left, right) = _padding(layer)
    windows = F.unfold(
        F.pad(x, (left, right, top, bottom)), layer.kernel_size, layer.dilation, 0, layer.stride
    )
    rows, columns, kernel_h, kernel_w, channels, _ = layer.weight.shape
    windows = windows.view(len(x), layer.groups, channels, kernel_h, kernel_w, rows, columns)
    kernels = layer.weight.unflatten(5, (layer.groups, -1))
    z = torch.einsum("ngcijhw,hwijcgo->ngohw", windows, kernels).flatten(1, 2)
    z = z.contiguous()  # what dropout draws depends on the order in memory
    return z if layer.bias is None else z + layer.bias.permute(2, 0, 1)


def _padding(layer: nn.Conv2d | LocallyConnected2d) -> tuple[tuple[int, int], tuple[int, int]]:
    kernel, dilation, stride = (
        cast(tuple[int, int], tuple(values))
        for values in (layer.kernel_size, layer.dilation, layer.stride)
    )
    return split_padding(layer.padding, kernel, dilation, stride)

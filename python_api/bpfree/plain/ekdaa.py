"""EKDAA as ordinary PyTorch writes it: the formulas of the paper one after another, in eager mode.

Targets are maps of their own, an error is activation minus target, and a layer's two gradients are those that
torch's convolution functions return. E is one more parameter of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from bpfree.losses import Loss, batch_loss, check_loss, name_of, output_of
from bpfree.results import StepResult
from bpfree.stages import Layer, Stage, parse
from bpfree_kernels import gradient_scale
from bpfree_kernels.geometry import pair, split_padding

Back = Callable[[Tensor], Tensor]


class PlainEKDAA:
    """The baseline of `bpfree.EKDAA`: same model, same start, same result up to rounding."""

    def __init__(
        self,
        model: nn.Sequential,
        feedback: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Loss = "ce",
        *,
        beta: float = 0.9,
        gamma: float = 0.1,
        upsample: str = "argmax",
        reduction: str = "sum",
        max_norm: float | None = None,
    ) -> None:
        """Make a baseline.

        Args:
            model: as for `bpfree.EKDAA`.
            feedback: E by the name of each layer but the first; it is copied.
            optimizer: any torch optimizer; E joins it, in a group with its default values.
            loss, beta, gamma, upsample, reduction, max_norm: as for `bpfree.EKDAA`.

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
        self._beta, self._gamma, self._upsample = beta, gamma, upsample
        self._mean, self._max_norm = reduction == "mean", max_norm
        if gamma and self.feedback:
            optimizer.add_param_group({"params": list(self.feedback.values())})

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward, errors and targets, update.

        Args:
            x: input, [batch, ...].
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output, of the parameters before the update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            result = self._errors(x, y)
        self.optimizer.step()
        return result

    def _errors(self, x: Tensor, y: Tensor) -> StepResult:
        """From the forward pass to every gradient."""
        stages = self._network.stages
        inputs, fields, ways = [], [], []
        h = self._network.enter(x)
        for stage in stages:
            inputs.append(h)
            z = stage.layer(h)
            h, back = self._leave(stage, z)
            fields.append(z)
            ways.append(back)
        with torch.enable_grad():
            logits = h.detach().requires_grad_()
            loss = batch_loss(logits, y, self.loss)
        (of_logits,) = torch.autograd.grad(loss, logits)
        e = of_logits / gradient_scale(name_of(self.loss), *h.shape)
        for place in reversed(range(len(stages))):
            stage, h = stages[place], inputs[place]
            self._keep_gradients(stage, e, h)
            if place:
                below, z = stages[place - 1], fields[place - 1]
                d = ways[place - 1](_deconvolved(stage.layer, self.feedback[stage.name], e, h))
                target = below.activate(z - self._beta * d)
                e = below.activate(z) - target
        return StepResult(loss.detach(), output_of(logits.detach(), self.loss))

    def _keep_gradients(self, stage: Stage, e: Tensor, h: Tensor) -> None:
        layer = stage.layer
        share = 1 / len(e) if self._mean else 1.0
        of_weight = _correlated(layer, e, h) * share
        layer.weight.grad = self._cut(of_weight)
        if layer.bias is not None:
            layer.bias.grad = self._cut(e.transpose(0, 1).flatten(1).sum(1) * share)
        if stage.name in self.feedback:
            self.feedback[stage.name].grad = self._cut(self._gamma * of_weight)

    def _cut(self, grad: Tensor) -> Tensor:
        if self._max_norm is None or grad.norm() <= self._max_norm:
            return grad
        shorter: Tensor = grad * (self._max_norm / grad.norm())
        return shorter

    def _leave(self, stage: Stage, z: Tensor) -> tuple[Tensor, Back]:
        """Input of the next layer, and the way back from there to the maps of z."""
        h, after, up = stage.activate(z), list(stage.after), None
        if after and isinstance(after[0], nn.MaxPool2d):
            pooling = after.pop(0)
            up, h = self._up_sampling(cast(nn.MaxPool2d, pooling), z), pooling(h)
        with torch.enable_grad():
            entered = h.detach().requires_grad_()
            left = entered.clone()  # what follows may work in place
            for module in after:
                left = module(left)

        def back(d: Tensor) -> Tensor:
            arrived: Tensor = torch.autograd.grad(left, entered, d)[0]
            return arrived if up is None else up(arrived)

        return left.detach(), back

    def _up_sampling(self, pooling: nn.MaxPool2d, z: Tensor) -> Back:
        size = z.shape[2:]
        if self._upsample == "bilinear":
            return lambda d: F.interpolate(d, size=size, mode="bilinear", align_corners=False)
        if self._upsample == "argmax":
            _, winners = F.max_pool2d(
                z, pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation,
                ceil_mode=pooling.ceil_mode, return_indices=True,
            )  # fmt: skip
            nothing, places = torch.zeros_like(z).flatten(2), winners.flatten(2)
            return lambda d: nothing.scatter_add(2, places, d.flatten(2)).view_as(z)
        kernel = pair("kernel_size", pooling.kernel_size, 1)
        share = 1 / math.prod(kernel) if self._upsample == "average" else 1.0
        window = z.new_full((z.shape[1], 1, *kernel), share)
        stride, dilation = pooling.stride, pooling.dilation
        top, left = pair("padding", pooling.padding, 0)

        def spread(d: Tensor) -> Tensor:
            whole = F.conv_transpose2d(
                d, window, stride=stride, groups=z.shape[1], dilation=dilation
            )
            missing = (size[1] + left - whole.shape[3], size[0] + top - whole.shape[2])
            return F.pad(whole, (-left, missing[0], -top, missing[1]))

        return spread


def _padded(layer: Layer, size: torch.Size) -> tuple[tuple[int, int, int, int], torch.Size]:
    """Zeros around a convolution's input (left, right, top, bottom), and its size with them."""
    convolution = cast(nn.Conv2d, layer)
    kernel, dilation, stride = (
        cast(tuple[int, int], tuple(values))
        for values in (convolution.kernel_size, convolution.dilation, convolution.stride)
    )
    (top, bottom), (left, right) = split_padding(convolution.padding, kernel, dilation, stride)
    around = (left, right, top, bottom)
    return around, torch.Size((*size[:2], size[2] + top + bottom, size[3] + left + right))


def _deconvolved(layer: Layer, kernel: Tensor, e: Tensor, h: Tensor) -> Tensor:
    """d at a layer's input h."""
    if isinstance(layer, nn.Linear):
        return e @ kernel
    (left, _, top, _), size = _padded(layer, h.shape)
    d: Tensor = conv2d_input(size, kernel, e, layer.stride, 0, layer.dilation, layer.groups)
    return d[:, :, top : top + h.shape[2], left : left + h.shape[3]]


def _correlated(layer: Layer, e: Tensor, h: Tensor) -> Tensor:
    """∂W summed over the batch, and over space."""
    if isinstance(layer, nn.Linear):
        return e.T @ h
    around, _ = _padded(layer, h.shape)
    of_weight: Tensor = conv2d_weight(
        F.pad(h, around), layer.weight.shape, e, layer.stride, 0, layer.dilation, layer.groups
    )
    return of_weight

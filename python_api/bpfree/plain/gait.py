"""GAIT-prop as ordinary PyTorch writes it, and as its authors' code does: in float64, target after target.

Every square weight is inverted by a full decomposition at every step. A layer learns from a loss of its
own, the distance of its output from its target, by autograd through that layer alone; the regulariser is one
more loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from bpfree.losses import Loss, batch_loss, check_loss, output_of
from bpfree.nn import InvertibleConv2d
from bpfree.nn.invertible import Invertible
from bpfree.results import StepResult
from bpfree.stages import Stage, parse


class PlainGAIT:
    """The baseline of `bpfree.GAITProp`: same model, same start, same result up to what float32 resolves."""

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        loss: Loss = "ce",
        *,
        orthogonal_penalty: float = 0.0,
        off_diagonal: bool = False,
        normalised: bool = True,
        eta: float = 1e-7,
        rate: float = 1e-3,
    ) -> None:
        """Make a baseline.

        Args:
            model: as for `bpfree.GAITProp`; it becomes float64.
            optimizer: any torch optimizer that has not taken a step.
            loss, orthogonal_penalty, off_diagonal, normalised, eta, rate: as for `bpfree.GAITProp`.

        Raises:
            TypeError, ValueError: a model that is not supported, or an unknown loss.
        """
        check_loss(loss)
        self.model = model.double()
        self.loss = loss
        self._network = parse(model)
        self.optimizer = optimizer
        self._penalty, self._off_diagonal = orthogonal_penalty, off_diagonal
        self._normalised, self._eta, self._rate = normalised, eta, rate

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Forward, inverses, targets, update.

        Args:
            x: input, [batch, ...], of any dtype.
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output, of the parameters before the update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        inputs, outputs = self._forward(x.double())
        stages = self._network.stages
        inverses = {s: torch.linalg.inv(s.layer.weight.detach().flatten(1)) for s in stages[1:]}
        target, result = self._output_target(outputs[-1], y)
        times = torch.ones_like(target[:, 0])
        for place in reversed(range(len(stages))):
            stage, h, a = stages[place], inputs[place], outputs[place]
            distance = (target - _whole(stage, h)).pow(2).flatten(1).sum(1)
            (times * distance).sum().backward()
            if place == 0:
                break
            reached, gamma = self._invert(stage, h, a, target, inverses[stage])
            times = times / gamma
            below = stages[place - 1]
            target = outputs[place - 1].clone()
            features = target[:, : below.outputs]
            features.copy_(reached.reshape(features.shape))
        self._regularise()
        self.optimizer.step()
        return result

    @torch.no_grad()
    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Every layer's input, and its f(z) of all outputs."""
        inputs, outputs = [], []
        h = self._network.enter(x)
        for stage in self._network.stages:
            inputs.append(h)
            outputs.append(_whole(stage, h))
            h = stage.leave(outputs[-1][:, : stage.outputs])
        return inputs, outputs

    def _output_target(self, a: Tensor, y: Tensor) -> tuple[Tensor, StepResult]:
        """Half a gradient step from the output, and what a step returns."""
        logits = a[:, : self._network.classes].detach().requires_grad_()
        loss = batch_loss(logits, y, self.loss)
        (gradient,) = torch.autograd.grad(len(y) * loss, logits)
        target = a.clone()
        target[:, : self._network.classes] -= gradient / 2
        return target, StepResult(loss.detach(), output_of(logits.detach(), self.loss))

    @torch.no_grad()
    def _invert(
        self, stage: Stage, x: Tensor, a: Tensor, target: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Target of a layer's input, and γ of each sample."""
        length = (target - a).flatten(1).norm(dim=1)
        gamma = torch.full_like(length, self._rate)
        if self._normalised:
            gamma = torch.where(length > 0, self._eta * math.sqrt(a[0].numel()) / length, 1.0)
        slope = 1.0 if stage.slope is None else stage.slope
        derivative = torch.where(a > 0, 1.0, slope)
        weigh = gamma.view(-1, *[1] * (a.dim() - 1)) * derivative**2
        u = (1 - weigh) * a + weigh * target
        z = torch.where(u > 0, u, u / slope)
        layer = stage.layer
        if layer.bias is not None:
            z = z - layer.bias.view(-1, *[1] * (a.dim() - 2))
        if not isinstance(layer, InvertibleConv2d):
            return z @ inverse.T, gamma
        kernel = inverse.T.reshape(layer.weight.shape)
        patches = _transposed(layer, kernel, z, x.shape)
        counts = _transposed(layer, kernel, _correlated(layer, torch.ones_like(x)), x.shape)
        return patches - (counts - 1) * x, gamma

    def _regularise(self) -> None:
        if not self._penalty:
            return
        for stage in self._network.stages[1:]:
            weight = stage.layer.weight.flatten(1)
            off = weight @ weight.T - torch.eye(len(weight), dtype=weight.dtype).to(weight)
            if self._off_diagonal:
                off = off - torch.diag(off.diagonal())
            (self._penalty * off.pow(2).sum()).backward()


def _whole(stage: Stage, x: Tensor) -> Tensor:
    """f(z) of all outputs, the auxiliary ones too."""
    layer = stage.layer
    z = layer.field(x) if isinstance(layer, Invertible) else layer(x)
    return stage.activate(z)


def _padded(layer: InvertibleConv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A map with all its padding, and how much of it lies above and on the left."""
    (above, below), (left, right) = layer.margins((x.shape[2], x.shape[3]))
    return F.pad(x, (left, right, above, below)), (above, left)


def _correlated(layer: InvertibleConv2d, x: Tensor) -> Tensor:
    """W ∗ x without the bias."""
    return F.conv2d(_padded(layer, x)[0], layer.weight, None, layer.stride, 0, layer.dilation)


def _transposed(layer: InvertibleConv2d, kernel: Tensor, z: Tensor, size: torch.Size) -> Tensor:
    """The transposed convolution with a kernel, at a map of this size."""
    padded, (above, left) = _padded(layer, z.new_zeros(size))
    whole: Tensor = conv2d_input(padded.shape, kernel, z, layer.stride, 0, layer.dilation)
    return whole[:, :, above : above + size[2], left : left + size[3]]

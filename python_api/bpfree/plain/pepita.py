"""PEPITA as ordinary PyTorch writes it: two whole passes, and the difference of their activations.

The formulation of the rule's authors: run the network, add the projected error to the input, run it
again, subtract the activations. Without autograd, and in low precision mostly noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bpfree.losses import Loss, batch_loss, check_loss, name_of, output_of
from bpfree.results import StepResult
from bpfree.stages import Layer, Stage, parse

Masks = dict[tuple[int, int], Tensor]
"""The masks of the dropout modules, by the position of the layer and of the module behind it."""


class PlainPEPITA:
    """The baseline of `bpfree.PEPITA`: same model, same feedback, same result."""

    def __init__(
        self,
        model: nn.Sequential,
        feedback: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Loss = "ce",
        *,
        presynaptic: str = "modulated",
        output_error: str = "first",
        space: str = "mean",
    ) -> None:
        """Make a baseline.

        Args:
            model: as for `bpfree.PEPITA`.
            feedback: ``feedback["input"]`` is F, [values of a sample, classes].
            optimizer: any torch optimizer.
            loss: as for `bpfree.PEPITA`.
            presynaptic, output_error, space: as for `bpfree.PEPITA`.

        Raises:
            TypeError, ValueError: a model that is not supported, or an unknown loss.
            KeyError: feedback that lacks F.
        """
        check_loss(loss)
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self._network = parse(model)
        self._feedback = feedback["input"]
        self._modulated = presynaptic == "modulated"
        self._second_error = output_error == "second"
        self._space = space

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Two passes, update.

        Args:
            x: input, [batch, ...].
            y: class of each sample, int32 or int64, [batch].

        Returns:
            Loss and output of the first pass.
        """
        self.optimizer.zero_grad(set_to_none=True)
        result = self.backward(x, y)
        self.optimizer.step()
        return result

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor) -> StepResult:
        """Two passes only: adds to ``.grad``."""
        network = self._network
        x = network.enter(x)
        masks: Masks = {}
        inputs, outputs, logits = self._run(x, masks)
        error = self._error(logits, y)
        perturbed = x + (error @ self._feedback.t()).view_as(x)
        inputs2, outputs2, logits2 = self._run(perturbed, masks)
        presynaptic = inputs2 if self._modulated else inputs
        hidden = zip(network.hidden, outputs, outputs2, presynaptic[:-1], strict=True)
        for stage, h, h2, pre in hidden:
            self._learn(stage, h - h2, pre)
        if self._second_error:
            error = self._error(logits2, y)
        by_class = 1 / error.shape[1]
        scale = {"bce": by_class, "mse": 2 * by_class}.get(name_of(self.loss), 1.0)
        _add_dense(network.output.layer, scale * error, presynaptic[-1])
        return StepResult(batch_loss(logits, y, self.loss), output_of(logits, self.loss))

    def _run(self, x: Tensor, masks: Masks) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Inputs of all layers, outputs of the hidden ones (behind a dropout), and the logits."""
        inputs, outputs = [x], []
        for stage in self._network.hidden:
            x = stage.forward(x)
            outputs.append(x)
            for number, module in enumerate(stage.after):
                if isinstance(module, nn.Dropout | nn.Dropout2d):
                    place = (stage.position, number)
                    if place not in masks:
                        masks[place] = module(torch.ones_like(x))
                    x = x * masks[place]
                    if number == 0:
                        outputs[-1] = x
                else:
                    x = module(x)
            inputs.append(x)
        return inputs, outputs, self._network.output.forward(x)

    def _error(self, logits: Tensor, y: Tensor) -> Tensor:
        if name_of(self.loss) == "hinge":
            with torch.enable_grad():
                z = logits.detach().requires_grad_()
                (error,) = torch.autograd.grad(z.shape[0] * batch_loss(z, y, self.loss), z)
            return error
        target = F.one_hot(y.long(), logits.shape[1]).to(logits.dtype)
        return output_of(logits, self.loss) - target

    def _learn(self, stage: Stage, change: Tensor, pre: Tensor) -> None:
        layer = stage.layer
        if not isinstance(layer, nn.Conv2d):
            _add_dense(layer, change, pre)
            return
        positions = change.shape[2] * change.shape[3]
        divisor = {"mean": positions, "sqrt": math.sqrt(positions), "sum": 1}[self._space]
        change = change / (change.shape[0] * divisor)
        padded = F.pad(pre, layer._reversed_padding_repeated_twice)  # works for "same" as well
        of_weight = conv2d_weight(
            padded, layer.weight.shape, change, layer.stride, 0, layer.dilation, layer.groups
        )
        _add(layer.weight, of_weight)
        _add(layer.bias, change.sum((0, 2, 3)))


def _add_dense(layer: Layer, post: Tensor, pre: Tensor) -> None:
    _add(layer.weight, post.t() @ pre / post.shape[0])
    _add(layer.bias, post.mean(0))


def _add(parameter: Tensor | None, grad: Tensor) -> None:
    if parameter is None or not parameter.requires_grad:
        return
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad

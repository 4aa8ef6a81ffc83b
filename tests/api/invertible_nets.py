"""Small invertible networks and batches that the tests of GAIT-prop share."""

from __future__ import annotations

import numpy as np
import torch
from gait_equations import Net
from torch import Tensor, nn
from urfb_equations import Layer

from bpfree.nn import InvertibleConv2d, InvertibleLinear
from bpfree.nn.invertible import Invertible

CLASSES = 4


def orthogonal(model: nn.Sequential) -> nn.Sequential:
    """Weights orthogonal to the last digit of their dtype, biases random."""
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
    return model


def off_orthogonal(model: nn.Sequential, by: float) -> nn.Sequential:
    """Every weight moved by normal noise of this deviation."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.weight.add_(by * noise.to(layer.weight))
    return model


def dense(dtype: torch.dtype = torch.float64, depth: int = 2, units: int = 9) -> nn.Sequential:
    """12 inputs, `depth` + 1 hidden layers, one of them a plain square Linear, 4 classes."""
    torch.manual_seed(0)
    hidden: list[nn.Module] = []
    for place in range(depth):
        layer = nn.Linear(units, units) if place == 1 else InvertibleLinear(units)
        hidden += [layer, nn.LeakyReLU(0.1)]
    ends = nn.Linear(12, units), nn.LeakyReLU(0.1), InvertibleLinear(units, outputs=CLASSES)
    return orthogonal(nn.Sequential(nn.Flatten(), *ends[:2], *hidden, ends[2]).to(dtype))


def conv(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """2×6×5 inputs, a convolution, two invertible ones with auxiliary channels, 4 of 18 outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.LeakyReLU(0.1),
        InvertibleConv2d(3, 3, padding=1, features=4),
        nn.LeakyReLU(0.1),
        InvertibleConv2d(4, 2, features=3, bias=False),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        InvertibleLinear(18, outputs=CLASSES),
    )
    return orthogonal(model.to(dtype))


def strided() -> nn.Sequential:
    """2×9×11 inputs; "same" at strides, dilation, overlap and gaps; no activation in one place."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.LeakyReLU(0.1),
        InvertibleConv2d(3, 3, stride=2, padding="same", features=4),
        nn.LeakyReLU(0.1),
        InvertibleConv2d(4, 2, stride=(1, 3), features=3, dilation=2),
        InvertibleConv2d(3, 2, padding="same", features=2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        InvertibleLinear(12, outputs=CLASSES),
    )
    return orthogonal(model.double())


def batch_for(model: nn.Sequential, samples: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs that fit one of these nets, in its dtype, and labels in which one class is missing."""
    first = next(p for p in model.parameters())
    size = (3, 4) if first.dim() == 2 else (2, 6, 5) if len(model) == 8 else (2, 9, 11)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, *size, generator=generator, dtype=torch.float64)
    return x.to(first.dtype), torch.arange(samples) % (CLASSES - 1)


def as_equations(model: nn.Sequential, size: tuple[int, int] = (6, 5)) -> Net:
    """The same net for the equations; convolutions by steps of 1, with symmetric padding."""
    layers, handed = [], []
    for module in model:
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach().double().numpy()
        bias = (
            np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
        )
        outputs = module.outputs if isinstance(module, Invertible) else len(weight)
        if isinstance(module, nn.Linear):
            layers.append(Layer(weight, bias))
            handed.append(outputs)
            continue
        margin = int(module.padding[0])
        rows, columns = (
            n + 2 * margin - k + 1 for n, k in zip(size, weight.shape[2:], strict=True)
        )
        layers.append(Layer(weight, bias.repeat(rows * columns), size, margin))
        handed.append(outputs * rows * columns)
        size = (rows, columns)
    return Net(layers, handed)

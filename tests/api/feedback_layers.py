"""Layers with feedback weights, one of each kind, that the tests of bpfree.nn share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bpfree.nn import FeedbackConv2d, FeedbackLinear, FeedbackLocallyConnected2d

MODES = ("updated", "fixed", "sign")

Make = Callable[..., nn.Module]


def linear(**options: object) -> nn.Module:
    return FeedbackLinear(4, 5, **options)


def conv(**options: object) -> nn.Module:
    return FeedbackConv2d(4, 6, (3, 2), **{"groups": 2, "padding": "same", **options})


def local(**options: object) -> nn.Module:
    return FeedbackLocallyConnected2d(
        4, 6, (3, 2), padding="same", groups=2, **{"input_size": (5, 4), **options}
    )


KINDS = {"linear": (linear, (3, 4)), "conv": (conv, (3, 4, 5, 4)), "local": (local, (3, 4, 5, 4))}

each_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(kind: str) -> tuple[Make, Tensor]:
    """A layer's constructor and an input in float64."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    return make, torch.randn(shape, dtype=torch.float64)


def network(dtype: torch.dtype = torch.float64, **options: object) -> nn.Sequential:
    """One layer of each kind, all in the same mode."""
    torch.manual_seed(2)
    return nn.Sequential(
        FeedbackLocallyConnected2d(1, 2, 3, input_size=(6, 6), **options),
        nn.ReLU(inplace=True),
        FeedbackConv2d(2, 3, 3, **options),
        nn.Hardtanh(),
        nn.Flatten(),
        FeedbackLinear(12, 3, **options),
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype), (
        torch.arange(8) % 3
    )


def layers(model: nn.Sequential) -> list[nn.Module]:
    return [model[0], model[2], model[5]]

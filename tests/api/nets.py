"""Small networks and batches that the tests of the training API share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 4


def dense(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """12 inputs, two hidden layers of different activations, 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(12, 7),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(7, 5),
        nn.LeakyReLU(0.1),
        nn.Linear(5, CLASSES),
    ).to(dtype)


def conv(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """3×9×8 inputs, two convolutions with pooling (nested), a dense layer, 4 classes."""
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
    )
    return nn.Sequential(
        features,
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(6, 8),
        nn.Hardtanh(),
        nn.Dropout(dropout),
        nn.Linear(8, CLASSES),
    ).to(dtype)


def dense_batch(samples: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs [samples, 3, 4] and labels in which classes repeat and one is missing."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 3, 4, dtype=dtype, generator=generator)
    return x, torch.arange(samples) % (CLASSES - 1)


def conv_batch(samples: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs [samples, 3, 9, 8] and labels."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(samples, 3, 9, 8, dtype=dtype, generator=generator)
    return x, torch.arange(samples) % (CLASSES - 1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter is bit for bit what it was."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} has changed"


def assert_close(model: nn.Module, wanted: nn.Module, tolerance: float = 1e-12) -> None:
    """Every parameter is that of another model, up to rounding."""
    for (name, got), want in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def hinge(logits: Tensor, y: Tensor, margin: float = 1.0, off_class: float | None = None) -> Tensor:
    """Multi-class hinge loss of each sample by relu, which drops the gradient on a threshold."""
    samples, classes = logits.shape
    off_class = 1 / max(classes - 1, 1) if off_class is None else off_class
    own = torch.relu(margin - logits[range(samples), y])
    others = torch.relu(margin + logits)
    others = others.masked_fill(torch.arange(classes) == y[:, None], 0)
    return own + off_class * others.sum(1)

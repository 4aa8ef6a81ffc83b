"""An autoencoder of handwritten digits that learns by error kernels, with no derivative of tanh.

::

    python examples/autoencoder.py [--epochs N]

The net 64-32-16-32-64 reconstructs scikit-learn's 8×8 digits, so that its error is no class's. The loop is
torch's own: the loss of a batch, ``backward()``, SGD. What goes down through the net is each unit's distance
from its target (`bpfree.nn.error_kernel`).

A net whose hidden layers stay as they were drawn reconstructs digits, too, because its output layer learns.
Such a control is trained beside the net; what the net does better is its hidden layers' learning.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor, nn

from bpfree import data
from bpfree.nn import ErrorKernelLinear, TargetActivation, feedback_weights

SIZES = (64, 32, 16, 32, 64)
BATCH_SIZE = 32
LEARNING_RATE = 5e-3


def make_autoencoder(seed: int, *, frozen: bool = False) -> nn.Sequential:
    """Dense layers of `SIZES`, tanh between them, Glorot's start.

    Args:
        seed: seed of W and E.
        frozen: whether the hidden layers stay as they are.

    Returns:
        The net, [batch, 64] -> [batch, 64].
    """
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layer = ErrorKernelLinear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        modules += [layer, TargetActivation("tanh")]
    *hidden, output, _ = modules  # the output is linear
    for module in hidden:
        module.requires_grad_(not frozen)
    return nn.Sequential(*hidden, output)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, generator: torch.Generator
) -> None:
    """Show every image once, [images, 64], in an order from the generator."""
    for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
        x = images[chosen]
        # Half the sum of squares, over the batch too: its gradient is the first error, output − x.
        loss = 0.5 * (model(x) - x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def reconstruction_loss(model: nn.Module, images: Tensor) -> float:
    """Mean squared error of a pixel in [0, 1], over images [images, 64]."""
    return float((model(images) - images).square().mean())


def run(epochs: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Train the net and its control from the same start on the same batches, and print how they do.

    Args:
        epochs: how often each training image is shown.
        seed: seed of the start and of the batches.

    Returns:
        Loss on the test images before training and after each epoch: of the net, and of the control.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    digits = data.load("digits")
    train, test = digits.train_x.flatten(1), digits.test_x.flatten(1)
    losses: tuple[list[float], list[float]] = ([], [])
    trained = []
    for frozen in (False, True):
        model = make_autoencoder(seed, frozen=frozen)
        tensors = [*model.parameters(), *feedback_weights(model)]  # E learns with the optimizer
        optimizer = torch.optim.SGD(tensors, lr=LEARNING_RATE)
        trained.append((model, optimizer, torch.Generator().manual_seed(seed)))
    print(f"mean squared error of a pixel, {len(test)} test images")
    print("epoch  hidden layers learn  hidden layers frozen")
    for epoch in range(epochs + 1):
        for (model, optimizer, generator), of_model in zip(trained, losses, strict=True):
            if epoch > 0:
                train_epoch(model, optimizer, train, generator)
            of_model.append(reconstruction_loss(model, test))
        print(f"{epoch:5}  {losses[0][-1]:19.4f}  {losses[1][-1]:20.4f}")
    return losses


def summary(learned: list[float], frozen: list[float]) -> str:
    """What of the improvement is the hidden layers' learning, from what `run` returns."""
    start, end, control = learned[0], learned[-1], frozen[-1]
    return (
        f"The loss fell by {start - end:.4f}: {start - control:.4f} of it with the output layer "
        f"alone, {control - end:.4f} because the hidden layers learn, too, which is "
        f"{100 * (control - end) / control:.0f} % of the control's loss."
    )


def main() -> None:
    """Read the command line, train, and say what the hidden layers' learning was good for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="training epochs (default 20)")
    print(summary(*run(parser.parse_args().epochs)))


if __name__ == "__main__":
    main()

"""From convolutions to locally connected layers, in a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bpfree.nn.feedback import FeedbackConv2d, FeedbackLocallyConnected2d
from bpfree.nn.local import LocallyConnected2d

_UNTIED: dict[type[nn.Module], Any] = {
    nn.Conv2d: LocallyConnected2d,
    FeedbackConv2d: FeedbackLocallyConnected2d,
}


def untie(
    model: nn.Module, input_shape: Sequence[int], names: Iterable[str] | None = None
) -> list[str]:
    """Replace convolutions of a model, in place, by locally connected layers that start alike.

    The model computes the same function as before. `torch.nn.Conv2d` becomes `LocallyConnected2d`,
    `FeedbackConv2d` becomes `FeedbackLocallyConnected2d`; subclasses of other kinds stay. A batch
    without values (on the meta device) runs through the model to find the size of every layer's input.
    The new layers have new parameters, so make the optimizer afterwards.

    Args:
        model: the model, e.g. a `torch.nn.Sequential`.
        input_shape: shape of a sample without the batch, e.g. (3, 32, 32).
        names: which convolutions, as ``model.named_modules()`` has them; all of them by default.

    Returns:
        The names of what was replaced.

    Raises:
        TypeError: a name of a module that is no convolution of these kinds.
        ValueError: an unknown name, a model that is itself a convolution, a convolution that does not
            run exactly once, a sample that does not fit the model, or what `from_conv2d` refuses.
    """
    convs = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in _UNTIED
    }
    if names is not None:
        convs = {name: _named(model, name) for name in names}
    if "" in convs:
        raise ValueError("model must contain convolutions, but it is one; use from_conv2d.")
    sizes = _input_sizes(model, convs.values(), input_shape)
    untied: dict[str, nn.Module] = {}
    for name, conv in convs.items():
        seen = sizes[conv]
        if len(seen) != 1:
            raise ValueError(
                f"module {name!r} must run once in the model, it runs {len(seen)} times."
            )
        untied[name] = _UNTIED[type(conv)].from_conv2d(conv, seen[0])
    for name, layer in untied.items():
        model.set_submodule(name, layer)
    return list(untied)


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"names must be modules of the model, got {name!r}.") from error
    if type(module) not in _UNTIED:
        raise TypeError(
            f"module {name!r} must be a Conv2d or a FeedbackConv2d, got {type(module).__name__}."
        )
    return module


def _input_sizes(
    model: nn.Module, convs: Iterable[nn.Module], input_shape: Sequence[int]
) -> dict[nn.Module, list[tuple[int, int]]]:
    """Height and width of each convolution's input, each time that it runs."""
    sizes: dict[nn.Module, list[tuple[int, int]]] = {conv: [] for conv in convs}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[module].append((args[0].shape[-2], args[0].shape[-1]))

    hooks = [conv.register_forward_pre_hook(note) for conv in sizes]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shadow = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in shadow.values() if t.is_floating_point()), None)
    # Two samples: batch normalisation refuses to train on one.
    x = torch.empty((2, *input_shape), device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, shadow, (x,))
    except RuntimeError as error:
        raise ValueError(
            f"a sample of shape {tuple(input_shape)} does not fit the model: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return sizes

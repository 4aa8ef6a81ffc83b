"""Converters of locally connected layers: Keras' weights, and all convolutions of a model."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import bpfree
from bpfree.nn import LocallyConnected1d, LocallyConnected2d


def keras_layer(
    x: np.ndarray, kernel: np.ndarray, window: tuple[int, ...], stride: int
) -> np.ndarray:
    """Keras' LocallyConnected, channels last: each flattened window times its own matrix."""
    sizes = [(n - k) // stride + 1 for n, k in zip(x.shape[1:-1], window, strict=True)]
    flat = []
    for place in itertools.product(*(range(n) for n in sizes)):
        cut = tuple(slice(p * stride, p * stride + k) for p, k in zip(place, window, strict=True))
        flat.append(x[(slice(None), *cut)].reshape(len(x), -1))
    z = np.einsum("pnk,pko->npo", np.stack(flat), kernel)
    return z.reshape(len(x), *sizes, -1)


@pytest.mark.parametrize("stride", [1, 2])
def test_from_and_to_keras(stride: int) -> None:
    draws = np.random.default_rng(0)
    x = draws.normal(size=(2, 5, 7, 3))
    kernel = draws.normal(size=(len(range(0, 4, stride)) * len(range(0, 5, stride)), 2 * 3 * 3, 4))
    wanted = keras_layer(x, kernel, (2, 3), stride)
    bias = draws.normal(size=wanted.shape[1:])
    layer = LocallyConnected2d.from_keras(
        kernel, bias, kernel_size=(2, 3), input_size=(5, 7), stride=stride
    )
    z = layer(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(z.detach().numpy(), wanted + bias, rtol=1e-12)
    for array, original in zip(layer.to_keras(), (kernel, bias), strict=True):
        np.testing.assert_array_equal(array, original)


def test_sequences_from_and_to_keras() -> None:
    draws = np.random.default_rng(1)
    x, kernel = draws.normal(size=(2, 8, 3)), draws.normal(size=(3, 4 * 3, 5))
    layer = LocallyConnected1d.from_keras(kernel, kernel_size=4, input_size=8, stride=2)
    z = layer(torch.from_numpy(x).transpose(1, 2)).transpose(1, 2)
    np.testing.assert_allclose(z.detach().numpy(), keras_layer(x, kernel, (4,), 2), rtol=1e-12)
    (array,) = layer.to_keras()
    np.testing.assert_array_equal(array, kernel)
    array[:] = 0
    assert layer.weight.count_nonzero() == layer.weight.numel()


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"kernel": np.zeros((9, 12))}, "kernel must have shape"),
        (ValueError, {"kernel": np.zeros((9, 13, 4))}, "multiple of 4"),
        (ValueError, {"kernel": np.zeros((8, 12, 4))}, "kernel must have shape"),
        (TypeError, {"kernel": np.zeros((9, 12, 4), int)}, "kernel must be floating-point"),
        (ValueError, {"bias": np.zeros(4)}, "bias must have shape"),
    ],
)
def test_keras_weights_that_do_not_fit(
    error: type[Exception], change: dict[str, np.ndarray], message: str
) -> None:
    arguments = {"kernel": np.zeros((9, 12, 4)), "bias": np.zeros((3, 3, 4)), **change}
    with pytest.raises(error, match=message):
        LocallyConnected2d.from_keras(**arguments, kernel_size=2, input_size=4)


@pytest.mark.parametrize(
    "place", [{"padding": 1}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}]
)
def test_layers_that_keras_does_not_have(place: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Keras"):
        LocallyConnected2d(2, 2, 3, input_size=6, **place).to_keras()


def test_untie_a_model() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(10),
        nn.Linear(10, 3),
    )
    model[0][1].running_mean.fill_(0.5)
    x, before = torch.randn(2, 3, 9, 11), copy.deepcopy(model)
    with pytest.raises(ValueError, match="does not fit the model"):
        bpfree.nn.untie(model, (2, 9, 11))
    assert bpfree.nn.untie(model, (3, 9, 11), names=["2"]) == ["2"]
    assert type(model[0][0]) is nn.Conv2d
    assert bpfree.nn.untie(model, (3, 9, 11)) == ["0.0"]
    assert [m.input_size for m in (model[0][0], model[2])] == [(9, 11), (4, 5)]
    assert torch.equal(model[0][1].running_mean, before[0][1].running_mean)
    assert model.training
    assert not model[0][0]._forward_pre_hooks
    torch.testing.assert_close(model.eval()(x), before.eval()(x))
    assert bpfree.nn.untie(model, (3, 9, 11)) == []


def test_untie_refuses() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match="must contain convolutions"):
        bpfree.nn.untie(conv, (3, 5, 5))
    with pytest.raises(ValueError, match="it runs 2 times"):
        bpfree.nn.untie(nn.Sequential(conv, conv), (3, 5, 5))
    model = nn.Sequential(conv, nn.ReLU())
    with pytest.raises(TypeError, match="module '1' must be a Conv2d"):
        bpfree.nn.untie(model, (3, 5, 5), ["0", "1"])
    with pytest.raises(ValueError, match="got '7'"):
        bpfree.nn.untie(model, (3, 5, 5), ["0", "7"])
    circular = nn.Sequential(conv, nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="padding_mode"):
        bpfree.nn.untie(circular, (3, 5, 5))
    assert circular[0] is conv

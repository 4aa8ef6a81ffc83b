"""Invertible layers: they run like torch's, hand on a part, and give their input back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree_kernels as kernels
from bpfree.nn import InvertibleConv2d, InvertibleLinear

PLACES: list[tuple[dict[str, object], tuple[int, int]]] = [
    ({"kernel_size": 3, "padding": 1}, (6, 5)),
    ({"kernel_size": 3, "stride": 2, "padding": 1}, (7, 6)),
    ({"kernel_size": 5, "stride": 2, "padding": "same"}, (8, 7)),
    ({"kernel_size": 3, "stride": 2, "padding": "same"}, (6, 8)),  # one more below and on the right
    ({"kernel_size": 2, "stride": 3}, (8, 7)),  # some pixels in no window
    ({"kernel_size": (2, 3), "padding": "same"}, (4, 5)),
    ({"kernel_size": 3, "stride": (1, 2), "padding": "valid", "dilation": 2}, (7, 6)),
]


def noisy(layer: nn.Module, by: float = 0.05) -> nn.Module:
    """A weight that is not orthogonal, a bias that is not 0."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return layer


def make_conv(place: dict[str, object], **options: object) -> InvertibleConv2d:
    torch.manual_seed(1)
    layer = InvertibleConv2d(2, **place, **options, dtype=torch.float64)
    noisy(layer)
    return layer


def tensorflow_same(x: Tensor, layer: InvertibleConv2d) -> Tensor:
    """Padded as TensorFlow documents it, each direction by itself."""
    around: list[int] = []
    for size, k, s in zip(x.shape[2:], layer.kernel_size, layer.stride, strict=True):
        count = -(-size // s)
        total = max((count - 1) * s + k - size, 0)
        around = [total // 2, total - total // 2, *around]
    return F.pad(x, around)


def test_linear_is_torchs_with_an_orthogonal_start() -> None:
    torch.manual_seed(0)
    layer = InvertibleLinear(7, outputs=3, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    whole = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), whole[..., :3])
    torch.testing.assert_close(layer.auxiliary, whole[..., 3:].detach())
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(7).double())
    assert layer.bias.count_nonzero() == 0
    assert not layer.auxiliary.requires_grad
    plain = nn.Linear(7, 7, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert InvertibleLinear(4, bias=False).bias is None


@pytest.mark.parametrize(("place", "size"), PLACES, ids=str)
def test_convolution_is_torchs(place: dict[str, object], size: tuple[int, int]) -> None:
    layer = make_conv(place, features=3)
    window = layer.kernel_size[0] * layer.kernel_size[1]
    assert layer.weight.shape == (2 * window, 2, *layer.kernel_size)
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    padded = tensorflow_same(x, layer) if layer.padding == "same" else x
    whole = F.conv2d(padded, layer.weight, layer.bias, layer.stride, padding, layer.dilation)
    torch.testing.assert_close(layer(x), whole[:, :3])
    torch.testing.assert_close(layer.auxiliary, whole[:, 3:].detach())
    layer.reset_parameters()
    square = layer.weight.detach().flatten(1)
    torch.testing.assert_close(square @ square.T, torch.eye(2 * window).double())
    plain = nn.Conv2d(2, 2 * window, layer.kernel_size, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(("place", "size"), PLACES, ids=str)
@pytest.mark.parametrize("features", [None, 5])
def test_convolution_gives_its_input_back(
    place: dict[str, object], size: tuple[int, int], features: int | None
) -> None:
    layer = make_conv(place, features=features)
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    y = layer(x)
    assert (layer.auxiliary is None) == (features is None)
    back = layer.inverse(y, x)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    assert not back.requires_grad


@pytest.mark.parametrize("outputs", [None, 4])
def test_linear_gives_its_input_back(outputs: int | None) -> None:
    torch.manual_seed(0)
    layer = InvertibleLinear(9, outputs=outputs, dtype=torch.float64)
    noisy(layer)
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.inverse(layer(x), x), x, rtol=0, atol=1e-12)


def test_the_inverse_follows_the_weight() -> None:
    """In place, by an op of the kernels, by a new parameter, by data of its own, and in a copy."""
    torch.manual_seed(0)
    layer = InvertibleLinear(6, outputs=2, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)

    def check() -> None:
        torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-11)

    check()
    noisy(layer, 0.3)
    check()
    kernels.apply_update(layer.weight, torch.randn_like(layer.weight), kernels.SGD(0.05))
    check()
    layer.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    check()
    layer.weight.data = torch.randn(6, 6, dtype=torch.float64)
    check()
    layer.weight.data.mul_(2)
    check()
    for kind in (
        torch.optim.Adam,
        torch.optim.SGD,
    ):  # fused, no version counter tells of their writing
        layer(x).square().sum().backward()
        kind(layer.parameters(), lr=0.1, fused=True).step()
        check()
    layer = copy.deepcopy(layer)
    noisy(layer)
    check()
    layer, x = layer.float(), x.float()
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-4)


def test_an_inverse_begins_with_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = InvertibleLinear(6)
    x = torch.randn(3, 6)
    calls = []
    invert = kernels.invert

    def counted(weight: Tensor, start: Tensor | None) -> kernels.Solution:
        calls.append(start is None)
        return invert(weight, start)

    monkeypatch.setattr(kernels, "invert", counted)
    for _ in range(2):
        layer.inverse(layer(x))
    noisy(layer)
    layer.inverse(layer(x))
    assert calls == [True, False, False]


@pytest.mark.parametrize(
    ("dtype", "slope", "bound"),
    [(torch.float32, 1.0, 1e-4), (torch.float32, 0.5, 1e-4), (torch.float64, 0.1, 1e-9)],
)
def test_six_convolutions_give_their_input_back(
    dtype: torch.dtype, slope: float, bound: float
) -> None:
    """Down a stack with leaky ReLUs between, by what is handed on and the auxiliary units.

    An error grows by up to 1 / slope at each activation, and by the root of the number of windows that hold a
    pixel: a slope of 0.1 leaves float32 two or three digits after six layers.
    """
    torch.manual_seed(0)
    layers = [InvertibleConv2d(3, 3, padding="same", features=3, dtype=dtype) for _ in range(5)]
    layers.append(InvertibleConv2d(3, 5, stride=2, padding="same", features=10, dtype=dtype))
    inputs = [torch.randn(4, 3, 8, 8, dtype=dtype)]
    for layer in layers:
        noisy(layer, 0.01)
        inputs.append(F.leaky_relu(layer(inputs[-1]), slope))
    back = inputs[-1]
    for layer, x in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        back = layer.inverse(torch.where(back > 0, back, back / slope), x)
    assert (back - inputs[0]).abs().max() < bound
    z = layers[0].field(inputs[0], 3)
    layers[0].auxiliary = torch.zeros_like(layers[0].auxiliary)
    assert (layers[0].inverse(z, inputs[0]) - inputs[0]).abs().max() > 0.1


def test_training_goes_through_autograd() -> None:
    layer = make_conv({"kernel_size": 3, "stride": 2, "padding": "same"}, features=3)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = layer.weight, layer.bias
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *weights))
    layer(x).sum().backward()
    assert layer.weight.grad[:3].abs().min() > 0
    assert layer.weight.grad[3:].count_nonzero() == 0


def test_what_is_kept_is_no_state() -> None:
    layer = InvertibleConv2d(2, 2, features=3)
    x = torch.randn(1, 2, 4, 4)
    layer.inverse(layer(x), x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.auxiliary is None
    torch.testing.assert_close(loaded(x), layer(x))
    torch.testing.assert_close(loaded.inverse(loaded(x), x), x, rtol=0, atol=1e-5)


def test_singular_weights_are_named() -> None:
    layer = InvertibleLinear(5)
    nn.init.zeros_(layer.weight)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(5, 5\) .* condition number is inf"):
        layer.inverse(layer(torch.randn(2, 5)))
    conv = InvertibleConv2d(2, 2)
    with torch.no_grad():
        conv.weight[3] = conv.weight[1]
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(8, 2, 2, 2\) .* condition number"):
        conv.inverse(conv(x), x)


def test_outputs_that_do_not_fit_are_refused() -> None:
    layer = InvertibleLinear(6, outputs=2)
    with pytest.raises(
        RuntimeError, match=r"inverse of InvertibleLinear.* needs the auxiliary units"
    ):
        layer.inverse(torch.zeros(3, 2))
    y = layer(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"the 2 outputs of .* got shape \(3, 6\)"):
        layer.inverse(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"\(3, 2\) of torch.float32 .* got \(4, 2\)"):
        layer.inverse(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"got .* of torch.float64"):
        layer.inverse(y.double())
    conv = InvertibleConv2d(2, 2, features=3)
    z = conv(torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match="the 3 outputs"):
        conv.inverse(torch.zeros(3), z)
    with pytest.raises(ValueError, match="output must have shape"):
        conv.inverse(z, torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: InvertibleLinear(4, outputs=0),
            ValueError,
            "outputs must lie in 1 to 4, .* got 0",
        ),
        (lambda: InvertibleLinear(4, outputs=5), ValueError, "outputs must lie in 1 to 4"),
        (lambda: InvertibleLinear(4, outputs=2.0), TypeError, "outputs must be an int"),
        (lambda: InvertibleConv2d(2, 3, features=19), ValueError, "features must lie in 1 to 18"),
        (lambda: InvertibleConv2d(2, 3, padding="full"), ValueError, "full"),
        (lambda: InvertibleConv2d(2, 3.0), TypeError, "kernel_size must be an int"),
        (lambda: InvertibleConv2d(2, 3, stride=0), ValueError, "stride must be one or two ints"),
    ],
)
def test_bad_arguments(make: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_layers_say_what_they_are() -> None:
    assert (
        repr(InvertibleLinear(4, outputs=2)) == "InvertibleLinear(features=4, outputs=2, bias=True)"
    )
    assert repr(InvertibleConv2d(2, 3, 2, "same", 5)) == (
        "InvertibleConv2d(2, 18, kernel_size=(3, 3), stride=(2, 2), padding=same, features=5)"
    )

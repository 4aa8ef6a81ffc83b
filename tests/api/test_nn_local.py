"""Locally connected layers in the place of torch's convolutions; their masks."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree
from bpfree.nn import LocallyConnected1d, LocallyConnected2d

PLACES = (
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": (0, 2), "stride": (1, 3), "bias": False},
    {"groups": 2, "padding": 1},
)
PLACES_1D = (
    {},
    {"stride": (2,), "padding": 1},
    {"padding": "same", "bias": False},
    {"groups": 2, "dilation": 2},
)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def tied_weight_gradient(layer: nn.Module, dims: int) -> Tensor:
    """Σ over positions of the layer's weight gradient, [out, in/groups, *window]."""
    summed = layer.weight.grad.sum(tuple(range(dims)))
    return summed.permute(dims + 1, dims, *range(dims))


def assert_starts_as(conv: nn.Module, layer: nn.Module, x: Tensor) -> None:
    """Equal values, input gradients, and gradients of the parameters summed over positions."""
    dims = x.dim() - 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(at) for module, at in zip((conv, layer), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    signal = randn(*outputs[0].shape)
    for output in outputs:
        output.backward(signal)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(tied_weight_gradient(layer, dims), conv.weight.grad)
    if conv.bias is not None:
        torch.testing.assert_close(layer.bias.grad.sum(tuple(range(dims))), conv.bias.grad)
    torch.testing.assert_close(layer(x[0]), conv(x[0]))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_untied_convolution_is_the_convolution(place: dict[str, object]) -> None:
    """U6, U10: values, and the weight gradient summed over positions."""
    conv = nn.Conv2d(4, 6, (3, 2), dtype=torch.float64, **place)
    layer = LocallyConnected2d.from_conv2d(conv, (7, 8))
    assert_starts_as(conv, layer, randn(3, 4, 7, 8))
    assert layer.bias is None or layer.weight.shape[:2] == layer.bias.shape[:2]


@pytest.mark.parametrize("place", PLACES_1D, ids=str)
def test_untied_convolution_of_sequences(place: dict[str, object]) -> None:
    conv = nn.Conv1d(4, 6, 3, dtype=torch.float64, **place)
    assert_starts_as(conv, LocallyConnected1d.from_conv1d(conv, 9), randn(3, 4, 9))


def test_untied_layer_shares_nothing_and_keeps_what_learns() -> None:
    conv = nn.Conv2d(2, 3, 3).eval()
    conv.weight.requires_grad_(False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    layer = LocallyConnected2d.from_conv2d(conv, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    kernel = conv.weight.clone()
    layer.weight.data[0, 0].add_(1)
    assert torch.equal(conv.weight, kernel)
    assert not torch.equal(layer.weight[0, 0], layer.weight[0, 1])
    one = nn.Conv2d(1, 1, 1)
    single = LocallyConnected2d.from_conv2d(one, 1)
    assert single.weight.data_ptr() != one.weight.data_ptr()
    assert single.bias.data_ptr() != one.bias.data_ptr()


def test_positions_differ() -> None:
    """Each output position is the convolution with that position's own weight."""
    layer = LocallyConnected2d(2, 3, 3, stride=2, padding=1, input_size=(5, 6), dtype=torch.float64)
    x = randn(2, 2, 5, 6)
    z = layer(x)
    for i, j in itertools.product(range(3), range(3)):
        kernel = layer.weight[i, j].permute(3, 2, 0, 1)
        everywhere = F.conv2d(x, kernel, layer.bias[i, j], stride=2, padding=1)
        torch.testing.assert_close(z[:, :, i, j], everywhere[:, :, i, j])


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    options = {"input_size": (4, 5), "padding": 1, "stride": 2, "dtype": torch.float64}
    layer = LocallyConnected2d(2, 3, 3, **options)
    if masked:  # an absent weight's gradient is 0 by decree, whatever the differences say
        mask = bpfree.nn.random_connectivity(layer.weight, 0.5)
        layer = LocallyConnected2d(2, 3, 3, mask=mask, **options)
        layer.weight.requires_grad_(False)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    x = randn(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_initialisation_is_that_of_a_convolution() -> None:
    """U(±1/√fan_in) for weight and bias, fan_in = in/groups · window."""
    torch.manual_seed(0)
    layer = LocallyConnected2d(8, 16, 3, groups=2, input_size=(20, 20))
    bound = 1 / math.sqrt(4 * 9)
    for parameter in (layer.weight, layer.bias):
        assert 0.99 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(layer.weight[0, 0], layer.weight[5, 7])
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_printed_form() -> None:
    layer = LocallyConnected2d(4, 6, 3, 1, 1, 2, 2, False, input_size=(7, 8))
    conv = nn.Conv2d(4, 6, 3, 1, 1, 2, 2, False)
    assert layer.extra_repr() == f"{conv.extra_repr()}, input_size=(7, 8)"


def test_parameters_wait_for_the_first_batch() -> None:
    lazy = LocallyConnected2d(3, 4, 3, stride=2)
    twin, loaded = copy.deepcopy(lazy), copy.deepcopy(lazy).double()
    assert torch.nn.parameter.is_lazy(lazy.weight)
    assert lazy.state_dict().keys() == {"weight", "bias"}
    assert lazy(torch.ones(2, 3, 9, 7)).shape == (2, 4, 4, 3)
    assert lazy.input_size == (9, 7)
    assert lazy.weight.shape == (4, 3, 3, 3, 3, 4)
    assert type(lazy) is LocallyConnected2d
    assert not lazy._forward_pre_hooks
    assert copy.deepcopy(lazy)(torch.ones(3, 9, 7)).shape == (4, 4, 3)
    twin.load_state_dict(lazy.state_dict())
    x = randn(1, 3, 9, 7, dtype=torch.float32)
    assert torch.equal(twin(x), lazy(x))
    assert twin.input_size == (9, 7)
    assert loaded(x.double()).dtype == torch.float64
    sequence = LocallyConnected1d(3, 4, 2)
    assert sequence(torch.ones(3, 6)).shape == (4, 5)
    assert sequence.weight.shape == (5, 2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 4, 9, 7), "x must have shape"), ((9, 7), "x must have shape"), ((1, 3, 2, 7), "smaller")],
)
def test_first_batch_that_does_not_fit_changes_nothing(
    shape: tuple[int, ...], message: str
) -> None:
    lazy = LocallyConnected2d(3, 4, 3)
    with pytest.raises(ValueError, match=message):
        lazy(torch.ones(shape))
    assert lazy.input_size is None
    assert lazy(torch.ones(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_state_of_another_size_is_refused_at_the_first_batch() -> None:
    lazy = LocallyConnected2d(3, 4, 3)
    lazy.load_state_dict(LocallyConnected2d(3, 4, 3, input_size=6).state_dict())
    with pytest.raises(ValueError, match="weight must have shape for an input of size"):
        lazy(torch.ones(1, 3, 7, 7))
    assert lazy(torch.ones(1, 3, 6, 6)).shape == (1, 4, 4, 4)


def test_mask_keeps_absent_connections_at_zero() -> None:
    """U7: absent weights stay 0, and a live weight that is 0.0 for once goes on learning."""
    torch.manual_seed(3)
    options = {"padding": 1, "input_size": (4, 4), "dtype": torch.float64}
    full = LocallyConnected2d(2, 3, 3, **options)
    mask = bpfree.nn.random_connectivity(full.weight, 0.5)
    layer = LocallyConnected2d(2, 3, 3, mask=mask, **options)
    given = mask.clone()
    assert "mask" in layer.state_dict()
    assert layer.weight[~mask].count_nonzero() == 0
    live = tuple(mask[1:3, 1:3].nonzero()[0] + torch.tensor([1, 1, 0, 0, 0, 0]))
    layer.weight.data[live] = 0.0
    mask.fill_(True)  # the layer keeps a copy
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        layer(randn(5, 2, 4, 4)).square().sum().backward()
        assert layer.weight.grad[~given].count_nonzero() == 0
        assert step > 0 or layer.weight.grad[live] != 0
        optimizer.step()
    assert layer.weight[~given].count_nonzero() == 0
    assert layer.weight[live] != 0
    layer.reset_parameters()
    assert layer.weight[~given].count_nonzero() == 0
    assert torch.equal(copy.deepcopy(layer).mask, given)


def test_mask_of_sequences() -> None:
    mask = torch.zeros(4, 3, 2, 5, dtype=torch.bool)
    mask[2, 1] = True
    layer = LocallyConnected1d(2, 5, 3, input_size=6, mask=mask, bias=False)
    z = layer(torch.ones(1, 2, 6))
    assert z[..., 2].count_nonzero() == 5
    assert z.count_nonzero() == 5
    z.sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_random_connectivity(fraction: float) -> None:
    weight = torch.empty(100, 100)
    masks = [
        bpfree.nn.random_connectivity(weight, fraction, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert masks[0].dtype == torch.bool
    assert masks[0].float().mean().item() == pytest.approx(fraction, abs=0.02)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2]) == (fraction in (0.0, 1.0))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must lie in"):
        bpfree.nn.random_connectivity(torch.empty(2), fraction)


WRONG = {
    "channels": (TypeError, {"in_channels": 3.0}, "in_channels must be an int"),
    "no channels": (ValueError, {"in_channels": 0}, "in_channels must be a positive multiple"),
    "groups of the input": (ValueError, {"groups": 2}, "in_channels must be .* got 3"),
    "groups of the output": (ValueError, {"groups": 3}, "out_channels must be .* got 4"),
    "kernel": (ValueError, {"kernel_size": 0}, "kernel_size must be"),
    "stride": (TypeError, {"stride": 1.5}, "stride must be"),
    "padding": (ValueError, {"padding": "full"}, "padding must be 'same', 'valid'"),
    "same with a stride": (ValueError, {"padding": "same", "stride": 2}, "needs stride 1"),
    "three sizes": (ValueError, {"input_size": (5, 5, 5)}, "input_size must be"),
    "small input": (ValueError, {"input_size": 2}, "smaller than the window"),
    "mask of numbers": (TypeError, {"mask": torch.ones(3, 3, 3, 3, 3, 4)}, "mask must be .*bool"),
    "mask's shape": (ValueError, {"mask": torch.ones(3).bool()}, "mask must have shape"),
    "no tensor": (TypeError, {"mask": [True]}, "mask must be a torch.Tensor"),
    "mask without a size": (
        ValueError,
        {"mask": torch.ones(3).bool(), "input_size": None},
        "mask needs input_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    error, change, message = WRONG[case]
    arguments = {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "input_size": 5}
    with pytest.raises(error, match=message):
        LocallyConnected2d(**{**arguments, **change})


def test_wrong_arguments_of_sequences() -> None:
    with pytest.raises(ValueError, match="kernel_size must be an int or one int in a tuple"):
        LocallyConnected1d(3, 4, (3, 3))
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 3, length\]"):
        LocallyConnected1d(3, 4, 3)(torch.ones(2, 3, 8, 8))


def test_wrong_inputs() -> None:
    layer = LocallyConnected2d(3, 4, 3, input_size=5)
    with pytest.raises(ValueError, match="weight has 3 x 3 positions"):
        layer(torch.ones(1, 3, 6, 6))
    with pytest.raises(ValueError, match="x must have shape"):
        layer(torch.ones(1, 2, 5, 5))
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        layer(torch.ones(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="padding_mode of conv must be 'zeros'"):
        LocallyConnected2d.from_conv2d(nn.Conv2d(1, 1, 3, padding_mode="circular"), 5)
    with pytest.raises(TypeError, match="conv must be a Conv2d, got Conv1d"):
        LocallyConnected2d.from_conv2d(nn.Conv1d(1, 1, 3), 5)


def test_training_loop_and_checkpoint() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        LocallyConnected2d(1, 4, 3, input_size=6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = randn(12, 1, 6, 6, dtype=torch.float32), torch.arange(12) % 3
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other[0].reset_parameters()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))


def test_empty_batch_and_channels_last() -> None:
    layer = LocallyConnected2d(3, 4, 3, padding=1, input_size=(5, 6))
    empty = layer(torch.empty(0, 3, 5, 6))
    assert empty.shape == (0, 4, 5, 6)
    empty.sum().backward()
    assert layer.weight.grad.count_nonzero() == 0
    x = randn(2, 3, 5, 6, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), layer(x))


def test_autocast() -> None:
    layer = LocallyConnected2d(3, 4, 3, input_size=5)
    x = randn(2, 3, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x.bfloat16())
    assert z.dtype == torch.float32  # the CPU bodies have no half precision
    z.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [LocallyConnected2d, LocallyConnected1d])
def test_compiles_whole(layer: type[nn.Module]) -> None:
    module = layer(2, 3, 3, padding="same", input_size=5)
    x = randn(2, 2, *(5,) * layer._dims, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (module, compiled):
        module.zero_grad()
        at = x.clone().requires_grad_()
        run(at).square().sum().backward()
        gradients.append((at.grad, module.weight.grad, module.bias.grad))
    torch.testing.assert_close(*gradients)


def test_data_parallel_replicas_are_refused_only_while_waiting() -> None:
    assert LocallyConnected2d(1, 1, 3, input_size=3)._replicate_for_data_parallel() is not None
    with pytest.raises(RuntimeError, match="uninitialized"):
        LocallyConnected2d(1, 1, 3)._replicate_for_data_parallel()

"""How a model is taken apart, and what is refused."""

from __future__ import annotations

import pytest
import torch
from nets import conv, dense
from torch import nn

from bpfree.nn import (
    InvertibleConv2d,
    InvertibleLinear,
    LocallyConnected2d,
    SaturatedLinear,
    Signum,
)
from bpfree.stages import parse


def test_stages_of_a_dense_model() -> None:
    model = dense(dropout=0.5)
    network = parse(model)
    assert network.before == (model[0], model[1])
    assert [stage.name for stage in network.stages] == ["2", "5", "7"]
    assert [stage.position for stage in network.stages] == [0, 1, 2]
    assert [stage.activation for stage in network.stages] == ["tanh", "leaky_relu", "identity"]
    assert [stage.slope for stage in network.stages] == [None, 0.1, None]
    assert network.hidden[0].after == (model[4],)
    assert network.classes == 4


def test_stages_of_a_nested_model_have_qualified_names() -> None:
    model = conv()
    network = parse(model)
    assert [stage.name for stage in network.stages] == ["0.0", "0.3", "3", "6"]
    assert network.before == ()
    assert network.hidden[1].after == (model[0][5], model[1], model[2])
    for stage in network.stages:
        assert model.get_submodule(stage.name) is stage.layer


def test_running_the_stages_is_running_the_model() -> None:
    model = conv()
    network = parse(model)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    h = network.enter(x)
    for stage in network.stages:
        h = stage.leave(stage.forward(h))
    assert torch.equal(h, model(x))


def test_identity_counts_as_nothing() -> None:
    network = parse(
        nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2), nn.Identity())
    )
    assert [stage.activation for stage in network.stages] == ["relu", "identity"]


def test_layers_without_activation_are_linear() -> None:
    network = parse(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert network.hidden[0].activation == "identity"
    assert network.hidden[0].activation_module is None


def test_saturated_linear_is_hardtanh_with_a_slope() -> None:
    network = parse(nn.Sequential(nn.Linear(3, 4), SaturatedLinear(0.5), nn.Linear(4, 2)))
    assert (network.hidden[0].activation, network.hidden[0].slope) == ("hardtanh", 0.5)


def test_signum_is_sign() -> None:
    network = parse(nn.Sequential(nn.Linear(3, 4), Signum(), nn.Linear(4, 2)))
    assert (network.hidden[0].activation, network.hidden[0].slope) == ("sign", None)
    z = torch.tensor([-2.0, -0.0, 0.0, 0.1, torch.inf, torch.nan])
    wanted = torch.tensor([-1.0, 0.0, 0.0, 1.0, 1.0, torch.nan])
    torch.testing.assert_close(Signum()(z), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "module",
    [
        SaturatedLinear(0.5),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.ReLU(),
        nn.LeakyReLU(0.2),
        nn.Identity(),
        Signum(),
    ],
    ids=str,
)
def test_a_gate_is_the_derivative(module: nn.Module) -> None:
    (stage,) = parse(nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2))).hidden
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    signal = torch.randn(5, 4, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(module(z), z, signal)
    torch.testing.assert_close(stage.gate(signal, z.detach()), wanted, rtol=1e-13, atol=0)


def test_locally_connected_layers_are_stages() -> None:
    model = nn.Sequential(
        LocallyConnected2d(3, 4, 3, stride=2, input_size=(9, 8)), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 2),
    )  # fmt: skip
    network = parse(model)
    assert network.hidden[0].layer is model[0]
    assert network.trace((3, 9, 8)) == {"0": (4, 4, 3), "3": (2,)}
    with pytest.raises(ValueError, match=r"layer '0'.*map of \(3, 9, 8\), but gets \(3, 8, 9\)"):
        network.trace((3, 8, 9))


def test_invertible_layers_hand_on_a_part() -> None:
    model = nn.Sequential(
        InvertibleConv2d(3, 3, 2, "same", features=4), nn.LeakyReLU(0.1), nn.Flatten(),
        InvertibleLinear(80, outputs=7), InvertibleLinear(7, bias=False),
    )  # fmt: skip
    network = parse(model)
    assert network.trace((3, 9, 8)) == {"0": (4, 5, 4), "3": (7,), "4": (7,)}
    assert [stage.outputs for stage in network.stages] == [4, 7, 7]
    assert [stage.has_auxiliary for stage in network.stages] == [True, True, False]
    weight, bias = network.hidden[1].first()
    assert torch.equal(weight, model[3].weight[:7])
    assert torch.equal(bias, model[3].bias[:7])
    assert network.output.first() == (model[4].weight, None)
    model[4].outputs = 2
    assert network.classes == 2
    with pytest.raises(ValueError, match=r"layer '0'.*map of \(3, height, width\)"):
        network.trace((2, 9, 8))


def test_trace_gives_maps_before_pooling() -> None:
    shapes = parse(conv()).trace((3, 9, 8))
    assert shapes == {"0.0": (4, 9, 8), "0.3": (6, 2, 2), "3": (8,), "6": (4,)}


def test_entering_gives_what_the_first_layer_gets() -> None:
    assert parse(conv()).entering((3, 9, 8)) == (3, 9, 8)
    assert parse(dense()).entering((3, 4)) == (12,)
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(8, 2))
    assert parse(pooled).entering((3, 9, 8)) == (3, 4, 4)
    with pytest.raises(ValueError, match="does not fit module MaxPool2d"):
        parse(pooled).entering((3, 1, 1))


def test_activate_leaves_its_argument_alone() -> None:
    z = torch.randn(3, 4)
    kept = z.clone()
    for f in (nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)):
        stage = parse(nn.Sequential(nn.Linear(3, 4), f, nn.Linear(4, 2))).hidden[0]
        wanted = nn.functional.leaky_relu(kept, stage.slope or 0.0)
        torch.testing.assert_close(stage.activate(z), wanted)
        assert torch.equal(z, kept)
    bare = parse(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).hidden[0]
    assert bare.activate(z) is z


def test_trace_uses_no_random_numbers() -> None:
    model = conv(dropout=0.5).train()
    network = parse(nn.Sequential(nn.Dropout2d(0.5), model))
    before = torch.get_rng_state()
    network.trace((3, 9, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (dense(), (13,), "layer '2'.*12 features.*13"),
        (nn.Sequential(nn.Linear(12, 4)), (3, 4), "layer '0'.*12 features"),
        (conv(), (2, 9, 8), r"layer '0\.0'.*map of \(3, height, width\).*\(2, 9, 8\)"),
        (conv(), (72,), r"layer '0\.0'.*map of"),
        (conv(), (3, 12, 12), "layer '3'.*6 features"),
        (conv(), (3, 2, 2), r"layer '0\.3'"),
        (conv(), (3, 1, 1), "does not fit module MaxPool2d"),
    ],
)
def test_trace_refuses_samples_that_do_not_fit(
    model: nn.Sequential, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(model).trace(shape)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class _Reversed(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x)


_HEAD = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)], r"'1' \(BatchNorm1d\).*supported"),
        ([nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)], r"'1' \(GELU\).*LeakyReLU"),
        ([nn.Linear(3, 2), nn.Softmax(1)], r"'1' \(Softmax\)"),
        ([_Doubled(3, 4), nn.Linear(4, 2)], r"'0' \(_Doubled\)"),
        ([_Reversed(nn.Linear(3, 4)), nn.Linear(4, 2)], r"'0' \(_Reversed\)"),
        ([nn.Sequential(nn.LSTM(3, 4)), _HEAD], r"'0\.0' \(LSTM\)"),
    ],
)
def test_unsupported_modules_are_named(modules: list[nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        parse(nn.Sequential(*modules))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "it is empty"),
        ([nn.Linear(3, 2), nn.Sigmoid()], r"must end in torch.nn.Linear.*ends in '1' \(Sigmoid\)"),
        ([nn.Flatten()], r"ends in '0' \(Flatten\)"),
        ([nn.Conv2d(1, 2, 3)], r"ends in '0' \(Conv2d\)"),
        ([nn.ReLU(), nn.Linear(3, 2)], r"activation '0' \(ReLU\) must follow"),
        ([nn.Linear(3, 4), nn.Tanh(), nn.ReLU(), _HEAD], r"activation '2' \(ReLU\) must follow"),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), _HEAD], r"activation '2' \(ReLU\)"),
        ([nn.Linear(3, 4), nn.Hardtanh(0, 6), _HEAD], "bounds .* must be -1 and 1, got 0 and 6"),
        ([nn.Linear(3, 4), nn.LeakyReLU(0.0), _HEAD], "negative_slope .* positive, got 0.0"),
        ([nn.Conv2d(1, 2, 3, padding_mode="reflect"), _HEAD], "padding_mode .*'zeros'"),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, return_indices=True), _HEAD], "return indices"),
        ([_HEAD, nn.ReLU(), _HEAD], "'0' and '2' share"),
    ],
)
def test_impossible_models_are_explained(modules: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(nn.Sequential(*modules))


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Sequential, got Linear"):
        parse(nn.Linear(3, 2))


def test_parametrized_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match=r"'0' \(ParametrizedLinear\)"):
        parse(model)

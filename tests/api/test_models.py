"""Named models: their layers, their initial weights, and what a wrong name gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bpfree.models import ACTIVATIONS, build_model


def kinds(model: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in model]


def test_fc_net_has_the_layers_of_its_name() -> None:
    model = build_model("fc2-30", (1, 8, 8), 10)
    assert kinds(model) == ["Flatten", "Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [tuple(p.shape) for p in model.parameters()] == [
        (30, 64), (30,), (30, 30), (30,), (10, 30), (10,),
    ]  # fmt: skip
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_conv_net_for_grey_images_is_the_papers() -> None:
    model = build_model("conv", (1, 28, 28), 10)
    assert kinds(model) == ["Conv2d", "Tanh", "MaxPool2d", "Flatten", "Linear", "Tanh", "Linear"]
    assert [tuple(layer.weight.shape) for layer in model if hasattr(layer, "weight")] == [
        (32, 1, 5, 5), (1000, 32 * 14 * 14), (10, 1000),
    ]  # fmt: skip
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_conv_net_for_colour_images_is_the_papers() -> None:
    model = build_model("conv", (3, 32, 32), 10, activation="relu")
    block = ["Conv2d", "ReLU", "MaxPool2d"]
    assert kinds(model) == [*block, *block, "Flatten", *["Linear", "ReLU"] * 2, "Linear"]
    assert [tuple(layer.weight.shape) for layer in model if hasattr(layer, "weight")] == [
        (64, 3, 3, 3), (256, 64, 3, 3), (1000, 256 * 8 * 8), (1000, 1000), (10, 1000),
    ]  # fmt: skip
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("image", "features"), [((1, 28, 28), 4608), ((3, 32, 32), 6272)])
def test_conv_net_of_the_pepita_paper(image: tuple[int, ...], features: int) -> None:
    """32 filters of 5×5 without padding, 24×24 or 28×28 positions, pooled to 12×12 or 14×14."""
    model = build_model("conv-pepita", image, 10, activation="relu", bias=False)
    assert kinds(model) == ["Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    assert [tuple(p.shape) for p in model.parameters()] == [(32, image[0], 5, 5), (10, features)]
    assert model(torch.randn(2, *image)).shape == (2, 10)


@pytest.mark.parametrize(
    ("image", "pooled"), [((1, 28, 28), 14), ((3, 32, 32), 16), ((1, 8, 8), 4), ((1, 7, 9), 4)]
)
def test_simpnet_of_the_urfb_paper(image: tuple[int, ...], pooled: int) -> None:
    """32 filters of 5×5, pooling of 3×3 around every second pixel, 500 units; no biases."""
    model = build_model("simpnet", image, 10)
    dense = ["Dropout", "Linear"]
    block = ["Conv2d", "SaturatedLinear", "MaxPool2d", "Flatten"]
    assert kinds(model) == [*block, *dense, "SaturatedLinear", *dense]
    columns = (image[2] + 1) // 2
    assert [tuple(p.shape) for p in model.parameters()] == [
        (32, image[0], 5, 5), (500, 32 * pooled * columns), (10, 500),
    ]  # fmt: skip
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.8, 0.3]
    assert model(torch.randn(2, *image)).shape == (2, 10)
    for weight, fans in zip(
        model.parameters(), (25 * (image[0] + 32), 32 * pooled * columns + 500, 510), strict=True
    ):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("image", "flat"), [((1, 28, 28), 7 * 7), ((3, 32, 32), 8 * 8), ((1, 8, 9), 2 * 2)]
)
def test_the_net_of_the_ekdaa_paper(image: tuple[int, ...], flat: int) -> None:
    """32, 64 and 128 filters of 3×3, the first two pooled, 128 units; tanh, no biases, Glorot."""
    model = build_model("ekdaa", image, 10)
    block = ["Conv2d", "Tanh"]
    assert kinds(model) == [
        *block, "MaxPool2d", *block, "MaxPool2d", *block, "Flatten", "Linear", "Tanh", "Linear",
    ]  # fmt: skip
    assert [tuple(p.shape) for p in model.parameters()] == [
        (32, image[0], 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (128, 128 * flat), (10, 128),
    ]  # fmt: skip
    assert model(torch.randn(2, *image)).shape == (2, 10)
    for weight, fans in zip(
        model.parameters(),
        (9 * (image[0] + 32), 9 * 96, 9 * 192, 128 * flat + 128, 138),
        strict=True,
    ):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "hidden", "units"),
    [("gait-shallow", 3, 1024), ("gait-deep", 6, 1024), ("gait2-20", 2, 20)],
)
def test_the_dense_nets_of_the_gait_paper(name: str, hidden: int, units: int) -> None:
    """Every layer but the first invertible, the output layer as wide, and the classes handed on."""
    model = build_model(name, (3, 4, 4), 10)
    block = ["InvertibleLinear", "LeakyReLU"]
    assert kinds(model) == ["Flatten", "Linear", "LeakyReLU", *block * (hidden - 1), block[0]]
    assert {m.negative_slope for m in model if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 10)
    first, *others = (layer for layer in model if hasattr(layer, "weight"))
    narrow = first.weight if units < 48 else first.weight.T
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(len(narrow)), rtol=0, atol=1e-5)
    for layer in others:
        assert layer.weight.shape == (units, units)
        product = layer.weight @ layer.weight.T
        torch.testing.assert_close(product, torch.eye(units), rtol=0, atol=1e-5)
    assert all(layer.bias.count_nonzero() == 0 for layer in (first, *others))


@pytest.mark.parametrize(
    ("image", "flat"), [((1, 28, 28), 784), ((3, 32, 32), 1024), ((1, 7, 9), 96)]
)
def test_a_convolutional_net_for_gait(image: tuple[int, ...], flat: int) -> None:
    model = build_model("gait-conv", image, 10)
    act = "LeakyReLU"
    assert kinds(model) == ["Conv2d", act, "InvertibleConv2d", act, "Flatten", "InvertibleLinear"]
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [
        (16, image[0], 3, 3), (144, 16, 3, 3), (flat, flat),
    ]  # fmt: skip
    assert model[2].outputs == 16
    assert model(torch.randn(2, *image)).shape == (2, 10)


def test_simpnet_can_be_had_otherwise() -> None:
    model = build_model(
        "simpnet", (1, 8, 8), 10, activation="relu", dropout=0.0, bias=True, init="torch"
    )
    assert kinds(model) == [
        "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    assert all(layer.bias is not None for layer in model if hasattr(layer, "weight"))


@pytest.mark.parametrize("name", ["simpnet", "conv", "conv-pepita"])
def test_untied_models_start_as_the_tied_ones(name: str) -> None:
    tied = build_model(name, (3, 9, 8), 10, seed=3).eval()
    untied = build_model(name, (3, 9, 8), 10, seed=3, untied=True).eval()
    assert "Conv2d" not in kinds(untied)
    assert kinds(untied).count("LocallyConnected2d") == kinds(tied).count("Conv2d")
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(untied(x), tied(x), rtol=1e-4, atol=1e-5)


def test_dropout_of_the_hidden_layers_only() -> None:
    model = build_model("fc2-30", (8,), 10, dropout=0.25, input_dropout=False)
    assert kinds(model) == [
        "Flatten", "Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear",
    ]  # fmt: skip
    model = build_model("conv-pepita", (1, 8, 8), 10, dropout=0.25, input_dropout=False)
    assert kinds(model)[-2:] == ["Dropout", "Linear"]


def test_he_uniform_weights() -> None:
    """U(±√(6 / fan_in)), biases 0: the PEPITA paper's, which has none."""
    for name, fan_ins in (("fc1-500", (784, 500)), ("conv-pepita", (25, 4608))):
        for bias in (False, True):
            model = build_model(name, (1, 28, 28), 10, bias=bias, init="he", seed=3)
            layers = [layer for layer in model if hasattr(layer, "weight")]
            for layer, fan_in in zip(layers, fan_ins, strict=True):
                bound = (6 / fan_in) ** 0.5
                assert 0.99 * bound < layer.weight.abs().max() <= bound
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
                assert layer.bias is None if not bias else layer.bias.count_nonzero() == 0


def test_dropout_sits_on_the_input_of_every_linear_layer_only() -> None:
    model = build_model("conv", (1, 8, 8), 10, dropout=0.25)
    assert kinds(model) == [
        "Conv2d", "Tanh", "MaxPool2d", "Flatten", "Dropout", "Linear", "Tanh", "Dropout", "Linear",
    ]  # fmt: skip
    assert all(layer.p == 0.25 for layer in model if isinstance(layer, nn.Dropout))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_builds(activation: str) -> None:
    model = build_model("fc1-4", (5,), 3, activation=activation)
    assert model(torch.randn(2, 5)).shape == (2, 3)


def test_seed_determines_the_weights_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (build_model("fc1-20", (6,), 3, seed=7) for _ in range(2))
    other = build_model("fc1-20", (6,), 3, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_weights_are_pytorchs_default_initialisation() -> None:
    model = build_model("fc1-20", (6,), 3, seed=7)
    torch.manual_seed(7)
    for layer in (model[1], model[3]):
        reference = nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.bias, reference.bias)


@pytest.mark.parametrize("name", ["fc", "fc0-10", "fc1-0", "fc1-", "resnet", "fc1-10x", ""])
def test_unknown_name_is_refused_with_the_names_that_exist(name: str) -> None:
    with pytest.raises(ValueError, match=r"model must be fc<L>-<H> .*, simpnet or ekdaa, got"):
        build_model(name, (1, 8, 8), 10)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of tanh, .*, got 'swish'"):
        build_model("fc1-10", (8,), 10, activation="swish")
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        build_model("fc1-10", (8,), 10, dropout=1.0)
    with pytest.raises(
        ValueError, match="init must be one of torch, he, glorot, orthogonal, got 'lecun'"
    ):
        build_model("fc1-10", (8,), 10, init="lecun")
    with pytest.raises(ValueError, match=r"outputs must lie in 1 to 8, .* got 10"):
        build_model("gait1-8", (8,), 10)
    for shape in ((64,), (1, 5, 28)):
        with pytest.raises(ValueError, match=r"conv-pepita .* 6 by 6 at least, got"):
            build_model("conv-pepita", shape, 10)
    with pytest.raises(ValueError, match=r"ekdaa .* 4 by 4 at least, got \(1, 3, 28\)"):
        build_model("ekdaa", (1, 3, 28), 10)
    with pytest.raises(ValueError, match=r"images of shape .*, got \(2, 8, 8\)"):
        build_model("conv", (2, 8, 8), 10)
    with pytest.raises(ValueError, match=r"images of shape .*, got \(64,\)"):
        build_model("conv", (64,), 10)
    with pytest.raises(ValueError, match=r"model simpnet .* got \(64,\)"):
        build_model("simpnet", (64,), 10)
    with pytest.raises(ValueError, match="untied needs a model with convolutions, got 'fc1-10'"):
        build_model("fc1-10", (1, 8, 8), 10, untied=True)

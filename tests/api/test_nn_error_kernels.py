"""Layers with error kernels in an ordinary training loop: they learn by EKDAA."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfree
from bpfree.nn import (
    ErrorKernelConv2d,
    ErrorKernelLinear,
    FeedbackLocallyConnected2d,
    TargetActivation,
    feedback_weights,
)

BETA, GAMMA = 0.9, 0.1


def network(
    dtype: torch.dtype = torch.float64,
    *,
    activation: str = "tanh",
    beta: float = BETA,
    gamma: float = GAMMA,
) -> nn.Sequential:
    """Two convolutions, one with pooling and one with strides, and two dense layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        ErrorKernelConv2d(1, 4, 3, padding=1, gamma=gamma),
        TargetActivation(activation, beta),
        nn.MaxPool2d(2),
        ErrorKernelConv2d(4, 6, 3, stride=2, groups=2, gamma=gamma),
        TargetActivation(activation, beta),
        nn.Flatten(),
        ErrorKernelLinear(12, 5, gamma=gamma),
        TargetActivation(activation, beta),
        ErrorKernelLinear(5, 3, gamma=gamma),
    ).to(dtype)


def layers(model: nn.Sequential) -> list[nn.Module]:
    return [model[place] for place in (0, 3, 6, 8)]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 1, 12, 7, generator=generator).to(dtype), torch.arange(7) % 3


def learned(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 1,
    lr: float = 0.05,
    momentum: float = 0.0,
) -> None:
    """Train a model as its user does."""
    tensors = [*model.parameters(), *feedback_weights(model)]
    optimizer = torch.optim.SGD(tensors, lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()


def conv_gradient(e: Tensor, x: Tensor, place: dict[str, int]) -> Tensor:
    """Σ_batch Σ_positions e · windowᵀ, from the windows themselves; [out, in/groups, 3, 3]."""
    groups = place.pop("groups", 1)
    windows = F.unfold(x, 3, **place).view(len(x), groups, -1, e[0, 0].numel())
    post = e.view(len(x), groups, -1, e[0, 0].numel())
    return torch.einsum("ngop,ngip->goi", post, windows).reshape(e.shape[1], -1, 3, 3)


class Equations:
    """EKDAA of `network`, written out in float64 without autograd."""

    def __init__(self, model: nn.Sequential, gamma: float, lr: float, momentum: float) -> None:
        self.w = [layer.weight.detach().clone() for layer in layers(model)]
        self.b = [layer.bias.detach().clone() for layer in layers(model)]
        self.e = [layer.feedback.detach().clone() for layer in layers(model)]
        self._velocities = [torch.zeros_like(t) for t in (*self.w, *self.b, *self.e)]
        self._gamma, self._lr, self._momentum = gamma, lr, momentum

    def step(self, x: Tensor, y: Tensor) -> None:
        """Forward; the errors from the output down, with the old E; then W, b and E."""
        z1 = F.conv2d(x, self.w[0], self.b[0], padding=1)
        x2, winners = F.max_pool2d(torch.tanh(z1), 2, return_indices=True)
        z2 = F.conv2d(x2, self.w[1], self.b[1], stride=2, groups=2)
        x3 = torch.tanh(z2).flatten(1)
        z3 = x3 @ self.w[2].T + self.b[2]
        x4 = torch.tanh(z3)
        z4 = x4 @ self.w[3].T + self.b[3]
        e4 = z4.softmax(1) - F.one_hot(y, 3)
        e3 = self._error(z3, e4 @ self.e[3])
        e2 = self._error(z2, (e3 @ self.e[2]).view_as(z2))
        d = F.conv_transpose2d(e2, self.e[1], stride=2, groups=2)
        d = F.pad(d, (0, x2.shape[3] - d.shape[3], 0, x2.shape[2] - d.shape[2]))
        e1 = self._error(z1, F.max_unpool2d(d, winners, 2, output_size=z1.shape[2:]))
        of_w = [
            conv_gradient(e1, x, {"padding": 1}),
            conv_gradient(e2, x2, {"stride": 2, "groups": 2}),
            e3.T @ x3,
            e4.T @ x4,
        ]
        of_b = [e1.sum((0, 2, 3)), e2.sum((0, 2, 3)), e3.sum(0), e4.sum(0)]
        gradients = (*of_w, *of_b, *(self._gamma * g for g in of_w))
        for tensor, velocity, gradient in zip(
            (*self.w, *self.b, *self.e), self._velocities, gradients, strict=True
        ):
            velocity.mul_(self._momentum).add_(gradient)
            tensor.sub_(self._lr * velocity)

    @staticmethod
    def _error(z: Tensor, d: Tensor) -> Tensor:
        return torch.tanh(z) - torch.tanh(z - BETA * d)


@pytest.mark.parametrize("gamma", [GAMMA, -GAMMA])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_net_learns_by_the_equations(gamma: float, momentum: float) -> None:
    """E1, E2, E3, E10: every weight, bias and E, after each of several steps."""
    model = network(gamma=gamma)
    equations = Equations(model, gamma, lr=0.05, momentum=momentum)
    x, y = batch()
    tensors = [*model.parameters(), *feedback_weights(model)]
    optimizer = torch.optim.SGD(tensors, lr=0.05, momentum=momentum)
    start = [layer.feedback.detach().clone() for layer in layers(model)]
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
        equations.step(x, y)
        for place, layer in enumerate(layers(model)):
            wanted = (equations.w[place], equations.b[place], equations.e[place])
            got = (layer.weight.detach(), layer.bias.detach(), layer.feedback.detach())
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for layer, before in zip(layers(model), start, strict=True):
        assert (layer.feedback - before).abs().max() > 1e-3


def test_dense_layers_learn_by_lra_e() -> None:
    """e_{l−1} = f(z) − f(z − β e_l E_l) and ∂W_l = e_lᵀ h, written out; the first error is any loss'."""
    torch.manual_seed(2)
    model = nn.Sequential(
        ErrorKernelLinear(6, 5), TargetActivation("sigmoid", 0.4),
        ErrorKernelLinear(5, 4), TargetActivation("relu", 0.4), ErrorKernelLinear(4, 3),
    ).double()  # fmt: skip
    x, target = torch.randn(7, 6).double(), torch.randn(7, 3).double()
    (0.5 * (model(x) - target).square().sum()).backward()
    first, second, third = model[0], model[2], model[4]
    with torch.no_grad():
        z1 = first(x)
        z2 = second(torch.sigmoid(z1))
        e3 = third(torch.relu(z2)) - target
        e2 = torch.relu(z2) - torch.relu(z2 - 0.4 * e3 @ third.feedback)
        e1 = torch.sigmoid(z1) - torch.sigmoid(z1 - 0.4 * e2 @ second.feedback)
    for layer, e, h in ((first, e1, x), (second, e2, torch.sigmoid(z1)), (third, e3, z2.relu())):
        torch.testing.assert_close(layer.weight.grad, e.T @ h)
        torch.testing.assert_close(layer.feedback.grad, GAMMA * e.T @ h)
        torch.testing.assert_close(layer.bias.grad, e.sum(0))


@pytest.mark.parametrize("gamma", [0.1, 1.0, -0.5])
def test_error_kernels_learn_what_the_weights_learn(gamma: float) -> None:
    """+γ: E − E₀ = γ (W − W₀) after any number of steps, also with momentum."""
    model = network(gamma=gamma)
    start = copy.deepcopy(model)
    learned(model, *batch(), steps=5, momentum=0.9)
    for layer, before in zip(layers(model), layers(start), strict=True):
        moved = layer.weight - before.weight
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(layer.feedback - before.feedback, gamma * moved)


@pytest.mark.parametrize("gamma", [GAMMA, -GAMMA])
def test_the_learner_learns_the_same(gamma: float) -> None:
    """`bpfree.EKDAA` on ordinary layers, from the same start."""
    model = network(gamma=gamma)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    plain.load_state_dict(model.state_dict(), strict=False)
    learner = bpfree.EKDAA(
        plain,
        torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9),
        beta=BETA,
        gamma=gamma,
        feedback={name: model.get_submodule(name).feedback.detach().clone() for name in "368"},
    )
    x, y = batch()
    for _ in range(3):
        learner.step(x, y)
    learned(model, x, y, steps=3, momentum=0.9)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name))
    for name, feedback in learner.feedback.items():
        torch.testing.assert_close(feedback, model.get_submodule(name).feedback.detach())


def test_without_gamma_the_kernels_stay() -> None:
    """E8: a gradient of exactly 0, E bit for bit the same; W learns."""
    model = network(gamma=0.0)
    start = copy.deepcopy(model)
    learned(model, *batch(), steps=3, momentum=0.9)
    for layer, before in zip(layers(model), layers(start), strict=True):
        assert layer.feedback.grad.count_nonzero() == 0
        assert torch.equal(layer.feedback, before.feedback)
        assert not torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize("activation", ["tanh", "sign", "relu"])
def test_without_beta_there_is_no_hidden_error(activation: str) -> None:
    """E7: exactly 0 below the output layer."""
    model = network(activation=activation, beta=0.0)
    F.cross_entropy(model(batch()[0]), batch()[1], reduction="sum").backward()
    *hidden, output = layers(model)
    for layer in hidden:
        assert layer.weight.grad.count_nonzero() == layer.feedback.grad.count_nonzero() == 0
    assert output.weight.grad.count_nonzero() > 0


def test_signum_learns_where_backpropagation_cannot() -> None:
    model = network(activation="sign", beta=2.0)
    start = copy.deepcopy(model)
    learned(model, *batch())
    for layer, before in zip(layers(model), layers(start), strict=True):
        assert not torch.equal(layer.weight, before.weight)


def test_layers_forward_as_torch_does() -> None:
    torch.manual_seed(8)
    place = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}
    conv, plain = ErrorKernelConv2d(4, 6, 3, **place), nn.Conv2d(4, 6, 3, **place)
    plain.load_state_dict(conv.state_dict(), strict=False)
    x = torch.randn(3, 4, 9, 8)
    assert torch.equal(conv(x), plain(x))
    dense, plain = ErrorKernelLinear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
    plain.load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(2, 3, 4)
    assert torch.equal(dense(x), plain(x))


def test_frozen_layers() -> None:
    """A frozen layer passes errors down, and keeps its E; a frozen net below it is left alone."""
    model, whole = network(), network()
    model[6].requires_grad_(False)
    x, y = batch()
    for net in (model, whole):
        F.cross_entropy(net(x), y, reduction="sum").backward()
    assert model[6].feedback.grad is None
    for frozen, free in zip(layers(model)[:2], layers(whole)[:2], strict=True):
        torch.testing.assert_close(frozen.weight.grad, free.weight.grad)
    head = network()
    for layer in layers(head)[:3]:
        layer.requires_grad_(False)
    F.cross_entropy(head(x), y, reduction="sum").backward()
    assert [layer.feedback.grad is None for layer in layers(head)] == [True, True, True, False]
    torch.testing.assert_close(head[8].feedback.grad, whole[8].feedback.grad)
    with torch.no_grad():
        assert not head(x).requires_grad


def test_empty_batch() -> None:
    model = network()
    x = batch()[0][:0].requires_grad_()
    model(x).sum().backward()
    assert x.grad.shape == x.shape
    for layer in layers(model):
        assert layer.weight.grad.count_nonzero() == layer.feedback.grad.count_nonzero() == 0


@pytest.mark.parametrize("activation", ["tanh", "sign"])
def test_compiles_whole(activation: str) -> None:
    model = network(torch.float32, activation=activation)
    x, y = batch(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        for feedback in feedback_weights(model):
            feedback.grad = None
        at = x.clone().requires_grad_()
        F.cross_entropy(run(at), y, reduction="sum").backward()
        tensors = (at, *model.parameters(), *feedback_weights(model))
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


def test_autocast() -> None:
    model = network(torch.float32)
    x, y = batch(torch.float32)
    gradients = []
    for enabled in (True, False):
        for tensor in (*model.parameters(), *feedback_weights(model)):
            tensor.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(x)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float(), y, reduction="sum").backward()
        gradients.append([t.grad for t in (*model.parameters(), *feedback_weights(model))])
    for low, full in zip(*gradients, strict=True):
        assert low.dtype == torch.float32
        assert F.cosine_similarity(low.flatten(), full.flatten(), 0) > 0.98


def test_checkpoints() -> None:
    model = network()
    names = [f"{n}.{kind}" for n in (0, 3, 6, 8) for kind in ("weight", "bias", "feedback")]
    assert list(model.state_dict()) == names
    assert not any("feedback" in name for name, _ in model.named_parameters())
    other = network()
    for layer in layers(other):
        layer.reset_parameters()
    assert not torch.equal(other[0].feedback, model[0].feedback)
    other.load_state_dict(model.state_dict())
    for net in (model, other):
        learned(net, *batch(), steps=2)
    for ours, theirs in zip(feedback_weights(model), feedback_weights(other), strict=True):
        assert torch.equal(ours, theirs)


def test_error_kernels_are_drawn_by_glorot() -> None:
    """U(±√(6/(k·k·(in + out)))), independent of W."""
    for layer, fans in ((ErrorKernelLinear(300, 200), 500), (ErrorKernelConv2d(60, 40, 3), 900)):
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < layer.feedback.abs().max() <= bound
        both = torch.stack((layer.feedback.detach().flatten(), layer.weight.detach().flatten()))
        assert torch.corrcoef(both)[0, 1].abs() < 0.03


def test_shows_its_arguments() -> None:
    assert repr(ErrorKernelLinear(4, 3, gamma=0.5)) == (
        "ErrorKernelLinear(in_features=4, out_features=3, bias=True, gamma=0.5)"
    )
    assert repr(ErrorKernelConv2d(4, 3, 2)) == (
        "ErrorKernelConv2d(4, 3, kernel_size=(2, 2), stride=(1, 1), gamma=0.1)"
    )


def test_wrong_arguments() -> None:
    for make in (
        lambda: ErrorKernelLinear(4, 3, gamma=math.nan),
        lambda: ErrorKernelConv2d(4, 3, 2, gamma=math.inf),
    ):
        with pytest.raises(ValueError, match="gamma must be finite, got"):
            make()


def test_untying_loses_no_gamma() -> None:
    with pytest.raises(ValueError, match=r"got 0\.1 times that gradient"):
        FeedbackLocallyConnected2d.from_conv2d(ErrorKernelConv2d(2, 3, 3), 5)
    model = nn.Sequential(ErrorKernelConv2d(2, 3, 3))
    assert bpfree.nn.untie(model, (2, 5, 5)) == []
    layer = FeedbackLocallyConnected2d.from_conv2d(ErrorKernelConv2d(2, 3, 3, gamma=1), 5)
    assert layer.mode == "updated"

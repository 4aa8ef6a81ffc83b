"""DRTP: its gradients and steps, against plain PyTorch and against the equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from nets import assert_equal, conv, conv_batch, dense, dense_batch, snapshot
from torch import Tensor, nn

import bpfree
import bpfree_kernels
from bpfree.plain import PlainDRTP

NETS: dict[str, tuple[Callable[..., nn.Sequential], Callable[..., tuple[Tensor, Tensor]]]] = {
    "dense": (dense, dense_batch),
    "conv": (conv, conv_batch),
}


def plain_twin(learner: bpfree.DRTP, model: nn.Sequential, lr: float = 0.1) -> PlainDRTP:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return PlainDRTP(model, learner.feedback, optimizer, learner.loss)


def assert_same_grads(got: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["bce", "ce", "mse", "hinge"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_those_of_plain_pytorch(net: str, loss: str) -> None:
    make, make_batch = NETS[net]
    x, y = make_batch()
    learner = bpfree.DRTP(make(dropout=0.4), loss=loss, seed=3, input_shape=x.shape[1:])
    model = make(dropout=0.4)
    plain = plain_twin(learner, model)

    torch.manual_seed(11)
    got = learner.grads(x, y)
    torch.manual_seed(11)
    wanted = plain.backward(x, y)

    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.output, wanted.output, rtol=1e-12, atol=0)
    assert got.loss.shape == ()
    assert_same_grads(learner.model, model)


def test_gradients_are_the_equations() -> None:
    """D1, D6, D8: sums over the batch for hidden layers, 1/(N·C) at the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 2, 2, 0, 2])
    learner = bpfree.DRTP(model)
    learner.grads(x, y)

    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    inputs, target = x.numpy(), numpy.eye(3)[y.numpy()]
    hidden = numpy.tanh(inputs @ w1.T + b1)
    output = 1 / (1 + numpy.exp(-(hidden @ w2.T + b2)))
    post = (target @ learner.feedback["0"].numpy()) * (1 - hidden**2)
    error = (output - target) / (5 * 3)
    wanted = [post.T @ inputs, post.sum(0), error.T @ hidden, error.sum(0)]
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        numpy.testing.assert_allclose(parameter.grad, grad, rtol=1e-12, atol=1e-14)


def test_convolution_gradients_are_the_equations() -> None:
    """D3: the signal lives on the map before pooling; weight and bias sum over batch and space."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    ).double()
    x, y = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.tensor([2, 1])
    learner = bpfree.DRTP(model)
    learner.grads(x, y)

    feedback = learner.feedback["0"]
    assert feedback.shape == (3, 4, 5, 6)
    layer = model[0]
    patches = nn.functional.unfold(x, 3, padding=1)  # [2, 27, 30]
    z = torch.einsum("ok,nkp->nop", layer.weight.detach().flatten(1), patches)
    z += layer.bias.detach()[:, None]
    post = feedback[y].flatten(2) * (1 - z.tanh() ** 2)
    grad = torch.einsum("nop,nkp->ok", post, patches).view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.bias.grad, post.sum((0, 2)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
        {"padding": "valid", "dilation": 2},
        {"groups": 2, "padding": (0, 2), "bias": False},
    ],
    ids=str,
)
def test_every_kind_of_convolution(options: dict[str, Any]) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, **{"kernel_size": 3, **options})
        size = layer(torch.zeros(1, 4, 7, 6)).numel()
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).double()

    x, y = torch.randn(3, 4, 7, 6, dtype=torch.float64), torch.tensor([0, 2, 1])
    learner = bpfree.DRTP(make(), input_shape=(4, 7, 6))
    model = make()
    plain_twin(learner, model).backward(x, y)
    learner.grads(x, y)
    assert_same_grads(learner.model, model)


def test_channels_last_and_strided_inputs() -> None:
    x, y = conv_batch()
    learners = [bpfree.DRTP(conv(), seed=1) for _ in range(2)]
    learners[0].grads(x, y)
    learners[1].model.to(memory_format=torch.channels_last)
    learners[1].grads(x.to(memory_format=torch.channels_last), y.repeat_interleave(2)[::2])
    assert_same_grads(learners[1].model, learners[0].model)


@pytest.mark.parametrize("net", NETS)
def test_a_step_lowers_every_parameter_by_lr_times_its_gradient(net: str) -> None:
    """D2: the sign."""
    make, make_batch = NETS[net]
    model = make()
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.25))
    x, y = make_batch()
    before = learner.grads(x, y)
    wanted = {n: p.detach() - 0.25 * p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    result = learner.step(x, y)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-13, atol=1e-14)
        assert parameter.grad is None
    torch.testing.assert_close(result.loss, before.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(result.output, before.output, rtol=1e-14, atol=0)


def test_grads_accumulate_and_change_no_parameter() -> None:
    x, y = conv_batch()
    learner = bpfree.DRTP(conv())
    before = snapshot(learner.model)
    learner.grads(x, y)
    once = [p.grad.clone() for p in learner.model.parameters()]
    learner.grads(x, y)
    for parameter, grad in zip(learner.model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-14, atol=0)
        assert grad.abs().max() > 0
    assert_equal(learner.model, before)


def test_a_layer_learns_without_those_above() -> None:
    x, y = dense_batch()
    learners = [bpfree.DRTP(dense(), seed=5) for _ in range(2)]
    with torch.no_grad():
        for parameter in learners[1].model[5:].parameters():
            parameter.mul_(-3)
    learners[1].model[7].bias.requires_grad_(False)
    for learner in learners:
        learner.grads(x, y)
    ours, theirs = (list(learner.model.parameters()) for learner in learners)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not torch.equal(ours[2].grad, theirs[2].grad)


def test_dropped_inputs_enter_the_update() -> None:
    """D4: a weight whose input is dropped for the whole batch does not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    learner = bpfree.DRTP(model)
    x, y = torch.ones(1, 40, dtype=torch.float64), torch.tensor([1])
    learner.grads(x, y)
    still = (model[1].weight.grad == 0).all(0)
    assert 5 < still.sum() < 35
    assert model[1].weight.grad[:, ~still].abs().min() > 0

    model.zero_grad()
    learner.eval().grads(x, y)
    assert not model.training
    assert model[1].weight.grad.abs().min() > 0


@pytest.mark.parametrize("how", ["requires_grad", "left out of the optimizer"])
@pytest.mark.parametrize("net", NETS)
def test_frozen_layers_only_run(net: str, how: str) -> None:
    make, make_batch = NETS[net]
    x, y = make_batch()
    model, reference = make(), make()
    frozen = [name for name, _ in model.named_parameters()][:2]  # the first layer
    learning = [p for name, p in model.named_parameters() if name not in frozen]
    if how == "requires_grad":
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        learning = list(model.parameters())
    learner = bpfree.DRTP(model, torch.optim.Adam(learning, lr=0.01))
    before = snapshot(model)
    everything = bpfree.DRTP(reference, torch.optim.Adam(reference.parameters(), lr=0.01))
    learner.step(x, y)
    everything.step(x, y)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
        if name not in frozen:
            torch.testing.assert_close(
                parameter, reference.get_parameter(name), rtol=1e-14, atol=1e-15
            )


def test_frozen_layers_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's nets with random convolutions: only the dense layers learn."""
    model = conv()
    model[0].requires_grad_(False)
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monkeypatch.setattr(bpfree_kernels, "drtp_signal", None)
    learner.step(*conv_batch())
    learner.grads(*conv_batch())
    assert model[0][0].weight.grad is None


def test_a_frozen_weight_with_a_learning_bias() -> None:
    x, y = dense_batch()
    model = dense()
    model[2].weight.requires_grad_(False)
    model[7].weight.requires_grad_(False)
    before = snapshot(model)
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
    learner.step(x, y)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"2.bias", "5.weight", "5.bias", "7.bias"}


@pytest.mark.parametrize("net", NETS)
def test_int32_labels(net: str) -> None:
    make, make_batch = NETS[net]
    x, y = make_batch()
    models = [make(), make()]
    for model, labels in zip(models, (y, y.int()), strict=True):
        bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1)).step(x, labels)
    assert_equal(models[1], snapshot(models[0]))


def test_batches_of_every_size() -> None:
    model = dense()
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for samples in (1, 3, 17):
        assert learner.step(*dense_batch(samples)).output.shape == (samples, 4)


def test_a_model_of_one_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first, second = (learner.step(*dense_batch()).loss for _ in range(2))
    assert second < first
    assert learner.feedback == {}


class TestErrorsChangeNothing:
    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda x, y: (x, y.fill_(4)), IndexError, r"\[0, 4\), got 4 at position 0"),
            (lambda x, y: (x, y - 1), IndexError, "got -1"),
            (lambda x, y: (x, y[:-1]), ValueError, r"\(6,\), got \(5,\)"),
            (lambda x, y: (x, y[:, None]), ValueError, r"got \(6, 1\)"),
            (lambda x, y: (x, y.double()), TypeError, "int32 or torch.int64"),
            (lambda x, y: (x, y.tolist()), TypeError, "y must be a torch.Tensor, got list"),
            (lambda x, y: (x.numpy(), y), TypeError, "x must be a torch.Tensor, got ndarray"),
            (lambda x, y: (x.float(), y), TypeError, "x must have the dtype .*float64"),
            (lambda x, y: (x[:, :, :3], y), ValueError, "layer '2'.*12 features.*9"),
            (lambda x, y: (x[:0], y[:0]), ValueError, "at least one sample"),
            (lambda _, y: (y.double(), y), ValueError, r"x must have shape \[batch, ...\]"),
            (lambda x, y: (x.to("meta"), y), ValueError, "device"),
        ],
    )
    def test_of_arguments(
        self, spoil: Callable[..., Any], error: type[Exception], message: str
    ) -> None:
        model = dense()
        learner = bpfree.DRTP(model, torch.optim.Adam(model.parameters()))
        before = snapshot(model)
        for call in (learner.step, learner.grads):
            with pytest.raises(error, match=message):
                call(*spoil(*dense_batch()))
        assert_equal(model, before)
        assert not learner.optimizer.state
        assert all(p.grad is None for p in model.parameters())
        learner.step(*dense_batch())

    def test_of_another_map_size(self) -> None:
        """A pooled map of the same size does not hide that the feedback does not fit."""
        model = conv()
        learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
        x, y = conv_batch()
        learner.step(x, y)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"layer '0\.0' has feedback .*\(4, 9, 8\).*9, 9"):
            learner.step(torch.cat([x, x[..., :1]], 3), y)
        assert_equal(model, before)
        learner.step(x, y)

    def test_of_a_layer_of_another_dtype(self) -> None:
        model = dense()
        learner = bpfree.DRTP(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model[5].float()
        before = snapshot(model)
        with pytest.raises(TypeError, match="x must have the dtype of layer '5'"):
            learner.step(*dense_batch())
        assert_equal(model, before)

    def test_without_an_optimizer(self) -> None:
        with pytest.raises(RuntimeError, match="made without one"):
            bpfree.DRTP(dense()).step(*dense_batch())


class TestArguments:
    def test_loss(self) -> None:
        with pytest.raises(ValueError, match="loss must be one of ce, bce, mse, hinge, got 'nll'"):
            bpfree.DRTP(dense(), loss="nll")

    def test_backend(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of"):
            bpfree.DRTP(dense(), backend="xpu")
        with pytest.raises(ValueError, match=r"backend of a learner must be 'cpp', .* got 'cuda'"):
            bpfree.DRTP(dense(), backend="cuda")

    def test_unusable_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from bpfree_kernels import backends

        monkeypatch.setattr(backends, "status", lambda _: backends.Status(False, "not built"))
        with pytest.raises(RuntimeError, match="'cpp' is not usable: not built"):
            bpfree.DRTP(dense(), backend="cpp")

    @pytest.mark.parametrize("net", NETS)
    def test_the_reference_backend_agrees(self, net: str) -> None:
        make, make_batch = NETS[net]
        models = [make(), make()]
        for model, backend in zip(models, (None, "reference"), strict=True):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            bpfree.DRTP(model, optimizer, backend=backend).step(*make_batch())
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    def test_input_shape_is_checked_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"layer '3'.*6 features"):
            bpfree.DRTP(conv(), input_shape=(3, 32, 32))


def test_plain_drtp_steps() -> None:
    x, y = conv_batch()
    learner = bpfree.DRTP(conv(), input_shape=x.shape[1:])
    model = conv()
    learner.grads(x, y)
    plain_twin(learner, model, lr=0.5).step(x, y)
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs.detach(), (ours - 0.5 * ours.grad).detach())

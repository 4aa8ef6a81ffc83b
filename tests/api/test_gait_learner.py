"""GAIT-prop: its gradients and steps against the equations, backpropagation and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gait_equations import Gradients, error_gradients, target_gradients
from invertible_nets import (
    CLASSES,
    as_equations,
    batch_for,
    conv,
    dense,
    off_orthogonal,
    strided,
)
from nets import assert_close, snapshot
from torch import Tensor, nn

import bpfree
from bpfree.plain import PlainGAIT

NETS: dict[str, Callable[[], nn.Sequential]] = {"dense": dense, "conv": conv, "strided": strided}

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
}

PENALTIES: list[dict[str, Any]] = [
    {},
    {"orthogonal_penalty": 0.3},
    {"orthogonal_penalty": 0.3, "off_diagonal": True},
]


def gradients(
    model: nn.Sequential, batch: tuple[Tensor, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """What `grads` leaves, by parameter."""
    model.zero_grad()
    bpfree.GAITProp(model, **options).grads(*(batch or batch_for(model)))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def summed_bp(model: nn.Sequential) -> dict[str, Tensor]:
    """Backpropagation's gradients of the loss summed over the batch."""
    x, y = batch_for(model)
    model.zero_grad()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check_equations(
    model: nn.Sequential, wanted: Gradients, tolerance: float, **options: Any
) -> None:
    got = gradients(model, **options)
    parts = [m for m in model.named_modules() if isinstance(m[1], nn.Linear | nn.Conv2d)]
    for (name, part), of_weight, of_bias in zip(parts, *wanted, strict=True):
        scale = np.abs(of_weight).max()
        assert scale > 1e-3
        np.testing.assert_allclose(
            got[f"{name}.weight"], of_weight, rtol=0, atol=tolerance * scale, err_msg=name
        )
        if part.bias is not None:
            summed = of_bias.reshape(len(part.bias), -1).sum(1)
            np.testing.assert_allclose(got[f"{name}.bias"], summed, rtol=0, atol=tolerance * scale)


def equation_batch(model: nn.Sequential) -> tuple[Any, Any]:
    x, y = batch_for(model)
    return x.flatten(1).numpy(), y.numpy()


# Against the equations


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("make", [dense, conv])
def test_errors_are_the_equations(make: Callable[[], nn.Sequential], noise: float) -> None:
    """Whether W is orthogonal, nearly so (a series), or far from it (its inverse)."""
    model = off_orthogonal(make(), noise)
    wanted = error_gradients(as_equations(model), *equation_batch(model))
    check_equations(model, wanted, 1e-10)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("make", [dense, conv])
def test_targets_are_the_equations_and_the_errors(
    make: Callable[[], nn.Sequential], normalised: bool
) -> None:
    """G1: the literal form equals the equations' and the difference form, in float64, off orthogonal."""
    model = off_orthogonal(make(), 0.1)
    x, y = equation_batch(model)
    eta, rate = 1e-6 if normalised else None, 1e-2
    tolerance = 1e-6  # vanilla differences shrink by γ in every layer: a small one drowns
    options = {"form": "literal", "normalised": normalised, "eta": eta or 1.0, "rate": rate}
    check_equations(
        model, target_gradients(as_equations(model), x, y, eta=eta, rate=rate), tolerance, **options
    )
    check_equations(model, error_gradients(as_equations(model), x, y), tolerance, **options)


@pytest.mark.parametrize("net", NETS)
def test_both_forms_agree(net: str) -> None:
    model = off_orthogonal(NETS[net](), 0.1)
    errors, targets = gradients(model), gradients(model, form="literal")
    for name, grad in errors.items():
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(targets[name], grad, rtol=0, atol=1e-6 * grad.abs().max().item())


def test_a_nudge_across_the_kink_follows_the_inverse_piece_by_piece() -> None:
    """G9: with a large η u changes sign, and the two forms part; the literal one is the equations'."""
    model = off_orthogonal(dense(), 0.05)
    x, y = equation_batch(model)
    wanted = target_gradients(as_equations(model), x, y, eta=0.5)
    check_equations(model, wanted, 1e-9, form="literal", eta=0.5)
    errors = error_gradients(as_equations(model), x, y)
    assert np.abs(wanted[0][0] - errors[0][0]).max() > 1e-2 * np.abs(errors[0][0]).max()


# Against backpropagation


@pytest.mark.parametrize("net", NETS)
def test_for_orthogonal_weights_it_is_backpropagation(net: str) -> None:
    """G2, G8: of the loss summed over the batch; auxiliary units have no gradient."""
    model = NETS[net]()
    wanted, got = summed_bp(model), gradients(model)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)
        assert grad.abs().max() > 1e-3
    assert got[name][CLASSES:].count_nonzero() == 0


def test_the_output_layer_learns_as_by_backpropagation() -> None:
    """G3: whatever the weights, in both forms."""
    model = off_orthogonal(dense(), 0.3)
    wanted = summed_bp(model)
    for form in ("difference", "literal"):
        got = gradients(model, form=form)
        for name in ("7.weight", "7.bias"):
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-8, atol=1e-10)
        assert (got["1.weight"] - wanted["1.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("form", ["difference", "literal"])
def test_auxiliary_units_have_no_error_and_do_not_matter_above(form: str) -> None:
    """G4: in the literal form their target is their activation."""
    model = conv()
    before = gradients(model, form=form)
    for name, layer in model.named_modules():
        handed = getattr(layer, "outputs", None)
        if handed is not None:
            assert before[f"{name}.weight"][:handed].abs().max() > 1e-4
            assert before[f"{name}.weight"][handed:].count_nonzero() == 0
    with torch.no_grad():  # other activations of auxiliary units, the same weights
        model[2].bias[4:] += 3.0
        model[7].bias[CLASSES:] -= 2.0
    for name, grad in gradients(model, form=form).items():
        # Targets are scaled by the number of units, not by what the auxiliary ones are.
        torch.testing.assert_close(grad, before[name], rtol=0, atol=1e-6)


def test_each_sample_is_nudged_by_itself() -> None:
    """G5: γ = η √d / ‖t − a‖; a sample without an error gives no NaN, and leaves the others alone."""
    model = off_orthogonal(dense(), 0.05)
    x, y = batch_for(model)
    with torch.no_grad():  # sample 2 lies beyond every threshold of the hinge loss
        wanted = torch.tensor([1.5, -1.5, -1.5, -1.5], dtype=torch.float64)
        model[7].bias[:CLASSES] += wanted - model(x)[2]
    y[2] = 0
    alone = torch.tensor([0, 1, 3, 4])
    vanilla = {"form": "literal", "normalised": False, "rate": 0.1}
    for options in ({"form": "literal"}, vanilla, {}):
        whole = gradients(model, (x, y), loss="hinge", **options)
        others = gradients(model, (x[alone], y[alone]), loss="hinge", **options)
        lonely = gradients(model, (x[2:3], y[2:3]), loss="hinge", **options)
        assert max(grad.abs().max() for grad in lonely.values()) < 1e-8
        for name, grad in whole.items():
            assert grad.isfinite().all()
            torch.testing.assert_close(grad, others[name], rtol=1e-5, atol=1e-8)
        assert whole["7.weight"].abs().max() > 0


def test_float32_is_within_1e_5_of_float64() -> None:
    """Errors carried as such, in six layers; targets drown."""
    wide = off_orthogonal(dense(torch.float32, depth=5), 0.02).double()
    narrow = dense(torch.float32, depth=5)
    narrow.load_state_dict(wide.state_dict())
    exact, got = gradients(wide), gradients(narrow)
    with pytest.warns(UserWarning, match="literal form .* make the model float64"):
        drowned = gradients(narrow, form="literal")
    for name, grad in exact.items():
        assert (got[name] - grad).norm() < 1e-5 * grad.norm()
    first = exact["1.weight"]
    assert (drowned["1.weight"] - first).norm() > 0.1 * first.norm()


# Steps


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": True, "amsgrad": True}], ids=str)
def test_gradients_lie_as_their_weights_do(options: dict[str, bool]) -> None:
    """Fused optimizers of torch pair the two element by element in memory."""
    usual, last = (off_orthogonal(NETS["conv"](), 0.05) for _ in range(2))
    last.to(memory_format=torch.channels_last)
    for model in (usual, last):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **options)
        learner = bpfree.GAITProp(model, optimizer, orthogonal_penalty=0.3)
        for _ in range(2):
            learner.grads(*batch_for(model))
            for parameter in model.parameters():
                assert parameter.grad.stride() == parameter.stride()
            optimizer.step()
            optimizer.zero_grad()
            learner.step(*batch_for(model))
    assert_close(last, usual, 1e-9)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_steps_are_gradients_and_the_optimizer(
    net: str, optimizer: str, penalty: dict[str, Any]
) -> None:
    """Fused, applied apart, or by an optimizer that the kernels do not know."""
    stepped, graded = (off_orthogonal(NETS[net](), 0.05) for _ in range(2))
    batch = batch_for(stepped)
    learner = bpfree.GAITProp(stepped, OPTIMIZERS[optimizer](stepped), **penalty)
    by_torch, apart = OPTIMIZERS[optimizer](graded), bpfree.GAITProp(graded, **penalty)
    start = snapshot(stepped)
    for _ in range(3):
        result = learner.step(*batch)
        by_torch.zero_grad()
        torch.testing.assert_close(apart.grads(*batch), result, rtol=1e-9, atol=1e-10)
        by_torch.step()
    assert_close(stepped, graded, 1e-8)
    assert all((p - start[n]).abs().max() > 1e-4 for n, p in stepped.named_parameters())
    assert all(p.grad is None for p in stepped.parameters())


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_steps_are_those_of_plain_pytorch(net: str, penalty: dict[str, Any]) -> None:
    """Targets, full inverses and autograd, as the authors' code has them."""
    model, other = (off_orthogonal(NETS[net](), 0.1) for _ in range(2))
    learner = bpfree.GAITProp(model, OPTIMIZERS["momentum"](model), **penalty)
    plain = PlainGAIT(other, OPTIMIZERS["momentum"](other), **penalty)
    for _ in range(3):
        batch = batch_for(model)
        torch.testing.assert_close(learner.step(*batch), plain.step(*batch), rtol=1e-6, atol=1e-7)
    assert_close(model, other, 1e-6)


def test_vanilla_steps_are_those_of_plain_pytorch() -> None:
    model, other = (off_orthogonal(dense(), 0.1) for _ in range(2))
    options = {"normalised": False, "rate": 0.05}  # large enough that some units cross their kink
    learner = bpfree.GAITProp(model, OPTIMIZERS["sgd"](model), form="literal", **options)
    plain = PlainGAIT(other, OPTIMIZERS["sgd"](other), **options)
    for _ in range(3):
        learner.step(*batch_for(model))
        plain.step(*batch_for(model))
    assert_close(model, other, 1e-9)


@pytest.mark.parametrize("off_diagonal", [False, True])
def test_the_regularisers_gradient(off_diagonal: bool) -> None:
    """That of λ Σ (W Wᵀ − I)² by its definition, in every layer but the first; not in `loss_grads`."""
    model = off_orthogonal(conv(), 0.1)
    plain = gradients(model)
    whole = gradients(model, orthogonal_penalty=0.7, off_diagonal=off_diagonal)
    net = as_equations(model)
    weights = [name for name in plain if name.endswith("weight")]
    for place, name in enumerate(weights):
        added = whole[name] - plain[name]
        if place == 0:
            assert added.count_nonzero() == 0
            continue
        wanted = net.penalty(place, 0.7, off_diagonal)
        np.testing.assert_allclose(added, wanted, rtol=1e-9, atol=1e-10)
        assert np.abs(wanted).max() > 0.1
    learner = bpfree.GAITProp(model, orthogonal_penalty=0.7)
    model.zero_grad()
    learner.loss_grads(*batch_for(model))
    assert learner.orthogonal_penalty == 0.7
    for name in weights:
        torch.testing.assert_close(model.get_parameter(name).grad, plain[name])


@pytest.mark.parametrize("loss", ["ce", "bce", "mse", "hinge"])
def test_every_loss_gives_the_sum_of_its_gradients(loss: str) -> None:
    """The gradient is the batch's sum, the reported loss its mean, as in every rule."""
    model = dense()
    x, y = batch_for(model)
    for form in ("difference", "literal"):
        ours = gradients(model, loss=loss, form=form)
        model.zero_grad()
        result = bpfree.BP(model, loss=loss).grads(x, y)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ours[name], len(x) * parameter.grad, rtol=1e-5, atol=1e-7)
        model.zero_grad()
        torch.testing.assert_close(
            bpfree.GAITProp(model, loss=loss, form=form).grads(x, y), result, rtol=1e-12, atol=0
        )

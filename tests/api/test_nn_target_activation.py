"""The activation that sends down how far its units are from their target; signum, plain and so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.nn import Signum, TargetActivation

BETA = 0.9

LITERAL: dict[str, tuple[float | None, Callable[[Tensor], Tensor]]] = {
    "identity": (None, lambda z: z),
    "relu": (None, torch.relu),
    "leaky_relu": (0.2, lambda z: F.leaky_relu(z, 0.2)),
    "tanh": (None, torch.tanh),
    "sigmoid": (None, torch.sigmoid),
    "hardtanh": (0.5, lambda z: F.hardtanh(0.5 * z)),
    "sign": (None, torch.sign),
}


@pytest.mark.parametrize("activation", LITERAL)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_values_and_errors_of_any_shape(activation: str, shape: tuple[int, ...]) -> None:
    """f(z) and f(z) − f(z − β d), literally; z and d are left as they are."""
    torch.manual_seed(5)
    slope, f = LITERAL[activation]
    z = torch.randn(shape, dtype=torch.float64).requires_grad_()
    d = torch.randn(shape, dtype=torch.float64)
    kept = (z.detach().clone(), d.clone())
    y = TargetActivation(activation, 1.5, slope)(z)
    (e,) = torch.autograd.grad(y, z, d)
    torch.testing.assert_close(y, f(z))
    torch.testing.assert_close(e, f(z) - f(z - 1.5 * d))
    assert torch.equal(z, kept[0])
    assert torch.equal(d, kept[1])


def test_maps_in_any_order() -> None:
    torch.manual_seed(6)
    z, d = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    wanted = torch.tanh(z) - torch.tanh(z - BETA * d)
    orders = (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    )
    for of_z, of_d in ((orders[0], orders[1]), (orders[1], orders[0]), (orders[0], orders[0])):
        at = of_z(z).requires_grad_()
        (e,) = torch.autograd.grad(TargetActivation()(at), at, of_d(d))
        torch.testing.assert_close(e, wanted)


def test_small_errors_lose_no_digits() -> None:
    """E5: in float32, where subtracting f(z) and the target leaves none."""
    z, d = torch.linspace(-2, 2, 50).requires_grad_(), 1e-6 * torch.linspace(1, 2, 50)
    (e,) = torch.autograd.grad(TargetActivation("tanh", BETA)(z), z, d)
    wide, shift = z.detach().double(), BETA * d.double()
    torch.testing.assert_close(
        e.double(), torch.tanh(wide) - torch.tanh(wide - shift), rtol=1e-5, atol=0
    )


def test_signum() -> None:
    """E4: e in {−2, 0, 2}; from sign(0) = 0 in {−1, 0, 1}."""
    z = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5, 0.0, 0.0, 0.0], requires_grad=True)
    d = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.1, 1.0, -1.0, 0.0])
    y = TargetActivation("sign", 1.0)(z)
    (e,) = torch.autograd.grad(y, z, d)
    assert y.tolist() == [1, -1, 1, -1, 1, 0, 0, 0]
    assert e.tolist() == [2, -2, 0, 0, 0, 1, -1, 0]
    y = Signum()(z)
    assert y.tolist() == [1, -1, 1, -1, 1, 0, 0, 0]
    assert torch.autograd.grad(y, z, d)[0].count_nonzero() == 0
    assert math.isnan(Signum()(torch.tensor(math.nan)))


def test_signum_behind_a_pooling_has_the_target_of_the_largest_z() -> None:
    """sign(max z) = max sign(z), and the error goes to the unit that the paper's rule chooses."""
    torch.manual_seed(7)
    z, d = torch.randn(3, 2, 6, 4).requires_grad_(), torch.randn(3, 2, 3, 2)
    y = TargetActivation("sign", 1.0)(F.max_pool2d(z, 2))
    torch.testing.assert_close(y, F.max_pool2d(z.sign(), 2))
    (e,) = torch.autograd.grad(y, z, d)
    of_maps, winners = F.max_pool2d(z, 2, return_indices=True)
    wanted = F.max_unpool2d(of_maps.sign() - (of_maps - d).sign(), winners, 2)
    assert torch.equal(e, wanted)
    assert e.count_nonzero() > 0


def test_no_second_derivative() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    (e,) = torch.autograd.grad(TargetActivation()(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        e.sum().backward()


def test_z_changed_before_the_backward_pass_is_guarded() -> None:
    z = torch.randn(3, 4, requires_grad=True) + 0
    y = TargetActivation()(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_shows_its_arguments() -> None:
    assert repr(TargetActivation()) == "TargetActivation('tanh', beta=0.9)"
    assert repr(TargetActivation("hardtanh", 1)) == (
        "TargetActivation('hardtanh', beta=1, slope=1)"
    )


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="beta must be finite, got nan"):
        TargetActivation(beta=math.nan)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'softplus'"):
        TargetActivation("softplus")
    with pytest.raises(ValueError, match="slope has no meaning for activation 'tanh'"):
        TargetActivation(slope=1.0)

"""PEPITA's difference for maps: convolutions, basis images, any shape and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, golden_pepita, layouts, plain
from .cases import default_slope
from .tolerances import check, to_numpy

Target = tuple[str, str]

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(dtype: torch.dtype, device: str, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Normal values of the sizes given."""
    rng = np.random.default_rng(3)
    return [
        torch.from_numpy(np.asarray(rng.standard_normal(size))).to(device, dtype) for size in sizes
    ]


def exact(z: Tensor, error: Tensor, basis: Tensor, activation: str) -> golden.Array:
    """f(z + Σ_c e_c · basis_c) − f(z)."""
    mixed = np.einsum("nc,c...->n...", to_numpy(error), to_numpy(basis))
    return golden_pepita.subtract(to_numpy(z), mixed, activation, default_slope(activation, None))


def by_torch(z: Tensor, error: Tensor, basis: Tensor, activation: str) -> Tensor:
    """The same in plain PyTorch."""
    mixed = (error @ basis.flatten(1)).view(z.shape)
    return plain.difference(z, mixed, activation, default_slope(activation, None))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_convolution(activation: str, target: Target) -> None:
    """The basis conv(F_c), mixed by e, changes the map as a second pass over x + F e does."""
    backend, device = target
    x, weight, bias, feedback, error = draw(
        torch.float32, device, (2, 3, 5, 6), (4, 3, 3, 3), (4,), (5, 3, 5, 6), (2, 5)
    )
    z = F.conv2d(x, weight, bias, padding=1)
    basis = F.conv2d(feedback, weight, padding=1)
    got = bk.pepita_difference(z, error, basis=basis, activation=activation, backend=backend)
    perturbed = x.double() + torch.einsum("nc,cihw->nihw", error.double(), feedback.double())
    maps = [
        golden_pepita.convolution(to_numpy(value), to_numpy(weight), to_numpy(bias), padding=1)
        for value in (x, perturbed)
    ]
    before, after = (golden.activate(value, activation, 0.0)[0] for value in maps)
    check("change", got, after - before, by_torch(z, error, basis, activation))


SHAPES = [((1, 1), 1), ((5, 6), 3), ((3, 1, 1), 9), ((2, 3, 5, 6), 2), ((2, 2, 2, 3, 3), 70),
          ((3, 1100), 2), ((17, 65), 130), ((4, 0), 2), ((0, 5), 3), ((130, 3), 4),
          ((3, 4, 5), 0)]  # fmt: skip
"""Shape of z, and classes."""


@pytest.mark.parametrize(("size", "classes"), SHAPES)
def test_any_shape(size: tuple[int, ...], classes: int, target: Target, dtype: torch.dtype) -> None:
    """Maps of any number of dimensions, empty ones too, and any number of basis images."""
    backend, device = target
    z, error, basis = draw(dtype, device, size, (size[0], classes), (classes, *size[1:]))
    snapshot = cases.Snapshot({"z": z, "error": error, "basis": basis})
    got = bk.pepita_difference(z, error, basis=basis, activation="tanh", backend=backend)
    check("mixed", got, exact(z, error, basis, "tanh"), by_torch(z, error, basis, "tanh"))
    step = draw(dtype, device, size)[0] / 2
    one = bk.pepita_difference(z, step, backend=backend)
    wanted = golden_pepita.subtract(to_numpy(z), to_numpy(step), "relu", 0.0)
    check("given", one, wanted, plain.difference(z, step, "relu", 0.0))
    snapshot.check_unchanged()


@pytest.mark.parametrize("activation", bk.ACTIVATIONS)
def test_activations_of_a_mixture(activation: str, target: Target, dtype: torch.dtype) -> None:
    """Every activation, on a grid where rounding cannot make a sign jump."""
    backend, device = target
    tensors = draw(torch.float64, device, (5, 3, 7), (5, 4), (4, 3, 7))
    z, error, basis = ((value * 2).round().clamp(-4, 4).to(dtype) / 4 for value in tensors)
    got = bk.pepita_difference(z, error, basis=basis, activation=activation, backend=backend)
    wanted = exact(z, error, basis, activation)
    check("change", got, wanted, by_torch(z, error, basis, activation))


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, "channels_last"])
def test_any_layout(layout: str, target: Target) -> None:
    """Everything may lie in memory in any way, and is not touched."""
    backend, device = target
    tensors = draw(torch.float32, device, (2, 3, 5, 6), (2, 4), (4, 3, 5, 6))
    straight = bk.pepita_difference(tensors[0], tensors[1], basis=tensors[2], backend=backend)
    if layout == "channels_last":
        views = [t if t.dim() < 4 else t.to(memory_format=torch.channels_last) for t in tensors]
    else:
        views = [layouts.laid_out(t, layout).view for t in tensors]
    snapshot = cases.Snapshot(dict(zip(("z", "change", "basis"), views, strict=True)))
    got = bk.pepita_difference(views[0], views[1], basis=views[2], backend=backend)
    torch.testing.assert_close(got, straight, rtol=1e-6, atol=1e-6)
    snapshot.check_unchanged()


def test_the_result_is_a_tensor_of_its_own(target: Target) -> None:
    """Even where nothing is to be computed the change is not handed back, and needs no gradient."""
    backend, device = target
    z, change = draw(torch.float32, device, (3, 4), (3, 4))
    got = bk.pepita_difference(z.requires_grad_(), change, activation="identity", backend=backend)
    assert not got.requires_grad
    assert torch.equal(got, change)
    assert got.data_ptr() not in (z.data_ptr(), change.data_ptr())


def test_no_error_no_change(target: Target, dtype: torch.dtype) -> None:
    """P4: a mixture with an error of 0 is exactly 0."""
    backend, device = target
    z, basis = draw(dtype, device, (4, 3, 5), (6, 3, 5))
    error = torch.zeros(4, 6, dtype=dtype, device=device)
    for activation in bk.ACTIVATIONS:
        got = bk.pepita_difference(z, error, basis=basis, activation=activation, backend=backend)
        assert torch.count_nonzero(got) == 0


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_in_place(activation: str, last: bool, target: Target) -> None:
    """The same values, in z itself; and its version says so."""
    backend, device = target
    z, error, basis = draw(torch.float32, device, (3, 4, 5, 6), (3, 2), (2, 4, 5, 6))
    if last:
        z = z.contiguous(memory_format=torch.channels_last)
    options = {"basis": basis, "activation": activation, "backend": backend}
    wanted = bk.pepita_difference(z, error, **options)
    version = z._version
    assert bk.pepita_difference(z, error, in_place=True, **options) is z
    assert torch.equal(z, wanted)
    assert z._version > version


def test_in_place_on_every_second_column(target: Target) -> None:
    backend, device = target
    whole, change = draw(torch.float32, device, (3, 4, 5, 6), (3, 4, 5, 3))
    before = whole.clone()
    wanted = bk.pepita_difference(whole[..., ::2], change, backend=backend)
    bk.pepita_difference(whole[..., ::2], change, in_place=True, backend=backend)
    assert torch.equal(whole[..., ::2], wanted)
    assert torch.equal(whole[..., 1::2], before[..., 1::2])


def test_in_place_refuses_shared_memory() -> None:
    z = torch.randn(2, 6)
    with pytest.raises(ValueError, match="change and z share memory"):
        bk.pepita_difference(z, z, in_place=True)

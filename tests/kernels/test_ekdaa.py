"""EKDAA's error of the units below: E2, E4, E5 and E7 of its golden checks, every layer, every pooling.

What W and E learn from it is in `test_ekdaa_learning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bpfree_kernels as bk

from . import cases, golden, layouts, plain
from . import golden_ekdaa as exact
from .cases import default_slope
from .conv_layers import LAYERS, ORDERS, POOLINGS, draw, pooled, values
from .local_layers import Layer, arrays
from .tolerances import check, to_numpy

Target = tuple[str, str]
Pool = dict[str, Any] | None

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # torch's own convolution says that it pads a copy; only its result is of interest here.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

ACTIVATIONS = [*((name, None) for name in bk.ACTIVATIONS), ("leaky_relu", 0.25), ("hardtanh", 0.5)]
SPREADS = ("argmax", "nearest", "average")
"""The up-samplings that every backend has."""

MAP = (7, 8)
"""Height and width of the maps that are pooled."""


def tensors(
    dtype: torch.dtype, device: str, *sizes: tuple[int, ...], grid: bool = False, seed: int = 0
) -> list[Tensor]:
    """Seeded values of the sizes given."""
    return [torch.from_numpy(v).to(device, dtype) for v in values(seed, *sizes, grid=grid)]


def pooled_size(pool: Pool) -> tuple[int, int]:
    """Height and width of a pooled `MAP`: torch's."""
    if pool is None:
        return MAP
    rows, columns = F.max_pool2d(torch.empty(1, *MAP, device="meta"), **pool).shape[1:]
    return rows, columns


def check_error(
    got: Tensor, z: Tensor, exact_d: golden.Array, plain_d: Tensor, *, beta: float,
    activation: str = "tanh", slope: float | None = None, upsample: str = "argmax",
    pool: Pool = None,
) -> None:  # fmt: skip
    """Compare e with the formula, given d in float64 and by plain PyTorch."""
    slope = default_slope(activation, slope)
    shift = exact.upsampled(exact_d, to_numpy(z), upsample, pool)
    wanted = exact.aligned(to_numpy(z), shift, beta, activation, slope)
    here = torch.from_numpy(exact.upsampled(to_numpy(plain_d), to_numpy(z), upsample, pool))
    here = -plain.difference(z, -beta * here.to(plain_d), activation, slope)
    check("error", got, wanted, here)


def check_entries(
    got: Tensor, change: Tensor, z: Tensor, beta: float, upsample: str = "argmax", pool: Pool = None
) -> None:
    """Compare e, given d itself, entry by entry, each with a tolerance of its own shift."""
    d, units = arrays(change, z)
    shift = exact.upsampled(d, units, upsample, pool)
    wanted = exact.aligned(units, shift, beta, "tanh", 0.0)
    scale = beta * exact.upsampled(np.abs(d), units, upsample, pool)
    check("error", got, wanted, torch.from_numpy(wanted).to(z), scale=scale)


def wide(tensor: Tensor) -> Tensor:
    """In float32 or better: what the kernels accumulate in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_conv_error(
    got: Tensor, error: Tensor, kernel: Tensor, z: Tensor, layer: Layer, **options: Any
) -> None:
    """Compare a convolution's e with the formula; what no kernel reaches has none."""
    e, weight = arrays(error, kernel)
    d = exact.carried_down(e, weight, layer.size, *layer.where)
    below = z.new_empty(*z.shape[:2], *layer.size, dtype=wide(z).dtype)
    here = plain.carried_down(wide(error), wide(kernel), below, *layer.where)
    check_error(got, z, d, here, **options)
    size = exact.carried_down(np.abs(e), np.abs(weight), layer.size, *layer.where)
    upsample, pool = options.get("upsample", "argmax"), options.get("pool")
    reached = exact.upsampled(size, to_numpy(z), upsample, pool) != 0
    assert torch.count_nonzero(got.cpu()[torch.from_numpy(~reached)]) == 0


SIZES = [
    (1, 1), (3, 5), (2, 3, 4), (3, 4, 5, 2), (2, 2, 3, 1, 4), (2, 70, 1, 1), (2, 1, 9, 9),
    (3, 1100), (0, 5), (0, 3, 2, 2), (3, 0),
]  # fmt: skip
"""Units of any number of dimensions, of one sample, of none, and none at all."""


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_units_of_any_shape(size: tuple[int, ...], target: Target, dtype: torch.dtype) -> None:
    """d given: each unit by itself, to the digits of its own shift; nothing read is changed."""
    backend, device = target
    change, z = tensors(dtype, device, size, size)
    snapshot = cases.Snapshot({"change": change, "z": z})
    got = bk.ekdaa_error(change, z, beta=0.7, backend=backend)
    check_entries(got, change, z, 0.7)
    snapshot.check_unchanged()


def test_dense(target: Target, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Through an error matrix, at sizes around every block edge."""
    backend, device = target
    batch, inputs, outputs, _ = shape
    sizes = (batch, outputs), (outputs, inputs), (batch, inputs)
    error, feedback, z = tensors(dtype, device, *sizes)
    error /= max(outputs, 1) ** 0.5
    got = bk.ekdaa_linear_error(error, feedback, z, beta=0.7, backend=backend)
    d = np.einsum("no,oi->ni", *arrays(error, feedback))
    check_error(got, z, d, wide(error) @ wide(feedback), beta=0.7)


@pytest.mark.parametrize("size", [(0, 4, 3), (3, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_dense_of_nothing(size: tuple[int, int, int], target: Target) -> None:
    """No samples, no units above (whose error is none), no units below."""
    backend, device = target
    batch, outputs, inputs = size
    sizes = (batch, outputs), (outputs, inputs), (batch, inputs)
    error, feedback, z = tensors(torch.float32, device, *sizes)
    got = bk.ekdaa_linear_error(error, feedback, z, beta=0.5, backend=backend)
    check_error(
        got, z, np.einsum("no,oi->ni", *arrays(error, feedback)), error @ feedback, beta=0.5
    )


@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name: str, target: Target, dtype: torch.dtype) -> None:
    """Through an error kernel in every geometry: strides, padding, dilation, groups."""
    backend, device = target
    layer = LAYERS[name]
    t = draw(layer, dtype, device)
    got = bk.ekdaa_conv_error(t.signal, t.feedback, t.x, beta=0.3, **layer.place, backend=backend)
    check_conv_error(got, t.signal, t.feedback, t.x, layer, beta=0.3)


@pytest.mark.parametrize("upsample", SPREADS)
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling(name: str, upsample: str, target: Target, dtype: torch.dtype) -> None:
    """E2: through every pooling; units that no window holds get exactly 0."""
    backend, device = target
    pool = POOLINGS[name]
    change, z = tensors(dtype, device, (2, 3, *pooled_size(pool)), (2, 3, *MAP))
    got = bk.ekdaa_error(change, z, beta=0.7, upsample=upsample, pool=pooled(pool), backend=backend)
    check_entries(got, change, z, 0.7, upsample, pool)


@pytest.mark.parametrize("upsample", SPREADS)
@pytest.mark.parametrize("name", POOLINGS)
def test_convolution_above_a_pooling(name: str, upsample: str, target: Target) -> None:
    """Kernel, up-sampling, target and error in one, for every pooling."""
    backend, device = target
    pool = POOLINGS[name]
    place = {"stride": (1, 2), "padding": 1, "groups": 2}
    layer = Layer(2, 4, 6, pooled_size(pool), (3, 2), place)
    t = draw(layer, torch.float32, device)
    (z,) = tensors(torch.float32, device, (2, 4, *MAP), seed=1)
    options = {"beta": 0.3, "upsample": upsample}
    got = bk.ekdaa_conv_error(
        t.signal, t.feedback, z, **options, pool=pooled(pool), **place, backend=backend
    )
    check_conv_error(got, t.signal, t.feedback, z, layer, pool=pool, **options)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 33, 64, 70])
@pytest.mark.parametrize("pool", [None, "2", "overlapping"])
@pytest.mark.parametrize("order", ORDERS)
def test_channels(
    channels: int, pool: str | None, order: torch.memory_format, target: Target
) -> None:
    """Numbers of channels around whole vectors and blocks, below and above."""
    backend, device = target
    window = POOLINGS[pool] if pool else None
    size = (2, 3) if window else MAP
    maps = (5, 7) if window else MAP
    for inputs, outputs in ((channels, 3), (3, channels)):
        layer = Layer(2, inputs, outputs, size, (2, 3), {"padding": (0, 1)})
        t = draw(layer, torch.float32, device)
        (z,) = tensors(torch.float32, device, (2, inputs, *maps), seed=1)
        error, z = (m.contiguous(memory_format=order) for m in (t.signal, z))
        got = bk.ekdaa_conv_error(
            error, t.feedback, z, beta=0.2, pool=pooled(window), **layer.place, backend=backend
        )
        check_conv_error(got, error, t.feedback, z, layer, beta=0.2, pool=window)
        assert got.is_contiguous(memory_format=order)


@pytest.mark.parametrize("order_of_z", ORDERS)
@pytest.mark.parametrize("order_above", ORDERS)
@pytest.mark.parametrize("pool", [None, "2", "overlapping", "gaps"])
def test_orders(
    pool: str | None, order_above: torch.memory_format, order_of_z: torch.memory_format,
    target: Target,
) -> None:  # fmt: skip
    """z and what comes from above each with the channels first or last; e lies as z does."""
    backend, device = target
    window = POOLINGS[pool] if pool else None
    size = pooled_size(window)
    layer = Layer(2, 3, 5, size, (2, 2), {"padding": 1})
    t = draw(layer, torch.float32, device)
    change, z = tensors(torch.float32, device, (2, 3, *size), (2, 3, *MAP), seed=1)
    change, error = (m.contiguous(memory_format=order_above) for m in (change, t.signal))
    z = z.contiguous(memory_format=order_of_z)
    options = {"beta": 0.3, "pool": pooled(window), "backend": backend}
    alone = bk.ekdaa_error(change, z, **options)
    check_error(alone, z, to_numpy(change), change, beta=0.3, pool=window)
    whole = bk.ekdaa_conv_error(error, t.feedback, z, **layer.place, **options)
    check_conv_error(whole, error, t.feedback, z, layer, beta=0.3, pool=window)
    for e in (alone, whole):
        assert e.is_contiguous(memory_format=order_of_z)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_slices(layout: str, target: Target) -> None:
    """Everything may lie in memory in any way, and is not touched."""
    backend, device = target
    layer = LAYERS["everything"]
    t = draw(layer, torch.float32, device)
    laid = [layouts.laid_out(m, layout) for m in (t.signal, t.feedback, t.x)]
    error, kernel, z = (entry.view for entry in laid)
    got = bk.ekdaa_conv_error(error, kernel, z, beta=0.3, **layer.place, backend=backend)
    check_conv_error(got, t.signal, t.feedback, t.x, layer, beta=0.3)
    matrix = bk.ekdaa_linear_error(
        error[:, :, 0, 0], kernel[:, 0, :, 0], z[:, 0, :3, 0], beta=0.3, backend=backend
    )
    above, below = t.signal[:, :, 0, 0], t.feedback[:, 0, :, 0]
    d = np.einsum("no,oi->ni", *arrays(above, below))
    check_error(matrix, t.x[:, 0, :3, 0], d, above @ below, beta=0.3)
    change = t.x.cos()
    given = bk.ekdaa_error(layouts.laid_out(change, layout).view, z, beta=0.3, backend=backend)
    check_error(given, t.x, to_numpy(change), change, beta=0.3)
    for entry in laid:
        assert torch.equal(entry.buffer, entry.before)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches(batch: int, target: Target, dtype: torch.dtype) -> None:
    """No sample or one, with a pooling and without."""
    backend, device = target
    layer = Layer(batch, 4, 6, (3, 4), (3, 2), {"padding": (1, 0), "groups": 2})
    t = draw(layer, dtype, device)
    (z,) = tensors(dtype, device, (batch, 4, *MAP), seed=1)
    for below, pool in ((t.x, None), (z, POOLINGS["2"])):
        got = bk.ekdaa_conv_error(
            t.signal, t.feedback, below, beta=0.3, pool=pooled(pool), **layer.place, backend=backend
        )
        check_conv_error(got, t.signal, t.feedback, below, layer, beta=0.3, pool=pool)


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS)
@pytest.mark.parametrize("pool", [None, "2", "overlapping"])
def test_activations(
    activation: str, slope: float | None, pool: str | None, target: Target, dtype: torch.dtype
) -> None:
    """Every activation, kinks and jumps included: on a grid where no rounding can make a sign jump."""
    backend, device = target
    window = POOLINGS[pool] if pool else None
    layer = Layer(3, 2, 3, (2, 2), (2, 1), {"padding": 1}) if pool else LAYERS["groups"]
    t = draw(layer, dtype, device, grid=True)
    maps = (5, 5) if pool else layer.size
    (z,) = tensors(dtype, device, (layer.batch, layer.inputs, *maps), grid=True, seed=1)
    how = {"beta": 0.5, "activation": activation, "slope": slope}
    got = bk.ekdaa_conv_error(
        t.signal, t.feedback, z, **how, pool=pooled(window), **layer.place, backend=backend
    )
    check_conv_error(got, t.signal, t.feedback, z, layer, pool=window, **how)
    (change,) = tensors(dtype, device, (layer.batch, layer.inputs, *layer.size), grid=True, seed=2)
    got = bk.ekdaa_error(change, z, **how, pool=pooled(window), backend=backend)
    check_error(got, z, to_numpy(change), wide(change), pool=window, **how)
    if pool is None:
        error, kernel, below = tensors(dtype, device, (9, 5), (5, 7), (9, 7), grid=True)
        got = bk.ekdaa_linear_error(error, kernel, below, **how, backend=backend)
        d = np.einsum("no,oi->ni", *arrays(error, kernel))
        check_error(got, below, d, wide(error) @ wide(kernel), **how)


def test_signum(target: Target, dtype: torch.dtype) -> None:
    """E4: a unit that changes sides has an error of ±2, one that does not 0; sign(0) is 0."""
    backend, device = target
    change, z = tensors(dtype, device, (40, 9), (40, 9))
    how: dict[str, Any] = {"beta": 1.0, "activation": "sign", "backend": backend}
    got = bk.ekdaa_error(change, z, **how)
    assert set(got.unique().tolist()) == {-2.0, 0.0, 2.0}
    assert torch.equal(got != 0, z.sign() != (wide(z) - wide(change)).sign())
    from_zero = bk.ekdaa_error(change, torch.zeros_like(z), **how)
    assert torch.equal(from_zero, change.sign())
    to_zero = bk.ekdaa_error(z, z, **how)
    assert torch.equal(to_zero, z.sign())


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_a_small_step_keeps_its_digits(activation: str, target: Target) -> None:
    """E5: by the identity, β d = 1e-4 leaves float32's digits; subtracting f(z) and y loses three."""
    backend, device = target
    (z,) = tensors(torch.float32, device, (20, 30))
    matrix = torch.eye(30, device=device)
    change = torch.full_like(z, 2e-4).copysign(z.flip(0))
    wanted = exact.aligned(to_numpy(z), to_numpy(change), 0.5, activation, 0.0)
    f = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation]

    def off(e: Tensor) -> float:
        return float(np.abs(to_numpy(e) - wanted).max() / np.abs(wanted).max())

    how: dict[str, Any] = {"beta": 0.5, "activation": activation, "backend": backend}
    maps, kernel = (change[..., None, None], z[..., None, None]), matrix[..., None, None]
    found = (
        bk.ekdaa_error(change, z, **how),
        bk.ekdaa_linear_error(change, matrix, z, **how),
        bk.ekdaa_conv_error(maps[0], kernel, maps[1], **how)[..., 0, 0],
    )
    literal = off(f(z) - f(z - 0.5 * change))
    for e in found:
        assert off(e) < 1e-6
        assert literal > 100 * off(e)


@pytest.mark.parametrize("activation", bk.ACTIVATIONS)
def test_no_shift_no_error(activation: str, target: Target, dtype: torch.dtype) -> None:
    """E7: β = 0, or nothing from above: e is exactly 0."""
    backend, device = target
    layer = LAYERS["border"]
    t = draw(layer, dtype, device)
    for beta, size in ((0.0, 1), (0.9, 0)):
        error, how = size * t.signal, {"beta": beta, "activation": activation, "backend": backend}
        for upsample in SPREADS:
            e = bk.ekdaa_error(size * t.x.cos(), t.x, upsample=upsample, **how)
            assert torch.count_nonzero(e) == 0
        whole = bk.ekdaa_conv_error(error, t.feedback, t.x, **layer.place, **how)
        dense = bk.ekdaa_linear_error(
            error[:, :, 0, 0], t.feedback[:, :, 0, 0], t.x[:, :, 0, 0], **how
        )
        assert torch.count_nonzero(whole) == torch.count_nonzero(dense) == 0


def test_what_is_left_out(target: Target) -> None:
    """β is 0.9, φ is tanh, and a pooled error goes to the arg-max, where nothing is said."""
    backend, device = target
    change, z = tensors(torch.float32, device, (2, 3, 3, 4), (2, 3, *MAP))
    got = bk.ekdaa_error(change, z, pool=bk.MaxPool(2), backend=backend)
    check_error(got, z, to_numpy(change), change, beta=0.9, pool=POOLINGS["2"])
    kernel = torch.eye(3, device=device)
    conv = bk.ekdaa_conv_error(
        change, kernel[..., None, None], z, pool=bk.MaxPool(2), backend=backend
    )
    check_error(conv, z, to_numpy(change), change, beta=0.9, pool=POOLINGS["2"])
    dense = bk.ekdaa_linear_error(change[:, :, 0, 0], kernel, z[:, :, 0, 0], backend=backend)
    above = change[:, :, 0, 0]
    check_error(dense, z[:, :, 0, 0], to_numpy(above), above, beta=0.9)


NEAR_MISSES: dict[str, Callable[[golden.Array, golden.Array], golden.Array]] = {
    "flipped sign": lambda z, d: exact.aligned(z, d, -0.7, "tanh", 0.0),
    "another beta": lambda z, d: exact.aligned(z, d, 0.75, "tanh", 0.0),
    "no target": lambda _, d: 0.7 * d,
    "by the derivative": lambda z, d: 0.7 * d / np.cosh(z) ** 2,
    "by the target's derivative": lambda z, d: 0.7 * d / np.cosh(z - 0.7 * d) ** 2,
}


@pytest.mark.parametrize("precision", cases.supported_dtypes("triton", "cpu"))
@pytest.mark.parametrize("wrong", [*NEAR_MISSES, "nearest", "average"])
def test_wrong_formulas_are_rejected(wrong: str, precision: torch.dtype) -> None:
    """The comparison above has teeth: near misses of the formula fail it in every dtype."""
    pool = POOLINGS["2"]
    change, z = tensors(precision, "cpu", (2, 3, 3, 4), (2, 3, *MAP))
    above, below = arrays(change, z)

    def compare(result: golden.Array) -> None:
        check_error(torch.from_numpy(result).to(precision), z, above, change, beta=0.7, pool=pool)

    shift = exact.upsampled(above, below, "argmax", pool)
    compare(exact.aligned(below, shift, 0.7, "tanh", 0.0))
    if wrong in NEAR_MISSES:
        near_miss = NEAR_MISSES[wrong](below, shift)
    else:
        other = exact.upsampled(above, below, wrong, pool)
        near_miss = exact.aligned(below, other, 0.7, "tanh", 0.0)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        compare(near_miss)

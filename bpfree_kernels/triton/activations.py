"""Activations of a tile and their slopes (table: `bpfree_kernels.activations`).

Written from `tl.exp` alone: libdevice names differ between vendors and are missing in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """tanh z of float32, to 4e-7 relative everywhere, and exactly ±1 where that is what rounds best."""
    size = tl.abs(z)
    # Never overflows, and vanishes against 1 for a large z. For a small one the difference would
    # lose digits, so there the odd minimax polynomial of Cephes takes over.
    decay = tl.exp(-2.0 * size)
    large = 1.0 - 2.0 * decay / (1.0 + decay)
    square = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = series * square * size + size
    y = tl.where(size < 0.625, small, large)
    return tl.where(z < 0.0, -y, y)


@triton.jit
def sigmoid(z):
    """1 / (1 + e^−z) in float32, without overflow on either side."""
    decay = tl.exp(-tl.abs(z))
    return tl.where(z < 0.0, decay, 1.0) / (1.0 + decay)


@triton.jit
def _clamp(z):
    """z cut off at ±1; NaN stays."""
    return tl.where(z > 1.0, 1.0, tl.where(z < -1.0, -1.0, z))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """f(z) and f′(z) of a float32 tile, both float32."""
    if ACTIVATION == "identity":
        y = z
        derivative = tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, z)
        derivative = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        derivative = tl.where(z > 0.0, 1.0, slope)
        y = z * derivative
    elif ACTIVATION == "tanh":
        y = tanh(z)
        derivative = 1.0 - y * y
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z)
        derivative = y * (1.0 - y)
    elif ACTIVATION == "hardtanh":
        scaled = slope * z
        y = _clamp(scaled)
        derivative = tl.where(tl.abs(scaled) <= 1.0, slope, 0.0)
    else:
        tl.static_assert(ACTIVATION == "sign", "unknown activation")
        y = tl.where(z > 0.0, 1.0, tl.where(z < 0.0, -1.0, z))  # NaN and 0 stay
        derivative = tl.full(z.shape, 0.0, tl.float32)
    return y, derivative


@triton.jit
def _tanh_difference(z, change):
    """tanh(z + d) − tanh z = u (1 − t²) / (1 + t u) with t = tanh z, u = tanh d, for small d."""
    t = tanh(z)
    u = tanh(change)
    # A large step loses nothing by plain subtraction, and could divide 0 by 0 here.
    small = tl.abs(change) < 0.5
    exact = u * (1.0 - t * t) / tl.where(small, 1.0 + t * u, 1.0)
    return tl.where(small, exact, tanh(z + change) - t)


@triton.jit
def difference(z, change, slope, ACTIVATION: tl.constexpr):
    """f(z + Δz) − f(z) of float32 tiles, without the digits that subtracting two close values loses."""
    if ACTIVATION == "identity":
        changed = change
    elif ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        low = slope if ACTIVATION == "leaky_relu" else 0.0
        after = z + change
        crosses = tl.where(after > 0.0, after, low * after) - tl.where(z > 0.0, z, low * z)
        stays_off = (z <= 0.0) & (after <= 0.0)
        changed = tl.where(stays_off, low * change, crosses)
        changed = tl.where((z > 0.0) & (after > 0.0), change, changed)
    elif ACTIVATION == "tanh":
        changed = _tanh_difference(z, change)
    elif ACTIVATION == "sigmoid":  # sigmoid z = (1 + tanh(z / 2)) / 2
        changed = 0.5 * _tanh_difference(0.5 * z, 0.5 * change)
    elif ACTIVATION == "hardtanh":
        # Outside the bounds f(z) lies off slope·z, and the step first has to make up for that; then it is
        # cut off where it reaches a bound. Inside, off is 0: a fused multiply-add would round. NaN stays.
        scaled = slope * z
        y = _clamp(scaled)
        step = tl.where(tl.abs(scaled) <= 1.0, 0.0, scaled - y) + slope * change
        changed = tl.where(step < -1.0 - y, -1.0 - y, step)
        changed = tl.where(changed > 1.0 - y, 1.0 - y, changed)
    else:
        before, _ = activate(z, slope, ACTIVATION)
        after, _ = activate(z + change, slope, ACTIVATION)
        changed = after - before
    return changed

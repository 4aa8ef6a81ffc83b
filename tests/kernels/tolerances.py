"""One comparison for every test: how far a result may be from the float64 formula.

allowed = `MULTIPLE` × (error of the same formula in plain PyTorch and the same dtype) + a few ulp

The first term follows what the dtype can do for this formula on these numbers; the second keeps a
lucky plain result (an error of 0) from asking for the impossible. The plain result is itself held
to `PLAIN_ULPS`, so a plain formula that is wrong cannot excuse a kernel that is wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .golden import Array

MULTIPLE = 4.0
"""Times the error of plain PyTorch. Another summation order easily doubles an error."""

ULPS_OF_ENTRIES = 4.0
"""Floor for elementwise functions, in epsilons of the dtype at the scale of each entry."""

ULPS_OF_SUMS = 8.0
"""Floor for sums, in epsilons at the scale of the compared tensor: torch's own sums are pairwise."""

PLAIN_ULPS = 32.0
"""Beyond this many epsilons plain PyTorch counts as wrong, not as rounded."""


def to_numpy(tensor: Tensor) -> Array:
    """A tensor's values in float64."""
    return tensor.detach().cpu().double().numpy()


def check(
    name: str,
    actual: Tensor,
    exact: Array,
    plain: Tensor,
    *,
    scale: Array | float | None = None,
) -> None:
    """Raise AssertionError unless `actual` is as close to `exact` as its dtype allows.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        exact: the float64 result of `golden`.
        plain: the same formula by plain PyTorch in `actual`'s dtype.
        scale: magnitude that rounding is relative to. ``None`` takes the largest entry of `exact`
            (right for sums: an entry that cancels out is no more exact than its neighbours);
            elementwise functions give one magnitude per entry, and are judged entry by entry.
    """
    __tracebackhide__ = True
    got = to_numpy(actual)
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, wanted {exact.shape}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, wanted {plain.dtype}"
    if exact.size == 0:
        return
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite], err_msg=name)
    got, wanted, by_torch = got[finite], exact[finite], to_numpy(plain)[finite]
    if wanted.size == 0:
        return
    info = torch.finfo(actual.dtype)
    plain_error = np.abs(by_torch - wanted)
    ulps = ULPS_OF_SUMS
    if scale is None:
        scale, plain_error = np.abs(wanted).max(), plain_error.max()
    elif isinstance(scale, np.ndarray):
        scale, ulps = scale[finite], ULPS_OF_ENTRIES
    excess = np.max(plain_error - PLAIN_ULPS * info.eps * scale - info.tiny)
    assert excess <= 0, f"{name}: the plain formula itself is off by {excess} too much"
    allowed = MULTIPLE * plain_error + ulps * info.eps * scale + info.tiny
    error = np.abs(got - wanted)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error - allowed)))
    limit = float(np.broadcast_to(allowed, error.shape)[worst])
    assert error[worst] <= limit, (  # a NaN error compares false, so it fails as well
        f"{name} ({actual.dtype}): got {got[worst]!r}, wanted {wanted[worst]!r}; "
        f"error {error[worst]:.3g}, allowed {limit:.3g}"
    )

"""An update rule applied to one parameter: what the fused ops do to a weight, as an op of its own.

For parameters whose gradient comes from elsewhere, or has to be known as a whole first, as for the
re-scaling of Pascanu et al. (2013): a gradient longer than `max_norm` is cut to that length beforehand::

    g ← scale · grad;  g ← g · max_norm / ‖g‖  if ‖g‖ > max_norm

The norm never leaves the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bpfree_kernels import backends, checks
from bpfree_kernels.ops._define import UPDATE_SCHEMA, define
from bpfree_kernels.ops._layer import ParamUpdate
from bpfree_kernels.reference import update as reference
from bpfree_kernels.update import ParamState, UpdateRule


def _fake(*_: object) -> None:
    return None


define(
    "apply_update",
    f"(Tensor(w!) param, Tensor grad, float scale, float max_norm, {UPDATE_SCHEMA}) -> ()",
    reference=reference.apply_update,
    fake=_fake,
    triton_module="bpfree_kernels.triton.update",
)


@torch.no_grad()
def apply_update(
    param: Tensor,
    grad: Tensor,
    update: UpdateRule,
    state: ParamState | None = None,
    *,
    scale: float = 1.0,
    max_norm: float | None = None,
    backend: str | None = None,
) -> None:
    """Apply a gradient to a parameter in place.

    Args:
        param: any shape, updated in place.
        grad: gradient, shaped like `param`.
        update: the update rule, e.g. ``SGD(lr=1e-3)``.
        state: what the rule remembers (``update.new_param_state(param)``), updated in place.
        scale: factor of the gradient.
        max_norm: Euclidean length to which a longer gradient is cut; ``None``: whatever its length.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"`` instead of the device's default.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: shapes or devices that differ, state that is missing, tensors that share memory, or a
            `max_norm` that is not positive and finite.
        RuntimeError: a backend that cannot run here.
    """
    checks.floating("param", param)
    checks.like("grad", grad, "param", param)
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be positive and finite, got {max_norm}.")
    parameter = ParamUpdate("param", param, update, state)
    parameter.check_disjoint(grad=grad)
    body = backends.body("apply_update", param.device.type, backend)
    most = math.inf if max_norm is None else float(max_norm)
    parameter.run(body, (), (grad.contiguous(), float(scale), most))

"""The activations that every op knows, by name, and the meaning of their one parameter.

========== ============================ ==================== =========================
name       f(z)                         f′(z)                slope
========== ============================ ==================== =========================
identity   z                            1                    –
relu       max(z, 0)                    [z > 0]              –
leaky_relu z if z > 0 else slope·z      1 if z > 0 else slope negative side, default 0.01
tanh       tanh z                       1 − f²               –
sigmoid    1 / (1 + e^−z)               f (1 − f)            –
hardtanh   clip(slope·z, −1, 1)         slope·[|slope·z| ≤ 1] of the linear part, default 1
sign       −1, 0 or 1                   0                    –
========== ============================ ==================== =========================

The bound of hardtanh keeps its gradient (URFB's convention); torch's own hardtanh drops it there.
"""

from __future__ import annotations

import math

ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "hardtanh", "sign")
"""Every activation name that an op accepts."""

DEFAULT_SLOPE = {"leaky_relu": 0.01, "hardtanh": 1.0}
"""Activations that have a parameter, and its default."""


def resolve_activation(activation: str, slope: float | None) -> tuple[str, float]:
    """Check an activation and its parameter and fill in the default.

    Args:
        activation: one of `ACTIVATIONS`.
        slope: the parameter of ``leaky_relu`` or ``hardtanh``; ``None`` takes the default.

    Returns:
        The name and the slope that the bodies get (0 for activations without a parameter).

    Raises:
        ValueError: unknown name, a slope for an activation that has none, or one that is not
            positive and finite.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if activation not in DEFAULT_SLOPE:
        if slope is not None:
            raise ValueError(f"slope has no meaning for activation {activation!r}, got {slope}.")
        return activation, 0.0
    if slope is None:
        return activation, DEFAULT_SLOPE[activation]
    if not 0 < slope < math.inf:
        raise ValueError(f"slope of {activation!r} must be positive and finite, got {slope}.")
    return activation, float(slope)

"""What can be wrong in a call of the ops of GAIT-prop: inverses of weights, and invertible convolutions.

What they share with the other ops (update rules, states) is in `mistakes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mistake import Mistake, geometry_mistakes, given, in_memory_of, kinds, replaced

GRAM, SOLVE, REFINE = ("orthogonality",), ("solve_nearly_orthogonal",), ("refine_inverse",)
INVERT, UPDATE = ("invert",), ("orthogonal_update",)
SQUARE = GRAM + REFINE + INVERT + UPDATE
"""What takes a square weight."""
RECONSTRUCT, ERROR = ("invertible_conv_reconstruct",), ("invertible_conv_error",)
CONV = RECONSTRUCT + ERROR


def _named(what: str, entries: dict[str, Mistake]) -> dict[str, Mistake]:
    return {f"{name}, {what}": entry for name, entry in entries.items()}


WEIGHTS: dict[str, Mistake] = {
    "weight a list": Mistake(
        SQUARE, replaced("weight", Tensor.tolist), TypeError, ("weight", "list")
    ),
    "weight is None": Mistake(SQUARE, given("weight", None), TypeError, ("weight", "NoneType")),
    "weight sparse": Mistake(
        SQUARE, replaced("weight", Tensor.to_sparse), ValueError, ("weight", "sparse")
    ),
    **{f"weight of {dtype}": Mistake(
        SQUARE, replaced("weight", lambda t, dtype=dtype: t.to(dtype)), TypeError,
        ("weight", "float32", "float64", str(dtype)),
    ) for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64)},
    "weight of fewer outputs": Mistake(
        SQUARE, replaced("weight", lambda t: t[1:]), ValueError,
        ("weight", "as many values for each output as there are outputs", "(11, 2, 3, 2)"),
    ),
    "weight of a smaller window": Mistake(
        SQUARE, replaced("weight", lambda t: t[..., 0]), ValueError, ("weight", "(12, 2, 3)")
    ),
    "weight a vector": Mistake(
        SQUARE, given("weight", torch.ones(1)), ValueError, ("weight", "(1,)")
    ),
    "weight of nothing": Mistake(
        SQUARE, given("weight", torch.ones(0, 0)), ValueError, ("weight", "(0, 0)")
    ),
    **kinds(REFINE, "inverse", "weight"),
    "inverse of another shape": Mistake(
        REFINE, replaced("inverse", lambda t: t.flatten(1)), ValueError,
        ("inverse", "weight", "(12, 2, 3, 2)", "(12, 12)"),
    ),
    **kinds(INVERT, "start", "weight", none=False),
    "start of another shape": Mistake(
        INVERT, replaced("start", lambda t: t.flatten(1)), ValueError,
        ("start", "weight", "(12, 2, 3, 2)", "(12, 12)"),
    ),
    "singular": Mistake(
        INVERT, replaced("weight", torch.zeros_like), torch.linalg.LinAlgError,
        ("weight", "(12, 2, 3, 2)", "float32", "condition number", "inf"),
    ),
}  # fmt: skip

SOLVING: dict[str, Mistake] = {
    **kinds(SOLVE, "orthogonality", "signal"),
    **kinds(SOLVE, "signal", "orthogonality"),
    "both half": Mistake(
        SOLVE, lambda a: {name: tensor.half() for name, tensor in a.items()}, TypeError,
        ("orthogonality", "float32", "float64", "float16"),
    ),
    "signal of one sample": Mistake(
        SOLVE, replaced("signal", lambda t: t[0]), ValueError, ("signal", "[batch, out]", "(12,)")
    ),
    "orthogonality of another weight": Mistake(
        SOLVE, replaced("orthogonality", lambda t: t[1:, 1:]), ValueError,
        ("orthogonality", "[out, out]", "(12, 12)", "(11, 11)"),
    ),
    "no terms": Mistake(SOLVE, given("max_terms", 0), ValueError, ("max_terms", "1", "0")),
    "half a term": Mistake(SOLVE, given("max_terms", 1.5), TypeError, ("max_terms", "int", "1.5")),
    "no steps": Mistake(INVERT, given("max_steps", 0), ValueError, ("max_steps", "1", "0")),
    "half a step": Mistake(INVERT, given("max_steps", 0.5), TypeError, ("max_steps", "int", "0.5")),
    **{f"tolerance={value}": Mistake(
        SOLVE + INVERT, given("tolerance", value), ValueError,
        ("tolerance", "not be negative", str(value)),
    ) for value in (-1e-3, float("nan"))},
}  # fmt: skip

UPDATING: dict[str, Mistake] = {
    **kinds(UPDATE, "grad", "weight"),
    **kinds(UPDATE, "orthogonality", "weight"),
    "grad of another shape": Mistake(
        UPDATE, replaced("grad", lambda t: t.flatten(1)), ValueError,
        ("grad", "weight", "(12, 2, 3, 2)", "(12, 12)"),
    ),
    "orthogonality of another weight": Mistake(
        UPDATE, replaced("orthogonality", lambda t: t[1:, 1:]), ValueError,
        ("orthogonality", "[out, out]", "(12, 12)", "(11, 11)"),
    ),
    **{f"penalty={value}": Mistake(
        UPDATE, given("penalty", value), ValueError,
        ("penalty", "finite and not negative", str(value)),
    ) for value in (-0.1, float("inf"), float("nan"))},
    **{f"{name} inside the weight": Mistake(
        UPDATE, in_memory_of(name, "weight"), ValueError, (name, "weight", "share memory")
    ) for name in ("grad", "orthogonality")},
    "weight expanded": Mistake(
        UPDATE, replaced("weight", lambda t: t[:1].expand_as(t)), ValueError,
        ("weight", "expanded"),
    ),
}  # fmt: skip

MAPS: dict[str, Mistake] = {
    **kinds(RECONSTRUCT, "inverse", "x"),
    **{f"{name}, above": entry for name, entry in kinds(ERROR, "inverse", "signal").items()},
    **kinds(RECONSTRUCT, "output", "x"),
    **kinds(RECONSTRUCT, "bias", "x", none=False),
    **kinds(RECONSTRUCT, "target", "output", none=False),
    **kinds(RECONSTRUCT, "rate", "x", none=False),
    **kinds(ERROR, "gate", "signal", none=False),
    **{f"{name} {what}": Mistake(functions, replaced(name, change), error, (name, *words))
       for functions, name in ((RECONSTRUCT, "x"), (ERROR, "signal"))
       for what, change, error, words in (
           ("a list", Tensor.tolist, TypeError, ("list",)),
           ("sparse", Tensor.to_sparse, ValueError, ("sparse",)),
           ("of integers", Tensor.long, TypeError, ("int64",)),
           ("half on the CPU", Tensor.half, TypeError, ("cpu", "float16")),
           ("of one sample", lambda t: t[0], ValueError, ("[batch, ", "height, ", "width]")),
       )},
    "x of other channels": Mistake(
        RECONSTRUCT, replaced("x", lambda t: t[:, 1:]), ValueError,
        ("inverse", "2 channels", "input has 1"),
    ),
    "x of another size": Mistake(
        RECONSTRUCT, replaced("x", lambda t: t[..., 1:]), ValueError,
        ("output", "(5, 12, 2, 1)", "(5, 12, 2, 2)"),
    ),
    "output of other samples": Mistake(
        RECONSTRUCT, replaced("output", lambda t: t[1:]), ValueError,
        ("output", "[batch, out, out_height, out_width]", "(5, 12, 2, 2)", "(4, 12, 2, 2)"),
    ),
    "output with its channels last": Mistake(
        RECONSTRUCT, replaced("output", lambda t: t.permute(0, 2, 3, 1)), ValueError,
        ("output", "(5, 12, 2, 2)", "(5, 2, 2, 12)"),
    ),
    "outputs of features only": Mistake(
        RECONSTRUCT, lambda a: {"output": a["output"][:, :7], "inverse": a["inverse"][:7]},
        ValueError, ("inverse", "as many outputs as its window has values", "(7, 2, 3, 2)"),
    ),
    "inverse a matrix": Mistake(
        CONV, replaced("inverse", lambda t: t.flatten(1)), ValueError,
        ("inverse", "kernel_h, kernel_w]", "12)"),
    ),
    "bias of positions": Mistake(
        RECONSTRUCT, replaced("bias", lambda t: t[:, None, None]), ValueError,
        ("bias", "[out]", "(12,)", "(12, 1, 1)"),
    ),
    "target of other samples": Mistake(
        RECONSTRUCT, replaced("target", lambda t: t[1:]), ValueError,
        ("target", "output", "(5, 12, 2, 2)", "(4, 12, 2, 2)"),
    ),
    "target without a rate": Mistake(
        RECONSTRUCT, given("rate", None), ValueError, ("target", "rate", "None")
    ),
    "rate without a target": Mistake(
        RECONSTRUCT, given("target", None), ValueError, ("target", "rate", "None")
    ),
    "rate of all samples": Mistake(
        RECONSTRUCT, replaced("rate", lambda t: t[0]), ValueError,
        ("rate", "[batch]", "(5,)", "()"),
    ),
    "signal of other features": Mistake(
        ERROR, replaced("signal", lambda t: t[:, 1:]), ValueError,
        ("signal", "[batch, features, out_height, out_width]", "(5, 7, 2, 2)", "(5, 6, 2, 2)"),
    ),
    "signal of another map": Mistake(
        ERROR, given("input_size", (6, 3)), ValueError, ("signal", "(5, 7, 3, 2)", "(5, 7, 2, 2)")
    ),
    "gate of the outputs": Mistake(
        ERROR, lambda a: {"gate": a["signal"]}, ValueError,
        ("gate", "[batch, in, height, width]", "(5, 2, 4, 3)", "(5, 7, 2, 2)"),
    ),
    "input_size of three": Mistake(
        ERROR, given("input_size", (2, 4, 3)), ValueError, ("input_size", "(2, 4, 3)")
    ),
    "input_size of floats": Mistake(
        ERROR, given("input_size", (4.0, 3)), TypeError, ("input_size", "int", "(4.0, 3)")
    ),
    "input_size of nothing": Mistake(
        ERROR, given("input_size", (0, 3)), ValueError, ("input_size", "at least 1", "(0, 3)")
    ),
    "a window larger than the map": Mistake(
        CONV, given("dilation", (1, 3)), ValueError, ("(4, 3)", "smaller", "(1, 3)")
    ),
    **{name: entry for name, entry in geometry_mistakes(CONV).items()
       if not name.startswith(("groups", "padding='same'"))},
    **{f"{name} of no inverse": Mistake(
        RECONSTRUCT, given("activation", name), ValueError,
        ("activation", "inverse", "'identity'", "'leaky_relu'", repr(name)),
    ) for name in ("relu", "tanh", "sigmoid", "hardtanh", "sign")},
    "unknown activation": Mistake(
        CONV, given("activation", "gelu"), ValueError, ("activation", "leaky_relu", "'gelu'")
    ),
    "slope of the identity": Mistake(
        CONV, lambda _: {"activation": "identity", "slope": 0.1}, ValueError,
        ("slope", "'identity'", "0.1"),
    ),
    **{f"slope={value}": Mistake(
        CONV, given("slope", value), ValueError, ("slope", "positive and finite", str(value))
    ) for value in (0.0, -0.1, float("inf"), float("nan"))},
}  # fmt: skip


INVERTIBLE_MISTAKES: dict[str, Mistake] = {
    **_named("of a square weight", WEIGHTS),
    **_named("of a series", SOLVING),
    **_named("of an orthogonal weight", UPDATING),
    **_named("of an invertible convolution", MAPS),
}

"""What the ops of a dense layer share: its argument checks, and its update rule made ready for a body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bpfree_kernels import checks
from bpfree_kernels.ops._define import contiguous, wrote
from bpfree_kernels.update import SGD, Adam, LayerState, ParamState, UpdateRule


def check_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, learns: bool = True, name: str = "x"
) -> None:
    """Check the input [batch, in], called `name`, weight [out, in] and bias [out] of a dense layer.

    Raises:
        TypeError: an unsupported dtype, or dtypes that differ.
        ValueError: wrong shapes, devices that differ, or an empty batch for a layer that `learns`.
    """
    checks.floating(name, x)
    checks.dims(name, x, 2, "[batch, in]")
    if learns:
        checks.not_empty(name, x)
    checks.dims("weight", weight, 2, "[out, in]")
    checks.shape("weight", weight, (weight.shape[0], x.shape[1]), "[out, in]")
    checks.same_kind("weight", weight, name, x)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "[out]")
        checks.same_kind("bias", bias, name, x)


def check_update(update: UpdateRule, device: torch.device) -> None:
    """Check an update rule, and its learning rate if that is a tensor.

    Raises:
        TypeError, ValueError: something else, or a learning rate that no kernel can read.
    """
    if not isinstance(update, SGD | Adam):
        raise TypeError(
            "update must be a bpfree_kernels.SGD, Adam or AdamW, "
            f"got {type(update).__module__}.{type(update).__name__}."
        )
    if isinstance(update.lr, Tensor):
        checks.scalar("lr of update", update.lr, device)


def check_state_type(state: object, wanted: type) -> None:
    """Raise TypeError unless `state` is of the wanted class."""
    if not isinstance(state, wanted):
        raise TypeError(f"state must be a {wanted.__name__}, got {type(state).__name__}.")


def check_param_state(label: str, param: Tensor, state: ParamState, update: UpdateRule) -> None:
    """Check that `state`, called `label` in messages, is what `update` keeps for `param`.

    Raises:
        TypeError, ValueError: a tensor that is missing, or that does not match the parameter.
    """
    check_state_type(state, ParamState)
    adam = isinstance(update, Adam)
    m, v, step = state.m, state.v, state.step
    for field, tensor, needed in (
        ("m", m, adam or cast(SGD, update).momentum != 0),
        ("v", v, adam),
        ("step", step, adam),
    ):
        if tensor is None and needed:
            name = type(update).__name__
            raise ValueError(f"{label}.{field} is missing, but {name} needs it.")
    if m is not None:
        checks.like(f"{label}.m", m, "its parameter", param)
    if v is not None:
        checks.like(f"{label}.v", v, "its parameter", param)
    if step is not None:
        checks.scalar(f"{label}.step", step, param.device)


def check_feedback(feedback: Tensor | None, weight: Tensor, **belonging: object) -> None:
    """Check a weight that learns beside a layer's own: like it, and there if something belongs to it.

    Raises:
        TypeError, ValueError: a dtype, shape or device that differs, or what belongs to no feedback.
    """
    if feedback is not None:
        return checks.like("feedback", feedback, "weight", weight)
    for name, given in belonging.items():
        if given is not None:
            raise ValueError(f"{name} needs feedback, which is None.")
    return None


class LayerUpdate:
    """One in-place update of a layer: checked arguments for a body, and what follows the call."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        update: UpdateRule,
        state: LayerState | None,
        **others: tuple[Tensor | None, ParamState | None],
    ) -> None:
        """Check the state against the rule and the parameters (`check_param_state`).

        ``state=None`` is right for a rule without state; a parameter that is ``None`` has none, either.

        Args:
            weight: updated in place.
            bias: updated in place, or ``None``.
            update: the rule of all parameters.
            state: of weight and bias.
            others: by name, what the op updates beside them, each with its own state.
        """
        check_update(update, weight.device)
        state = LayerState(ParamState(), ParamState()) if state is None else state
        check_state_type(state, LayerState)
        params: dict[str, tuple[Tensor | None, str, ParamState | None]] = {
            "weight": (weight, "state.weight", state.weight),
            "bias": (bias, "state.bias", state.bias),
        }
        params |= {name: (t, f"{name}_state", of_it) for name, (t, of_it) in others.items()}
        self._rule = update.args()
        self._params: list[Tensor | None] = []
        self._states: list[ParamState] = []
        self._named: dict[str, Tensor | None] = {}
        for name, (param, label, given) in params.items():
            kept = ParamState() if given is None or param is None else given
            if param is not None:
                check_param_state(label, param, kept, update)
            self._params.append(param)
            self._states.append(kept)
            self._named |= {
                name: param, f"{label}.m": kept.m, f"{label}.v": kept.v, f"{label}.step": kept.step,
            }  # fmt: skip

    def check_disjoint(self, **read: Tensor | None) -> None:
        """Raise ValueError if something that the update writes shares memory with another tensor."""
        read["lr of update"] = self._rule.lr_tensor
        checks.disjoint(self._named, read)

    def run(self, body: Callable[..., Any], before: tuple[Any, ...], after: tuple[Any, ...]) -> Any:
        """Call ``body(*before, *parameters, *after, update…)``, then count the step."""
        count = len(self._params)
        written = [*self._params, *(t for kept in self._states for t in (kept.m, kept.v))]
        stand_ins = contiguous(written)
        states: list[Tensor | None] = []
        for i, kept in enumerate(self._states):
            states += (*stand_ins[count + 2 * i : count + 2 * i + 2], kept.step)
        result = body(*before, *stand_ins[:count], *after, *self._rule, *states)
        wrote(written, stand_ins)
        steps = [kept.step for kept in self._states if kept.step is not None]
        if steps:
            torch._foreach_add_(steps, 1)  # one call, and on a device one launch
        return result


class ParamUpdate:
    """One in-place update of a parameter: checked arguments for a body, and what follows the call."""

    def __init__(
        self, name: str, param: Tensor, update: UpdateRule, state: ParamState | None
    ) -> None:
        """Check the rule, and the state against it (`check_param_state`).

        Args:
            name: of the parameter, in messages.
            param: updated in place.
            update: the rule.
            state: what it remembers; ``None`` is right for a rule without state.
        """
        check_update(update, param.device)
        self._state = ParamState() if state is None else state
        check_param_state("state", param, self._state, update)
        self._name, self._param, self._rule = name, param, update.args()

    def check_disjoint(self, **read: Tensor) -> None:
        """Raise ValueError if something that the update writes shares memory with another tensor."""
        kept = self._state
        written = {"state.m": kept.m, "state.v": kept.v, "state.step": kept.step}
        checks.disjoint(
            {self._name: self._param, **written}, {**read, "lr of update": self._rule.lr_tensor}
        )

    def run(
        self, body: Callable[..., Any], before: tuple[Any, ...], after: tuple[Any, ...]
    ) -> None:
        """Call ``body(*before, parameter, *after, update…)``, then count the step."""
        written = (self._param, self._state.m, self._state.v)
        param, *moments = stand_ins = contiguous(written)
        body(*before, param, *after, *self._rule, *moments, self._state.step)
        wrote(written, stand_ins)
        if self._state.step is not None:
            self._state.step.add_(1)


class LayerGradients:
    """The gradients of a layer's weight and bias, as the ops named ``*_grad`` return them."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        accumulate: bool,
    ) -> None:
        """Check the tensors given, and make those that are not.

        Raises:
            TypeError, ValueError: a gradient that does not match its parameter, one without a
                parameter, or ``accumulate`` with nothing to accumulate into.
        """
        if accumulate and (grad_weight is None or (bias is not None and grad_bias is None)):
            raise ValueError("accumulate needs grad_weight, and grad_bias if there is a bias.")
        if grad_bias is not None and bias is None:
            raise ValueError("grad_bias is given, but the layer has no bias.")
        for name, grad, param in (
            ("grad_weight", grad_weight, weight),
            ("grad_bias", grad_bias, bias),
        ):
            if grad is not None and param is not None:
                checks.like(name, grad, name.removeprefix("grad_"), param)
        self.weight = weight.new_empty(weight.shape) if grad_weight is None else grad_weight
        self.bias = (
            bias.new_empty(bias.shape) if bias is not None and grad_bias is None else grad_bias
        )
        self._accumulate = accumulate

    def check_disjoint(self, **read: Tensor | None) -> None:
        """Raise ValueError if a gradient shares memory with another tensor of the op."""
        checks.disjoint({"grad_weight": self.weight, "grad_bias": self.bias}, read)

    def run(self, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call ``body(*args, grad_weight, grad_bias, accumulate)``."""
        stand_ins = contiguous((self.weight, self.bias))
        result = body(*args, *stand_ins, self._accumulate)
        wrote((self.weight, self.bias), stand_ins)
        return result

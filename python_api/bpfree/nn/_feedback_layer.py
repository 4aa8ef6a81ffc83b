"""What the layers with feedback weights R share (see `bpfree.nn.feedback`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parameter import UninitializedParameter, is_lazy

from bpfree.nn.connectivity import clear_outside, masked, own_mask

MODES = ("updated", "fixed", "sign")
"""What may become of R while W learns."""

Place = tuple[Any, ...]
"""How a layer's windows lie: stride, padding, …; empty for a dense layer."""

Down = Callable[[Tensor, Tensor, torch.Size, Place], Tensor]
"""(∂z, R, shape of x, place) → ∂x."""


class _GradientForBoth(torch.autograd.Function):
    """W as it is; its gradient goes to W and, scaled, to R, to each where its connections exist."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        feedback: Tensor | None,  # noqa: ARG004  only to receive a gradient
        feedback_scale: float,
        weight_mask: Tensor | None,
        feedback_mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight_mask, feedback_mask)
        ctx.feedback_scale = feedback_scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight_mask, feedback_mask = ctx.saved_tensors
        of_feedback = None
        if ctx.needs_input_grad[1]:
            scale = ctx.feedback_scale
            of_feedback = masked(gradient if scale == 1 else scale * gradient, feedback_mask)
        return masked(gradient, weight_mask), of_feedback, None, None, None


class _DownThroughFeedback(torch.autograd.Function):
    """z as it is; its gradient goes on to z, and to x through R."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        x: Tensor,
        feedback: Tensor,
        signs_of: Tensor | None,
        down: Down,
        place: Place,
    ) -> Tensor:
        ctx.save_for_backward(feedback, signs_of)
        ctx.shape, ctx.dtype, ctx.down, ctx.place = x.shape, x.dtype, down, place
        return z.detach()  # not a view, so an activation may work in place on it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor | None, ...]:
        feedback, signs_of = ctx.saved_tensors
        if signs_of is not None:
            feedback = feedback.abs() * signs_of.sign()
        of_x = ctx.down(signal, feedback.to(signal.dtype), ctx.shape, ctx.place)
        return signal, of_x.to(ctx.dtype), None, None, None, None


class FeedbackLayer(nn.Module):
    """A layer with feedback weights beside the forward ones: R, the masks, the gradient's two paths."""

    weight: Tensor
    feedback: Tensor
    weight_mask: Tensor | None
    feedback_mask: Tensor | None

    @property
    def feedback_scale(self) -> float:
        """Factor of the gradient that R gets where it learns: that of W times this."""
        return 1.0

    def add_feedback(
        self, mode: str, weight_mask: Tensor | None, feedback_mask: Tensor | None
    ) -> None:
        """Draw R and take over the masks; the end of a layer's construction.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: an unknown mode, or a mask of another shape.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self.mode = mode
        self.register_buffer("weight_mask", own_mask("weight_mask", weight_mask, self.weight))
        self.register_buffer("feedback_mask", own_mask("feedback_mask", feedback_mask, self.weight))
        self.register_buffer("feedback", None)
        if is_lazy(self.weight):
            kind: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
            kind["requires_grad"] = mode == "updated"
            self._buffers["feedback"] = UninitializedParameter(**kind)
            return
        self.hold_feedback(torch.empty_like(self.weight))
        clear_outside(self.weight, self.weight_mask)
        self._draw_feedback()

    def hold_feedback(self, values: Tensor) -> None:
        """Take these values, which share their memory, as R."""
        # A Parameter among the buffers: the optimizer takes it, `parameters()` does not give it.
        held = nn.Parameter(values.detach(), requires_grad=self.mode == "updated")
        self._buffers["feedback"] = held

    def _draw_feedback(self) -> None:
        self._draw_glorot()
        clear_outside(self.feedback, self.feedback_mask)

    def _draw_glorot(self) -> None:
        nn.init.xavier_uniform_(self.feedback)

    def reset_parameters(self) -> None:
        """Draw W and bias anew as the ordinary layer does, and R ~ U(±√(6/(k·k·(in + out)))).

        R's bound is Glorot's: k·k is the window's size (1 for a dense layer), in the inputs of a group.
        """
        super().reset_parameters()  # type: ignore[misc]
        if self._buffers.get("feedback") is None or is_lazy(self.feedback):
            return  # the ordinary layer's constructor calls this before there is an R
        clear_outside(self.weight, self.weight_mask)
        self._draw_feedback()

    def _learning_weight(self) -> Tensor:
        """W for the forward pass. Its gradient is R's, too, scaled, if W learns and R is to follow it."""
        updated = self.mode == "updated"
        if not self.weight.requires_grad or not (updated or self.weight_mask is not None):
            return self.weight
        feedback = self.feedback if updated else None
        args = (feedback, self.feedback_scale, self.weight_mask, self.feedback_mask)
        kernel = _GradientForBoth.apply(self.weight, *args)  # type: ignore[no-untyped-call]
        return cast(Tensor, kernel)

    def send_down(self, z: Tensor, x: Tensor, down: Down, place: Place) -> Tensor:
        """z, made from x.detach(), with a gradient of x that goes through R."""
        if not x.requires_grad:
            return z
        signs_of = self.weight.detach() if self.mode == "sign" else None
        args = (z, x, self.feedback.detach(), signs_of, down, place)
        return cast(Tensor, _DownThroughFeedback.apply(*args))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module moves a parameter's values but replaces a buffer. R has to stay the tensor that the
        # optimizer holds, so for the time of a move it is a parameter.
        self._parameters["feedback"] = cast(nn.Parameter, self._buffers.pop("feedback"))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers["feedback"] = self._parameters.pop("feedback")
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if "feedback" in self._parameters:  # where load_state_dict(assign=True) puts a Parameter
            self._buffers["feedback"] = self._parameters.pop("feedback")

    def extra_repr(self) -> str:
        """The arguments, for ``print``."""
        return f"{super().extra_repr()}, {self._feedback_repr()}"

    def _feedback_repr(self) -> str:
        return f"mode={self.mode!r}"

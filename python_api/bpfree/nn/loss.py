"""The multi-class hinge loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from bpfree_kernels import checks
from bpfree_kernels.losses import DEFAULT_MARGIN, check_hinge, resolve_loss
from bpfree_kernels.reference.classifier import hinge

_REDUCTIONS = ("mean", "sum", "none")


class MultiClassHingeLoss(nn.Module):
    """One margin for the label's logit x_c, and its negative for the logits of the other classes.

    ::

        loss of a sample = max(margin − x_c, 0) + off_class · Σ_{i≠c} max(margin + x_i, 0)

    A logit that lies exactly on its threshold keeps its gradient, as in ``loss="hinge"`` of the
    learners and of `bpfree_kernels.classifier_step`: −[x_c ≤ margin] for the label's logit and
    off_class·[x_i ≥ −margin] for the others. (The maxima are clamps, which pass the gradient on at
    their bound; `torch.relu` does not.) Learners take such a module as their `loss`, too.

    Attributes:
        margin: the margin.
        off_class: weight μ of the other classes; ``None`` is 1 / (classes − 1), or 0 for one class.
        reduction: what becomes of the samples' losses.
    """

    def __init__(
        self,
        margin: float = DEFAULT_MARGIN,
        off_class: float | None = None,
        reduction: str = "mean",
    ) -> None:
        """Make the loss.

        Args:
            margin: the margin, not negative.
            off_class: weight μ of the other classes, not negative; ``None`` for 1 / (classes − 1).
            reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

        Raises:
            ValueError: an unknown reduction, or a number that is negative or not finite.
        """
        super().__init__()
        check_hinge(margin, off_class)
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}."
            )
        self.margin = float(margin)
        self.off_class = None if off_class is None else float(off_class)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            input: logits, [batch, classes], of any floating-point dtype.
            target: class of each sample, int32 or int64, [batch].

        Returns:
            0-d, or [batch] for the reduction ``"none"``; differentiable in the logits.

        Raises:
            IndexError: a label out of range, on the CPU (see `bpfree_kernels.set_label_checks`).
            TypeError: no tensors, or ones of another kind of dtype.
            ValueError: shapes or devices that do not fit, or no class at all.
        """
        checks.dims("input", input, 2, "[batch, classes]")
        if not input.is_floating_point():
            raise TypeError(f"input must be of a floating-point dtype, got {input.dtype}.")
        batch, classes = input.shape
        if classes == 0:
            raise ValueError(f"input must hold at least one class, got {tuple(input.shape)}.")
        checks.labels(target, batch, classes, input.device, name="target")
        _, margin, off_class = resolve_loss("hinge", self.margin, self.off_class, classes)
        _, losses = hinge(input, target, margin, off_class)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"margin={self.margin}, off_class={self.off_class}, reduction={self.reduction!r}"

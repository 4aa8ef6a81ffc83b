"""Argument checks that the ops share: each raises one sentence that names the argument.

Everything is checked before a body runs, so nothing has changed in any tensor when one of these raises.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.float64)
"""Floating-point types that the ops take on the CPU."""

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Floating-point types that the ops take on a GPU (accumulation is always float32)."""

_check_labels_on_gpu = False


def set_label_checks(on_gpu: bool) -> None:
    """Switch the range check of labels on CUDA tensors on or off (off by default).

    On the CPU labels are always checked. On a GPU the check waits for the device, which no captured
    graph allows, so it is a mode for debugging. Without it a label outside [0, classes) counts as "no
    class": it selects a zero row of the feedback, or an all-zero target; it is never an address.
    """
    global _check_labels_on_gpu
    _check_labels_on_gpu = on_gpu


def floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has a floating-point type that its device supports."""
    supported = GPU_DTYPES if tensor.is_cuda else CPU_DTYPES
    if tensor.dtype not in supported:
        names = ", ".join(str(dtype) for dtype in supported)
        raise TypeError(
            f"{name} on {tensor.device.type} must be one of {names}, got {tensor.dtype}."
        )


def same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `tensor` has `other`'s dtype (TypeError) and device (ValueError)."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}."
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}."
        )


def shape(name: str, tensor: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `tensor` has the shape `wanted`, which `meaning` spells out."""
    if tensor.shape != wanted:
        raise ValueError(
            f"{name} must have shape {meaning} = {tuple(wanted)}, got {tuple(tensor.shape)}."
        )


def dims(name: str, tensor: Tensor, wanted: int, meaning: str) -> None:
    """Raise ValueError unless `tensor` has `wanted` dimensions, which `meaning` spells out."""
    if tensor.dim() != wanted:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(tensor.shape)}.")


def not_empty(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the batch (first dimension) of `tensor` is empty."""
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, got {tuple(tensor.shape)}.")


def labels(tensor: Tensor, batch: int, classes: int, device: torch.device) -> None:
    """Check class labels: int32 or int64, shape [batch], on `device`, each in [0, classes).

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
        IndexError: a label out of range, with its value and position (see `set_label_checks`).
    """
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be torch.int32 or torch.int64, got {tensor.dtype}.")
    shape("labels", tensor, (batch,), "[batch]")
    if tensor.device != device:
        raise ValueError(f"labels must be on the device of x, {device}, got {tensor.device}.")
    if torch.compiler.is_compiling() or batch == 0:
        return  # a compiled graph cannot branch on values; the bodies are safe without
    if tensor.device.type == "cpu" or (_check_labels_on_gpu and tensor.is_cuda):
        low, high = torch.aminmax(tensor)
        if low.item() < 0 or high.item() >= classes:
            position = int(torch.nonzero((tensor < 0) | (tensor >= classes))[0])
            raise IndexError(
                f"labels must lie in [0, {classes}), got {int(tensor[position])} "
                f"at position {position}."
            )


def disjoint(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if a tensor that the op writes shares memory with another argument.

    Also refuses to write a tensor whose own elements overlap (an expanded one).
    """
    if torch.compiler.is_compiling():
        return  # functionalisation gives every mutated tensor memory of its own
    spans: list[tuple[int, int, str, bool]] = []
    for group, is_written in ((written, True), (read, False)):
        for name, tensor in group.items():
            if tensor is None or tensor.numel() == 0:
                continue
            start = tensor.data_ptr()
            if tensor.is_contiguous():
                spans.append((start, start + tensor.nbytes, name, is_written))
                continue
            if is_written and 0 in tensor.stride():
                raise ValueError(f"{name} is updated in place and must not be an expanded tensor.")
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((start, start + (reach + 1) * tensor.itemsize, name, is_written))
    written_end, any_end = (0, ""), (0, "")  # how far the spans seen so far reach, and whose it is
    for start, end, name, is_written in sorted(spans):
        reach_end, other = any_end if is_written else written_end
        if start < reach_end:
            raise ValueError(
                f"{other} and {name} share memory, but one of them is updated in place."
            )
        any_end = max(any_end, (end, name))
        if is_written:
            written_end = max(written_end, (end, name))

"""Argument checks that the ops share: each raises one sentence that names the argument.

Everything is checked before a body runs, so nothing has changed in any tensor when one of these raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

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


def tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it is a dense (strided) one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}.")


def scalar(name: str, value: object, device: torch.device) -> None:
    """Check a learning rate or step count: one float32 or float64 element, on the CPU or on `device`.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: more or fewer elements than one, or another device.
    """
    tensor(name, value)
    value = cast(Tensor, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {value.dtype}.")
    if value.numel() != 1:
        raise ValueError(f"{name} must be one element, got shape {tuple(value.shape)}.")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name} must be on the CPU or on {device}, got {value.device}.")


def floating(name: str, value: Tensor) -> None:
    """Raise unless `value` is a dense tensor of a floating-point type that its device supports."""
    tensor(name, value)
    supported = GPU_DTYPES if value.is_cuda else CPU_DTYPES
    if value.dtype not in supported:
        names = ", ".join(str(dtype) for dtype in supported)
        raise TypeError(f"{name} on {value.device.type} must be one of {names}, got {value.dtype}.")


def same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `value` has `other`'s dtype (TypeError) and device (ValueError)."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}."
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}."
        )


def shape(name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise unless `value` is a dense tensor of the shape `wanted`, which `meaning` spells out."""
    tensor(name, value)
    if value.shape != wanted:
        raise ValueError(
            f"{name} must have shape {meaning} = {tuple(wanted)}, got {tuple(value.shape)}."
        )


def like(name: str, value: object, other_name: str, other: Tensor) -> None:
    """Raise unless `value` is a dense tensor of `other`'s shape, dtype and device."""
    if (
        isinstance(value, Tensor)
        and value.shape == other.shape
        and value.dtype == other.dtype
        and value.device == other.device
        and value.layout == torch.strided
    ):
        return
    tensor(name, value)
    shape(name, cast(Tensor, value), tuple(other.shape), f"of {other_name}")
    same_kind(name, cast(Tensor, value), other_name, other)


def dims(name: str, value: Tensor, wanted: int, meaning: str) -> None:
    """Raise unless `value` is a dense tensor of `wanted` dimensions, which `meaning` spells out."""
    tensor(name, value)
    if value.dim() != wanted:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(value.shape)}.")


def not_empty(name: str, value: Tensor) -> None:
    """Raise ValueError if the batch (first dimension) of `value` is empty."""
    if value.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, got {tuple(value.shape)}.")


def labels(
    value: Tensor, batch: int, classes: int, device: torch.device, *, name: str = "labels"
) -> None:
    """Check class labels, called `name`: int32 or int64, [batch], on `device`, in [0, classes).

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
        IndexError: a label out of range, with its value and position (see `set_label_checks`).
    """
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {value.dtype}.")
    shape(name, value, (batch,), "[batch]")
    if value.device != device:
        raise ValueError(f"{name} must be on the device {device}, got {value.device}.")
    if torch.compiler.is_compiling() or batch == 0:
        return  # a compiled graph cannot branch on values; the bodies are safe without
    if value.device.type == "cpu" or (_check_labels_on_gpu and value.is_cuda):
        low, high = torch.aminmax(value)
        if low.item() < 0 or high.item() >= classes:
            position = int(torch.nonzero((value < 0) | (value >= classes))[0])
            raise IndexError(
                f"{name} must lie in [0, {classes}), got {int(value[position])} "
                f"at position {position}."
            )


def disjoint(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if a tensor that the op writes shares memory with another argument.

    Also refuses to write a tensor whose own elements overlap (an expanded one). Memory is judged by the
    span from a tensor's first element to its last, so two interleaved slices count as sharing it.
    """
    if torch.compiler.is_compiling():
        return  # functionalisation gives every mutated tensor memory of its own
    if _all_apart((*written.values(), *read.values())):
        return
    spans: list[tuple[int, int, str, bool]] = []
    for group, is_written in ((written, True), (read, False)):
        for name, value in group.items():
            start = 0 if value is None else value.data_ptr()
            if value is None or start == 0:  # no tensor, or one without memory: empty or meta
                continue
            if is_written and _overlaps_itself(value):
                raise ValueError(
                    f"{name} is updated in place and must not be an expanded or overlapping tensor."
                )
            reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            spans.append((start, start + (reach + 1) * value.itemsize, name, is_written))
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


def _all_apart(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all tensors are contiguous and no two share memory, as in nearly every call."""
    spans = []
    for value in tensors:
        if value is not None:
            if not value.is_contiguous():
                return False
            start = value.data_ptr()
            spans.append((start, start + value.nbytes))
    spans.sort()
    last = 0
    for start, end in spans:
        if start < last:
            return False
        last = end
    return True


def _overlaps_itself(value: Tensor) -> bool:
    """Whether two elements may lie in the same place: a stride does not step over all smaller ones."""
    reach = 0
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False

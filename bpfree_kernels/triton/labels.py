"""Class labels in a tile. A label outside [0, classes) means "no class" and is never an address."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_labels(labels_ptr, samples, batch, classes):
    """Class of each sample as int64; −1 for "no class" and beyond the batch."""
    labels = tl.load(labels_ptr + samples, mask=samples < batch, other=-1).to(tl.int64)
    return tl.where((labels >= 0) & (labels < classes), labels, -1)


@triton.jit
def gather_rows(rows_ptr, labels, columns, width):
    """rows[label, columns] of a [classes, width] matrix, float32 [samples, columns].

    Zeros for the label −1 and beyond the width.
    """
    known = (labels >= 0)[:, None] & (columns < width)[None, :]
    offsets = tl.maximum(labels, 0)[:, None] * width + columns[None, :]
    return tl.load(rows_ptr + offsets, mask=known, other=0.0).to(tl.float32)

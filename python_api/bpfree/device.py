"""Which device the command line works on."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """A device that does not exist, or not here; the message says what to do."""


def pick_device(name: str | None) -> str:
    """Check a device name, or choose a GPU if there is one and the CPU otherwise.

    Args:
        name: ``"cpu"``, ``"cuda"``, or ``None`` for the choice.

    Raises:
        DeviceError: another name, or a GPU that torch does not see.
    """
    has_gpu = torch.cuda.is_available()
    if name is None:
        return "cuda" if has_gpu else "cpu"
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"device must be cpu or cuda, got {name!r}.")
    if name == "cuda" and not has_gpu:
        raise DeviceError("torch sees no CUDA device here: use --device cpu.")
    return name

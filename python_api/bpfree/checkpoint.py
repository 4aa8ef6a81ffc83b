"""Checkpoints: a learner and what is around it in one file, so that a run can go on from there."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree import _interrupts
from bpfree.results import EpochResult
from bpfree.rules.base import Learner
from bpfree.training import Scheduler

_FORMAT = "bpfree checkpoint 1"


def save(
    path: str | os.PathLike[str],
    learner: Learner,
    *,
    epoch: int,
    history: Iterable[EpochResult] = (),
    scheduler: Scheduler | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; the file appears whole or not at all, and replaces an older one.

    A Ctrl-C that comes meanwhile takes effect when the file is written.

    Args:
        path: the file; its directory must exist.
        learner: the learner.
        epoch: number of epochs finished (`EpochResult.epoch`).
        history: results so far.
        scheduler: learning rate scheduler, if there is one.
        extra: anything else: dictionaries, lists and tuples of tensors, numbers, strings, ``None``.

    Raises:
        TypeError: something in `extra` or of the scheduler that could not be loaded again.
        OSError: the file cannot be written.
    """
    _check_loadable("extra", extra)
    with _interrupts.held_back():
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        schedule = None if scheduler is None else scheduler.state_dict()
        _check_reads_back(schedule)
        content = {
            "format": _FORMAT,
            "epoch": epoch,
            "learner": learner.state_dict(),
            "history": [result._asdict() for result in history],
            "scheduler": schedule,
            "random_state": random_state,
            "extra": extra,
        }
        _write(Path(path), content)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; runs no code that the file may hold (``weights_only=True``).

    Returns:
        ``epoch``, ``history`` (a list of `EpochResult`), ``extra``, and for `restore` ``learner``
        (what `Learner.load_state_dict` takes), ``scheduler`` and ``random_state``. Tensors are on
        the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint of this package.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{os.fspath(path)} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of this version of bpfree.")
    content["history"] = [EpochResult(**result) for result in content["history"]]
    return content


def restore(
    learner: Learner, checkpoint: dict[str, Any], *, scheduler: Scheduler | None = None
) -> int:
    """Put a learner, its scheduler and torch's random numbers in the state of a checkpoint.

    To use a trained model only, ``learner.load_state_dict(checkpoint["learner"])`` is enough.

    Args:
        learner: made as the saved one was.
        checkpoint: from `load`.
        scheduler: made as the saved one was; needed if and only if there was one.

    Returns:
        The ``start_epoch`` with which `Learner.fit` goes on.

    Raises:
        ValueError: a checkpoint of another kind of learner, or a scheduler too many or too few;
            nothing has changed then.
    """
    if (scheduler is None) != (checkpoint["scheduler"] is None):
        holds = "no scheduler" if checkpoint["scheduler"] is None else "a scheduler"
        raise ValueError(f"checkpoint holds {holds}, but scheduler is {scheduler}.")
    learner.load_state_dict(checkpoint["learner"])
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint["scheduler"])
    for device, generator_state in checkpoint["random_state"].items():
        if device == "cpu":
            torch.set_rng_state(generator_state)
        elif torch.cuda.is_available() and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(generator_state, device)
    return int(checkpoint["epoch"])


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write beside the file and move it there, so that a crash leaves the old file as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make the new name last through a power failure, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_reads_back(scheduler: dict[str, Any] | None) -> None:
    """Raise TypeError if the state of a scheduler, which may hold any object, could not be loaded."""
    memory = io.BytesIO()
    torch.save(scheduler, memory)
    memory.seek(0)
    try:
        torch.load(memory, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            "scheduler holds an object that a checkpoint cannot: its state must be plain values."
        ) from error


def _check_loadable(name: str, value: Any) -> None:
    """Raise TypeError for what ``weights_only=True`` would refuse when it is too late."""
    if value is None or type(value) in (bool, int, float, str, bytes) or type(value) is Tensor:
        return
    if type(value) is dict:
        for key, item in value.items():
            _check_loadable(f"key {key!r} of {name}", key)
            _check_loadable(f"{name}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_loadable(f"{name}[{position}]", item)
    else:
        raise TypeError(
            f"{name} must be plain (tensors, numbers, strings, lists, tuples, dictionaries), "
            f"got {type(value).__name__}."
        )

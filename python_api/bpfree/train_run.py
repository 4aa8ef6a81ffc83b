"""One training run of the command line: from options to a folder with weights, numbers and curve.

A run can be interrupted and resumed: the checkpoint is written at the start and after every epoch,
and a resumed run goes on as if nothing had happened (bit for bit on the CPU).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch.optim.lr_scheduler import MultiStepLR

from bpfree import _interrupts, checkpoint, data
from bpfree._extras import train_extra
from bpfree.device import pick_device
from bpfree.metrics import write_metrics
from bpfree.models import build_model
from bpfree.plots import learning_curve
from bpfree.registry import find_rule, make_optimizer
from bpfree.results import BatchInfo, EpochResult
from bpfree.run_diagnostics import RunDiagnostics

STANDARDIZED = ("cifar-10",)
"""Data sets that are standardised unless asked otherwise, as in the DRTP authors' code."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Types of weights and images by name."""

_COMPARED = 256  # training samples on which the diagnostics compare updates
_MAY_CHANGE = ("epochs", "device", "threads")  # when a run is resumed; the rest defines the run


class RunError(RuntimeError):
    """A run cannot start or go on as asked; the message says what to do."""


def parse_epochs(option: str, text: str | None) -> tuple[int, ...]:
    """Epochs that an option names, such as ``60,90``; none for ``None``.

    Raises:
        ValueError: something else than rising numbers above 0.
    """
    parts = [] if text is None else text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdecimal()]
    if len(numbers) < len(parts) or any(a >= b for a, b in pairwise([0, *numbers])):
        raise ValueError(f"{option} must be rising epochs from 1 on, such as 60,90, got {text!r}.")
    return tuple(numbers)


class Follower(Protocol):
    """Whoever is told how a run goes on."""

    def on_batch(self, info: BatchInfo) -> None:
        """A batch was learned."""

    def on_epoch(self, result: EpochResult) -> None:
        """An epoch is finished and saved."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how: the options of ``bpfree train``, every default filled in.

    ``None`` is left only where torch has the default (`momentum`, `weight_decay`, `threads`) or the
    model (`activation`, `dropout`, `bias`, `init`). `rule_options` are the rule's own, those that were given.
    """

    rule: str
    model: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    momentum: float | None
    weight_decay: float | None
    loss: str
    standardize: bool
    seed: int
    device: str
    threads: int | None
    activation: str | None = None
    dropout: float | None = None
    lr_drops: tuple[int, ...] = ()
    input_dropout: bool = True
    bias: bool | None = None
    init: str | None = None
    untied: bool = False
    rule_options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    diagnostics: bool = False

    @classmethod
    def with_defaults(
        cls,
        *,
        rule: str,
        data: str,
        lr: float | None = None,
        loss: str | None = None,
        standardize: bool | None = None,
        device: str | None = None,
        **others: Any,
    ) -> Self:
        """Fill in what depends on the rule (`lr`, `loss`), the data set and the machine (`device`).

        Raises:
            ValueError: an unknown rule or dtype.
            DeviceError: a device that does not exist here.
        """
        chosen = find_rule(rule)
        dtype = others.get("dtype", "float32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        return cls(
            rule=rule,
            data=data,
            lr=chosen.lr if lr is None else lr,
            loss=chosen.loss if loss is None else loss,
            standardize=data in STANDARDIZED if standardize is None else standardize,
            device=pick_device(device),
            **others,
        )


class TrainRun:
    """A run that is set up: data loaded, learner made, and the checkpoint read if it is resumed.

    Attributes:
        config: what is trained.
        out: the folder that takes the results.
        dataset: the data, on the device.
        learner: the learner.
        history: results of the finished epochs.
        diagnostics: what is followed beside them, ``None`` unless it was asked for.
    """

    def __init__(
        self, config: TrainConfig, out: Path, data_dir: Path | None = None, *, resume: bool = False
    ) -> None:
        """Set a run up.

        Args:
            config: what to train and how.
            out: folder for the results, made if it is not there.
            data_dir: folder to look for the data set in first.
            resume: go on from the checkpoint in `out`.

        Raises:
            ValueError: an unknown name, an option out of range, or a model that does not fit.
            DataError: the data set is missing or damaged.
            RunError: `out` cannot be made, holds a run although `resume` is off, or holds none or
                another one although it is on.
            MissingExtraError: a package that the run needs is not installed.
        """
        with train_extra("Training"):
            import matplotlib  # noqa: F401  missing is better found now than after the training
        self.config = config
        self.out = out
        self._checkpoint = out / "checkpoint.pt"
        self._check_out(resume)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(
            config.seed
        )  # for dropout; weights, feedback and shuffling have their own
        dataset = data.load(config.data, data_dir)
        device, dtype = torch.device(config.device), DTYPES[config.dtype]
        self.dataset = (dataset.standardized() if config.standardize else dataset).to(device, dtype)
        model = build_model(
            config.model,
            dataset.input_shape,
            dataset.classes,
            activation=config.activation,
            dropout=config.dropout,
            seed=config.seed,
            input_dropout=config.input_dropout,
            bias=config.bias,
            init=config.init,
            untied=config.untied,
        ).to(device, dtype)
        optimizer = make_optimizer(
            model.parameters(), config.optimizer, config.lr, config.momentum, config.weight_decay
        )
        drops = list(config.lr_drops)
        self._scheduler = MultiStepLR(optimizer, drops, gamma=0.1) if drops else None
        self.learner = find_rule(config.rule).make(
            model,
            optimizer,
            loss=config.loss,
            seed=config.seed,
            options=config.rule_options,
        )
        batch = (self.dataset.train_x[:_COMPARED], self.dataset.train_y[:_COMPARED])
        self.diagnostics = RunDiagnostics(self.learner, batch) if config.diagnostics else None
        self.history: list[EpochResult] = self._resume() if resume else []
        self._make_out()  # last, so that a refused run leaves nothing behind

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self.history[-1].epoch if self.history else 0

    @property
    def batches(self) -> int:
        """Batches in an epoch, of which the last may be smaller."""
        return -(-len(self.dataset.train_y) // self.config.batch_size)

    def train(self, follower: Follower) -> bool:
        """Train up to the last epoch, or until Ctrl-C.

        The folder then holds ``checkpoint.pt``, ``metrics.json``, ``metrics.csv`` and, after at least
        one epoch, ``learning_curve.png`` and, if they were asked for, ``diagnostics.png``.

        Returns:
            Whether the last epoch was reached.
        """
        config, dataset = self.config, self.dataset
        finished = True
        try:
            if not self.history:
                self._save(self.history)  # Ctrl-C in the first epoch leaves something, too

            def on_epoch(result: EpochResult) -> None:
                with _interrupts.held_back():  # so that the files all tell of the same epoch
                    if self.diagnostics is not None:
                        self.diagnostics.record()
                    self._save([*self.history, result])
                    self.history.append(result)
                    self._write_metrics()
                follower.on_epoch(result)

            self.learner.fit(
                (dataset.train_x, dataset.train_y),
                max(0, config.epochs - self.epoch),
                config.batch_size,
                validation=(dataset.test_x, dataset.test_y),
                scheduler=self._scheduler,
                seed=config.seed,
                start_epoch=self.epoch,
                on_batch=follower.on_batch,
                on_epoch=on_epoch,
            )
        except KeyboardInterrupt:
            finished = False
        self._write_metrics()
        if self.history:
            title = f"{find_rule(config.rule).title}, {config.model}, {config.data}"
            learning_curve(self.out / "learning_curve.png", self.history, title)
            if self.diagnostics is not None:
                self.diagnostics.draw(self.out / "diagnostics.png", title)
        return finished

    def _check_out(self, resume: bool) -> None:
        there = self._checkpoint.exists()
        if resume and not there:
            raise RunError(f"{self.out} holds no run to resume: leave --resume out to start one.")
        if there and not resume:
            raise RunError(
                f"{self.out} holds a run already: add --resume to go on with it, "
                "or name another folder with --out."
            )

    def _make_out(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.out} cannot be made ({error.strerror}): name another folder with --out."
            ) from error

    def _resume(self) -> list[EpochResult]:
        """Put the learner in the state of the checkpoint, if that is of the same run."""
        saved = checkpoint.load(self._checkpoint)
        before = (saved["extra"] or {}).get("config")
        if before is None:
            raise RunError(
                f"{self._checkpoint} was not written by bpfree train: name another --out."
            )
        for name, value in asdict(self.config).items():
            if name not in _MAY_CHANGE and before.get(name) != value:
                raise RunError(
                    f"{self.out} was trained with {name} {before.get(name)}, not {value}: resume it "
                    "with the same options, or start another run with --out."
                )
        checkpoint.restore(self.learner, saved, scheduler=self._scheduler)
        if self.diagnostics is not None:
            self.diagnostics.angles = saved["extra"]["angles"]
        history: list[EpochResult] = saved["history"]
        return history

    def _save(self, history: Iterable[EpochResult]) -> None:
        done = list(history)
        angles = {} if self.diagnostics is None else self.diagnostics.angles
        checkpoint.save(
            self._checkpoint,
            self.learner,
            epoch=done[-1].epoch if done else 0,
            history=done,
            scheduler=self._scheduler,
            extra={"config": asdict(self.config), "angles": angles},
        )

    def _write_metrics(self) -> None:
        config = asdict(self.config) | {"data_source": self.dataset.source}
        columns = {} if self.diagnostics is None else self.diagnostics.columns()
        write_metrics(self.out, config, self.history, columns)

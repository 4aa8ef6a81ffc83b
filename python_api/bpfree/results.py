"""What the methods of a learner return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepResult(NamedTuple):
    """What one batch gave, before its update.

    Attributes:
        loss: mean loss of the batch, 0-d, on the device.
        output: what the output layer says, [batch, classes]: probabilities (``bce``, ``ce``) or
            values (``mse``).
    """

    loss: Tensor
    output: Tensor


class EvalResult(NamedTuple):
    """How well a model does on some data.

    Attributes:
        loss: mean loss of a sample.
        accuracy: fraction of the samples whose largest output is their class, 0 to 1.
        samples: how many samples there were.
    """

    loss: float
    accuracy: float
    samples: int


class BatchInfo(NamedTuple):
    """What `Learner.fit` tells ``on_batch`` after every batch.

    Attributes:
        epoch: number of this epoch; the first is 1.
        batch: number of this batch in its epoch; the first is 1.
        batches: how many batches the epoch has, or ``None`` if the data does not say.
        samples: how many samples this batch has.
        loss: mean loss of this batch, 0-d, on the device: reading its value waits for the device.
    """

    epoch: int
    batch: int
    batches: int | None
    samples: int
    loss: Tensor


class EpochResult(NamedTuple):
    """What `Learner.fit` returns for every epoch.

    Attributes:
        epoch: number of this epoch; the first is 1, so this many are finished: the ``start_epoch``
            from which a later `Learner.fit` goes on.
        train_loss: mean loss of a sample, each at the time that it was learned.
        train_accuracy: fraction of the samples that were right at that time, 0 to 1.
        validation_loss: mean loss of a validation sample after the epoch; ``None`` without those.
        validation_accuracy: fraction of the validation samples that are right after the epoch.
        seconds: wall-clock time of learning, validation not counted.
        samples_per_second: samples learned in that time.
        lr: learning rate of the optimizer's first parameter group during the epoch.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float
    samples_per_second: float
    lr: float

"""Every rule at work: a small network on handwritten digits, how well it learns and how fast.

The numbers are measured while you wait; the data come with scikit-learn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from bpfree import data
from bpfree.data import Dataset
from bpfree.device import pick_device
from bpfree.models import build_model
from bpfree.registry import RULES, Rule, make_optimizer
from bpfree.rules.base import Learner

BATCH_SIZE = 32
CONTROL = "shallow"

Step = Callable[[Tensor, Tensor], object]
"""Learns one batch, (x, y)."""

_STEPS_PER_ROUND = 5  # between two looks at the clock; each look waits for the device


@dataclass(frozen=True)
class Row:
    """What the demo finds out about a rule.

    Attributes:
        title: the rule.
        accuracy: test accuracy, 0 to 1.
        frozen_accuracy: test accuracy of the same net if only its output layer learns.
        step_ms: median time of a learning step, in milliseconds.
        plain_ms: the same of the rule's plain-PyTorch formulation, measured in turns with it;
            ``None`` for a rule that is plain PyTorch itself.
    """

    title: str
    accuracy: float
    frozen_accuracy: float
    step_ms: float
    plain_ms: float | None


def run_demo(device: str | None = None, *, epochs: int = 60, rounds: int = 100) -> None:
    """Train every rule, measure it, and print one table.

    Args:
        device: ``"cpu"`` or ``"cuda"``; ``None`` takes a GPU if there is one.
        epochs: training epochs of each rule.
        rounds: how often the clock is read for each median; each reading spans five steps.

    Raises:
        DeviceError: a device that does not exist here.
        MissingExtraError: scikit-learn is not installed.
    """
    where = torch.device(pick_device(device))
    dataset = data.load("digits").to(where)
    rules = {name: rule for name, rule in RULES.items() if name != CONTROL}
    controls = list(dict.fromkeys((rule.demo_model, rule.loss) for rule in rules.values()))
    with _progress(len(controls) + len(rules) + 1) as announce:
        frozen = {}
        for net, loss in controls:
            announce(f"training {net} with hidden layers frozen, loss {loss}")
            control = replace(RULES[CONTROL], demo_model=net)
            frozen[net, loss] = _train(control, loss, dataset, epochs)
        accuracies = {}
        for name, rule in rules.items():
            announce(f"training by {rule.title}")
            accuracies[name] = _train(rule, rule.loss, dataset, epochs)
        announce("timing all rules in turns")
        times = _time(list(rules.values()), dataset, rounds)
    rows = [
        Row(rule.title, accuracies[name], frozen[rule.demo_model, rule.loss], *taken)
        for (name, rule), taken in zip(rules.items(), times, strict=True)
    ]
    console = Console()
    console.print(make_table(rows))
    console.print(
        "Net 64-256-256-10 (tanh), for GAIT-prop 64-256-256-256 (leaky ReLU, orthogonal start, 10 of the "
        f"outputs are logits), Adam, {epochs} epochs of {len(dataset.train_y):,} images, "
        f"tested on {len(dataset.test_y)}. 'Hidden frozen' is the control: the same net of which "
        f"only the output layer learns. Times: batches of {BATCH_SIZE}, medians of {rounds} rounds "
        f"of {_STEPS_PER_ROUND} steps, all in turns, on {_device_name(where)}.",
        highlight=False,
    )


def make_table(rows: Sequence[Row]) -> Table:
    """The demo's table, one line for each rule."""
    table = Table("rule")
    for heading in (
        "test accuracy", "hidden frozen", "ms/step", "plain PyTorch ms/step", "speed",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        plain, speed = "–", "–"
        if row.plain_ms is not None:
            plain, speed = f"{row.plain_ms:.3f}", f"{row.plain_ms / row.step_ms:.1f}×"
        table.add_row(
            row.title,
            f"{100 * row.accuracy:.1f} %",
            f"{100 * row.frozen_accuracy:.1f} %",
            f"{row.step_ms:.3f}",
            plain,
            speed,
        )
    return table


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, one line for each step elsewhere; yields what announces the next step."""
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def announce(step: str) -> None:
            nonlocal begun
            progress.update(task, description=step, completed=begun)
            begun += 1
            if not console.is_terminal:
                console.print(step, highlight=False)

        yield announce


def _make(rule: Rule, loss: str, dataset: Dataset) -> Learner:
    model, optimizer = _net(rule, dataset)
    return rule.learner(model, optimizer, loss=loss, seed=0)


def _net(rule: Rule, dataset: Dataset) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = build_model(rule.demo_model, dataset.input_shape, dataset.classes)
    model = model.to(dataset.train_x.device)
    return model, make_optimizer(model.parameters(), "adam", rule.demo_lr)


def _train(rule: Rule, loss: str, dataset: Dataset, epochs: int) -> float:
    """Test accuracy after training."""
    learner = _make(rule, loss, dataset)
    learner.fit((dataset.train_x, dataset.train_y), epochs, BATCH_SIZE)
    return learner.evaluate((dataset.test_x, dataset.test_y)).accuracy


def _time(rules: Sequence[Rule], dataset: Dataset, rounds: int) -> list[tuple[float, float | None]]:
    """For each rule, median milliseconds of its step and of its plain formulation, if it has one."""
    steps: list[Step] = []
    for rule in rules:
        learner = _make(rule, rule.loss, dataset)
        steps.append(learner.step)
        if rule.plain is not None:
            model, optimizer = _net(rule, dataset)
            steps.append(rule.plain(learner, model, optimizer).step)
    batches = zip(dataset.train_x.split(BATCH_SIZE), dataset.train_y.split(BATCH_SIZE), strict=True)
    whole = [(x, y) for x, y in batches if len(y) == BATCH_SIZE]
    medians = iter(interleaved_medians(steps, whole, rounds))
    return [(next(medians), None if rule.plain is None else next(medians)) for rule in rules]


def interleaved_medians(
    steps: Sequence[Step],
    batches: Sequence[tuple[Tensor, Tensor]],
    rounds: int,
) -> list[float]:
    """Time several ways to learn, in turns, so that whatever else the machine does hits all alike.

    Args:
        steps: called with a batch.
        batches: taken one after another, the same for every way.
        rounds: how often each is timed; the first tenth warms up and is not counted.

    Returns:
        Median milliseconds of a step, for each way.
    """
    times: list[list[float]] = [[] for _ in steps]
    supplies = [cycle(batches) for _ in steps]
    warm_up = max(1, rounds // 10)
    for number in range(warm_up + rounds):
        for step, supply, taken in zip(steps, supplies, times, strict=True):
            _wait_for_device(batches[0][0])
            start = time.perf_counter()
            for _ in range(_STEPS_PER_ROUND):
                step(*next(supply))
            _wait_for_device(batches[0][0])
            if number >= warm_up:
                taken.append(1000 * (time.perf_counter() - start) / _STEPS_PER_ROUND)
    return [statistics.median(taken) for taken in times]


def _wait_for_device(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"

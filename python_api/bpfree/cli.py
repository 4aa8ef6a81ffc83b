"""The command ``bpfree``: train a network, check the installation, see every rule at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer

    from bpfree.progress import make_reporter
except ModuleNotFoundError as error:  # nothing but the command imports this module
    raise SystemExit(
        f"The command bpfree needs the package {error.name}: "
        'install it with pip install "bpfree-kernels[train]".'
    ) from error

from bpfree import __version__
from bpfree._extras import MissingExtraError
from bpfree.data import DATASETS, DataError
from bpfree.device import DeviceError
from bpfree.metrics import summarize
from bpfree.models import ACTIVATIONS, MODEL_NAMES
from bpfree.registry import OPTIMIZERS, RULES
from bpfree.train_run import RunError, TrainConfig, TrainRun

INTERRUPTED = 130
"""Exit status after Ctrl-C, the shell's own convention."""

app = typer.Typer(
    help="Learning without backpropagation: training from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _one_sentence(*errors: type[Exception]) -> Iterator[None]:
    """Turn what a user can put right into one sentence and exit status 1."""
    try:
        yield
    except errors as error:
        typer.echo(f"bpfree: {error}", err=True)
        raise typer.Exit(1) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bpfree {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    rule: Annotated[str, typer.Option(help=f"Learning rule: {', '.join(RULES)}.")] = "drtp",
    model: Annotated[str, typer.Option(help=f"Network: {MODEL_NAMES}.")] = "fc1-1000",
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)}.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data set; before $BPFREE_DATA and cache.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 60,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Learning rate.", show_default="the rule's")
    ] = None,
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")] = "adam",
    momentum: Annotated[float | None, typer.Option(help="Momentum of sgd.", min=0)] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Weight decay.", show_default="torch's")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Output layer: bce, ce or mse.", show_default="the rule's")
    ] = None,
    activation: Annotated[
        str, typer.Option(help=f"Hidden activation: {', '.join(ACTIVATIONS)}.")
    ] = "tanh",
    dropout: Annotated[
        float, typer.Option(help="Share of the inputs of every fully connected layer to drop.")
    ] = 0.0,
    standardize: Annotated[
        bool | None,
        typer.Option(help="Channels to mean 0, deviation 1.", show_default="for cifar-10 only"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, feedback and order.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on the CPU.", show_default="torch's")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="runs/RULE-MODEL-DATA-seedSEED"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a network and write checkpoint, metrics and learning curve into a folder."""
    folder = out or Path("runs") / f"{rule}-{model}-{data}-seed{seed}"
    with _one_sentence(DataError, DeviceError, MissingExtraError, RunError, ValueError):
        config = TrainConfig.with_defaults(
            rule=rule,
            model=model,
            data=data,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            loss=loss,
            activation=activation,
            dropout=dropout,
            standardize=standardize,
            seed=seed,
            device=device,
            threads=threads,
        )
        run = TrainRun(config, folder, data_dir, resume=resume)
    _train(run)


def _train(run: TrainRun) -> None:
    config = run.config
    typer.echo(
        f"{RULES[config.rule].title} {config.model} on {config.data} ({run.dataset.source}): "
        f"{len(run.dataset.train_y):,} training and {len(run.dataset.test_y):,} test images, "
        f"batch {config.batch_size}, {config.optimizer} lr {config.lr:g}, loss {config.loss}, "
        f"seed {config.seed}, {config.device}."
    )
    if run.epoch:
        typer.echo(f"Resuming after epoch {run.epoch}.")
    with make_reporter(config.epochs, run.epoch, run.batches) as reporter:
        finished = run.train(reporter)
    if run.history:
        summary = summarize(run.history)
        mean = (
            f"mean of the last {summary.averaged} epochs {summary.mean_test_error:.2f} %, "
            if summary.averaged > 1
            else ""
        )
        typer.echo(
            f"Test error {summary.test_error:.2f} % after epoch {summary.epochs}, {mean}"
            f"{summary.seconds:.1f} s of training. Results: {run.out}"
        )
    if not finished:
        typer.echo(
            f"Interrupted: {run.out} holds a checkpoint after epoch {run.epoch}. "
            "To go on, give the same command with --resume.",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report what was built, what runs on this machine, and whether it computes right."""
    from bpfree_kernels.doctor import main

    raise typer.Exit(main(["--json"] if as_json else []))


@app.command()
def demo(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")
    ] = None,
) -> None:
    """Train a small network by every rule on handwritten digits and print one table."""
    from bpfree.demo import run_demo

    with _one_sentence(DataError, DeviceError, MissingExtraError):
        run_demo(device)

"""The command ``bpfree``: train a network, check the installation, see every rule at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch

try:
    import typer

    from bpfree import cli_options as options
    from bpfree.progress import make_reporter
except ModuleNotFoundError as error:  # nothing but the command imports this module
    raise SystemExit(
        f"The command bpfree needs the package {error.name}: "
        'install it with pip install "bpfree-kernels[train]".'
    ) from error

from bpfree import __version__
from bpfree._extras import MissingExtraError
from bpfree.data import DataError
from bpfree.device import DeviceError
from bpfree.metrics import summarize
from bpfree.registry import RULES
from bpfree.train_run import RunError, TrainConfig, TrainRun, parse_epochs

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
    rule: options.Rule = "drtp",
    model: options.Model = "fc1-1000",
    data: options.Data = "digits",
    data_dir: options.DataDir = None,
    epochs: options.Epochs = 10,
    batch_size: options.BatchSize = 60,
    lr: options.Lr = None,
    lr_drops: options.LrDrops = None,
    optimizer: options.Optimizer = "adam",
    momentum: options.Momentum = None,
    weight_decay: options.WeightDecay = None,
    loss: options.Loss = None,
    activation: options.Activation = None,
    dropout: options.Dropout = None,
    input_dropout: options.InputDropout = True,
    bias: options.Bias = None,
    init: options.Init = None,
    untied: options.Untied = False,
    connectivity: options.Connectivity = None,
    beta: options.Beta = None,
    gamma: options.Gamma = None,
    upsample: options.Upsample = None,
    max_norm: options.MaxNorm = None,
    orthogonal_penalty: options.OrthogonalPenalty = None,
    off_diagonal: options.OffDiagonal = None,
    form: options.Form = None,
    normalised: options.Normalised = None,
    dtype: options.Dtype = "float32",
    standardize: options.Standardize = None,
    diagnostics: options.Diagnostics = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    threads: options.Threads = None,
    out: options.Out = None,
    resume: options.Resume = False,
) -> None:
    """Train a network and write checkpoint, metrics and learning curve into a folder."""
    of_rule = {
        "connectivity": connectivity,
        "beta": beta,
        "gamma": gamma,
        "upsample": upsample,
        "max_norm": max_norm,
        "orthogonal_penalty": orthogonal_penalty,
        "off_diagonal": off_diagonal,
        "form": form,
        "normalised": normalised,
    }
    folder = out or Path("runs") / f"{rule}-{model}-{data}-seed{seed}"
    mistakes = (DataError, DeviceError, MissingExtraError, RunError, TypeError, ValueError)
    with _one_sentence(*mistakes):
        config = TrainConfig.with_defaults(
            rule=rule,
            model=model,
            data=data,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            lr_drops=parse_epochs("lr-drops", lr_drops),
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            loss=loss,
            activation=activation,
            dropout=dropout,
            input_dropout=input_dropout,
            bias=bias,
            init=init,
            untied=untied,
            rule_options={name: value for name, value in of_rule.items() if value is not None},
            dtype=dtype,
            standardize=standardize,
            diagnostics=diagnostics,
            seed=seed,
            device=device,
            threads=threads,
        )
        run = TrainRun(config, folder, data_dir, resume=resume)
    with _one_sentence(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
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
    device: options.Device = None,
) -> None:
    """Train a small network by every rule on handwritten digits and print one table."""
    from bpfree.demo import run_demo

    with _one_sentence(DataError, DeviceError, MissingExtraError):
        run_demo(device)

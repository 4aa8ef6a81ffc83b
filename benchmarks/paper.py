"""Papers' accuracy figures, run again: each rule beside the frozen-hidden control and backprop.

    python benchmarks/paper.py drtp-mnist --data-dir DIR    # or BPFREE_DATA; writes docs/results/

A number of its own says little: a frozen random layer under a trained output layer reproduces much of
what local rules reach. So every table has that control (Shallow), and how far the hidden weights moved.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from results import run_header

from bpfree.metrics import summarize
from bpfree.progress import make_reporter
from bpfree.train_run import TrainConfig, TrainRun

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Row:
    """One line of a paper's table: what to run, with which seeds, and the figure that it printed."""

    rule: str
    seeds: tuple[int, ...]
    paper: str


@dataclass(frozen=True)
class Table:
    """A table of a paper: the options that all its rows share, and the rows."""

    title: str
    options: dict[str, object]
    rows: tuple[Row, ...]


TABLES = {
    "drtp-mnist": Table(
        "DRTP, Table 1: MNIST, FC1-500, tanh, sigmoid + BCE, Adam lr 1.5e-4, batch 60, 100 epochs, "
        "no dropout; test error %, mean of the last ten epochs",
        {
            "model": "fc1-500", "data": "mnist", "epochs": 100, "batch_size": 60, "lr": 1.5e-4,
            "optimizer": "adam", "loss": "bce", "activation": "tanh", "dropout": 0.0,
        },
        (
            Row("drtp", (0, 1, 2), "4.61 ± 0.13"),
            Row("shallow", (0,), "8.25 ± 0.09"),
            Row("bp", (0,), "1.65 ± 0.06"),
        ),
    ),
}  # fmt: skip


def run(table: Table, row: Row, seed: int, data_dir: Path | None, out: Path) -> dict[str, object]:
    """Train one row with one seed."""
    config = TrainConfig.with_defaults(
        rule=row.rule, seed=seed, momentum=None, weight_decay=None, threads=None, **table.options
    )
    training = TrainRun(config, out, data_dir)
    first = training.learner.network.stages[0].layer.weight
    start = first.detach().clone()
    with make_reporter(config.epochs, 0, training.batches) as reporter:
        training.train(reporter)
    summary = summarize(training.history)
    moved = float((first - start).norm() / start.norm())
    print(f"{row.rule} seed {seed}: {summary.mean_test_error:.2f} % in {summary.seconds:.0f} s")
    return {
        "rule": row.rule, "seed": seed, "paper": row.paper,
        "mean_test_error": summary.mean_test_error, "last_test_error": summary.test_error,
        "seconds_of_learning": summary.seconds, "hidden_weight_change": moved,
        "history": [result.validation_accuracy for result in training.history],
    }  # fmt: skip


def write(name: str, table: Table, records: list[dict[str, object]]) -> None:
    """Save a table as Markdown and JSON."""
    header = run_header()
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {**header, "title": table.title, "results": records}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1))
    lines = [f"# {table.title}", "", *(f"- {key}: {value}" for key, value in header.items()), ""]
    lines += [
        "| rule | seed | test error, % (last ten) | paper | learning, s | ‖ΔW‖/‖W‖, first layer |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['rule']} | {r['seed']} | {r['mean_test_error']:.2f} | {r['paper']} "
        f"| {r['seconds_of_learning']:.0f} | {r['hidden_weight_change']:.2f} |"
        for r in records
    ]
    path.with_suffix(".md").write_text("\n".join([*lines, ""]))


def main() -> None:
    """Run the table named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints go")
    options = parser.parse_args()
    table = TABLES[options.table]
    records = []
    for row in table.rows:
        for seed in row.seeds:
            out = options.runs / options.table / f"{row.rule}-seed{seed}"
            torch.manual_seed(seed)
            records.append(run(table, row, seed, options.data_dir, out))
    write(options.table, table, records)


if __name__ == "__main__":
    main()

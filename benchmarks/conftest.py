"""Prints every comparison at the end of a run, and saves them with machine, versions and commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare import ALL, NOTES, Comparison
from results import run_header


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", metavar="FILE", help="write the comparisons to FILE.md and FILE.json"
    )


def _table(comparisons: list[Comparison]) -> str:
    lines = ["| scenario | side | median, ms | iqr, ms | ours / side | error vs float64 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for result in comparisons:
        for side, median in result.medians.items():
            error = f"{result.errors[side]:.1e}" if side in result.errors else ""
            spread = result.spread[side] * 1e3
            ratio = "" if side == result.ours else f"{result.ratio(side):.2f}"
            lines.append(
                f"| {result.name} | {side} | {median * 1e3:.3f} | {spread:.3f} | {ratio} | {error} |"
            )
    return "\n".join(lines)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not ALL and not NOTES:
        return
    body = "\n".join([_table(ALL), "", *NOTES])
    terminalreporter.section("comparisons (interleaved medians)")
    terminalreporter.write_line(body)
    target = config.getoption("--results")
    if target is None:
        return
    header = run_header()
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {**header, "results": [vars(result) for result in ALL], "notes": NOTES}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1))
    lines = [f"# {path.name}", "", *(f"- {name}: {value}" for name, value in header.items())]
    path.with_suffix(".md").write_text("\n".join([*lines, "", body, ""]))

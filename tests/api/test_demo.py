"""The demo: it runs every rule and prints one table of measured numbers."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from bpfree import demo
from bpfree.registry import RULES


def test_demo_prints_one_table_with_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    demo.run_demo("cpu", epochs=2, rounds=3)
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("│")]
    titles = [rule.title for name, rule in RULES.items() if name != demo.CONTROL]
    assert [line.split("│")[1].strip() for line in lines] == titles
    assert "training by DRTP" in printed.err


def test_table_says_how_much_faster_and_leaves_baselines_out() -> None:
    rows = [demo.Row("A", 0.971, 0.93, 0.5, 1.25), demo.Row("B", 0.98, 0.93, 1.0, None)]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(demo.make_table(rows))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert table == [
        ["A", "97.1 %", "93.0 %", "0.500", "1.250", "2.5×"],
        ["B", "98.0 %", "93.0 %", "1.000", "–", "–"],
    ]


def test_timing_takes_turns_over_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(clock)))
    batches = [(torch.tensor([i]), torch.tensor([i])) for i in range(7)]

    def step(name: str) -> demo.Step:
        return lambda x, _: calls.append((name, int(x)))

    medians = demo.interleaved_medians([step("a"), step("b")], batches, rounds=4)
    assert medians == [200.0, 200.0]  # one tick of a second for five steps
    assert [name for name, _ in calls] == (["a"] * 5 + ["b"] * 5) * 5
    seen = {name: [batch for who, batch in calls if who == name] for name in "ab"}
    assert seen["a"] == seen["b"]
    assert seen["a"][:8] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_hidden_layers_learn_beyond_the_control() -> None:
    dataset = demo.data.load("digits")
    rule = RULES["drtp"]
    frozen = demo._train(RULES[demo.CONTROL], rule.loss, dataset, epochs=15)
    assert demo._train(rule, rule.loss, dataset, epochs=15) > frozen + 0.01

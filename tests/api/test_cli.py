"""The command line: a run and its files, resuming bit for bit, Ctrl-C, and one sentence per mistake."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import TINY, run, train, weights
from rich.console import Console

import bpfree
from bpfree import __version__, checkpoint, data, progress
from bpfree.metrics import error_percent, summarize, write_metrics
from bpfree.registry import RULES, make_optimizer
from bpfree.results import BatchInfo, EpochResult


def result(epoch: int, accuracy: float | None = 0.9, loss: float = 0.5) -> EpochResult:
    return EpochResult(
        epoch, loss, 0.8, None if accuracy is None else loss, accuracy, 2.0, 30.0, 0.1
    )


def test_version() -> None:
    assert run("--version").stdout == f"bpfree {__version__}\n"


@pytest.mark.parametrize("rule", RULES)
def test_train_prints_a_line_for_each_epoch_and_leaves_its_files(rule: str, tmp_path: Path) -> None:
    net = ["--model", "gait1-16"] if rule == "gait" else []
    options = ["--rule", rule, "--epochs", "3", "--lr", "0.01", "--seed", "3", *net]
    done = train(tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert "1,437 training and 360 test images" in lines[0]
    assert lines[1].startswith("epoch 1/3  loss ")
    assert lines[-1].startswith("Test error ")
    assert "after epoch 3, mean of the last 3 epochs" in lines[-1]

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["lr"] == 0.01
    assert metrics["config"]["loss"] == RULES[rule].loss
    assert metrics["config"]["data_source"] == "scikit-learn"
    assert metrics["versions"]["torch"] == torch.__version__
    errors = [100 * (1 - epoch["test_accuracy"]) for epoch in metrics["history"]]
    assert metrics["final_test_error_percent"] == pytest.approx(errors[-1])
    assert metrics["mean_test_error_percent_last_10"] == pytest.approx(sum(errors) / 3)
    assert metrics["epochs_averaged"] == 3
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["test_accuracy"]) == metrics["history"][2]["test_accuracy"]
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt", "learning_curve.png", "metrics.csv", "metrics.json",
    ]  # fmt: skip


def test_training_learns(tmp_path: Path) -> None:
    train(tmp_path, "--epochs", "20", "--lr", "0.005", "--model", "fc1-64")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["history"][0]["test_accuracy"] < 0.85
    assert metrics["final_test_error_percent"] < 10


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_run_is_bit_identical(optimizer: str, tmp_path: Path) -> None:
    momentum = ["--momentum", "0.9"] if optimizer == "sgd" else []
    options = ["--optimizer", optimizer, "--lr", "0.01", "--dropout", "0.2", *momentum]
    assert train(tmp_path / "whole", *options, "--epochs", "2").exit_code == 0
    assert train(tmp_path / "parts", *options, "--epochs", "1").exit_code == 0
    first = weights(tmp_path / "parts")
    resumed = train(tmp_path / "parts", *options, "--epochs", "2", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Resuming after epoch 1." in resumed.stdout
    assert "epoch 2/2" in resumed.stdout
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(torch.equal(whole[name], first[name]) for name in whole)
    history = json.loads((tmp_path / "parts" / "metrics.json").read_text())["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]


def test_a_resumed_pepita_run_is_bit_identical_and_drops_its_learning_rate(tmp_path: Path) -> None:
    """Its paper's setting: SGD with momentum, ReLU, He uniform, no biases, drops at two epochs."""
    options = ["--rule", "pepita", "--activation", "relu", "--init", "he", "--no-bias"]
    options += ["--dropout", "0.1", "--no-input-dropout", "--optimizer", "sgd"]
    options += ["--momentum", "0.9", "--lr", "0.1", "--lr-drops", "1,3"]
    assert train(tmp_path / "whole", *options, "--epochs", "4").exit_code == 0
    assert train(tmp_path / "parts", *options, "--epochs", "2").exit_code == 0
    resumed = train(tmp_path / "parts", *options, "--epochs", "4", "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == {"1.weight", "4.weight"}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for run_ in ("whole", "parts"):
        history = json.loads((tmp_path / run_ / "metrics.json").read_text())["history"]
        assert [epoch["lr"] for epoch in history] == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("epochs", ["90,60", "60,60", "0,5", "ten", "5,", ""])
def test_learning_rate_drops_that_are_no_epochs(epochs: str, tmp_path: Path) -> None:
    refused = train(tmp_path / "run", "--lr-drops", epochs)
    assert refused.exit_code == 1
    assert f"lr-drops must be rising epochs from 1 on, such as 60,90, got '{epochs}'" in (
        refused.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_hinge_loss_resumes(tmp_path: Path) -> None:
    options = ["--rule", "bp", "--loss", "hinge", "--lr", "0.01"]
    assert train(tmp_path, *options, "--epochs", "1").exit_code == 0
    resumed = train(tmp_path, *options, "--epochs", "2", "--resume")
    assert resumed.exit_code == 0, resumed.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["loss"] == "hinge"
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]


def test_untied_urfb_with_half_the_connections_resumes(tmp_path: Path) -> None:
    options = ["--rule", "urfb", "--model", "simpnet", "--untied", "--connectivity", "0.5"]
    options += ["--optimizer", "sgd", "--momentum", "0.5", "--lr", "0.1"]
    assert train(tmp_path / "whole", *options, "--epochs", "2").exit_code == 0
    for epochs in ("1", "2"):
        resume = ["--resume"] if epochs == "2" else []
        run = train(tmp_path / "parts", *options, "--epochs", epochs, *resume)
        assert run.exit_code == 0, run.output
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole["0.weight"].dim() == 6
    assert (whole["0.weight"] == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_resumed_ekdaa_run_is_bit_identical(tmp_path: Path) -> None:
    """Its paper's net with signum, and every option of the rule; E and its momentum come along."""
    options = ["--rule", "ekdaa", "--model", "ekdaa", "--activation", "sign", "--optimizer", "sgd"]
    options += ["--momentum", "0.9", "--lr", "1e-4", "--batch-size", "200", "--max-norm", "50"]
    options += ["--beta", "0.8", "--gamma", "0.2", "--upsample", "average"]
    assert train(tmp_path / "whole", *options, "--epochs", "2").exit_code == 0
    for epochs in ("1", "2"):
        resume = ["--resume"] if epochs == "2" else []
        run = train(tmp_path / "parts", *options, "--epochs", epochs, *resume)
        assert run.exit_code == 0, run.output
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert list(whole) == ["0.weight", "3.weight", "6.weight", "9.weight", "11.weight"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    config = json.loads((tmp_path / "parts" / "metrics.json").read_text())["config"]
    assert config["rule_options"] == {
        "beta": 0.8, "gamma": 0.2, "upsample": "average", "max_norm": 50.0,
    }  # fmt: skip
    other = [*options[:-1], "nearest"]
    refused = train(tmp_path / "parts", *other, "--epochs", "3", "--resume")
    assert "was trained with rule_options" in refused.stderr


def test_a_run_of_gait_with_every_option_goes_on(tmp_path: Path) -> None:
    """The inverses that it keeps are no state: a resumed run makes them anew."""
    options = ["--rule", "gait", "--model", "gait1-16", "--orthogonal-penalty", "0.5"]
    options += [
        "--off-diagonal",
        "--form",
        "literal",
        "--vanilla",
        "--dtype",
        "float64",
        "--lr",
        "1e-3",
    ]
    for epochs in ("1", "2"):
        resume = ["--resume"] if epochs == "2" else []
        run = train(tmp_path, *options, "--epochs", epochs, *resume)
        assert run.exit_code == 0, run.output
    assert weights(tmp_path)["3.weight"].shape == (16, 16)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["rule_options"] == {
        "orthogonal_penalty": 0.5, "off_diagonal": True, "form": "literal", "normalised": False,
    }  # fmt: skip
    assert metrics["history"][1]["train_loss"] < metrics["history"][0]["train_loss"]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path, "--epochs", "1")
    before = weights(tmp_path)
    again = train(tmp_path, "--epochs", "1", "--resume")
    assert again.exit_code == 0
    assert "after epoch 1" in again.stdout
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_existing_run_is_neither_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    refused = train(tmp_path / "new", "--resume")
    assert refused.exit_code == 1
    assert "holds no run to resume" in refused.stderr
    train(tmp_path / "old", "--epochs", "1")
    refused = train(tmp_path / "old", "--epochs", "1")
    assert refused.exit_code == 1
    assert "holds a run already: add --resume" in refused.stderr
    refused = train(tmp_path / "old", "--epochs", "2", "--resume", "--lr", "0.5")
    assert refused.exit_code == 1
    assert "was trained with lr 0.00015, not 0.5: resume it with the same" in refused.stderr


def test_a_checkpoint_that_training_did_not_write(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    checkpoint.save(tmp_path / "checkpoint.pt", bpfree.Shallow(model), epoch=0)
    refused = train(tmp_path, "--resume")
    assert refused.exit_code == 1
    assert "checkpoint.pt was not written by bpfree train" in refused.stderr


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path: Path) -> None:
    command = ["train", *TINY, "--out", str(tmp_path / "run"), "--dropout", "0.1"]
    program = [sys.executable, "-c", "from bpfree.cli import app; app()"]
    process = subprocess.Popen(
        [*program, *command, "--epochs", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "To go on, give the same command with --resume." in err
    assert "Traceback" not in err
    assert "Test error" in out
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["epoch"] >= 2
    assert (tmp_path / "run" / "learning_curve.png").exists()

    last = str(saved["epoch"] + 1)
    assert run(*command, "--epochs", last, "--resume").exit_code == 0
    assert train(tmp_path / "whole", "--dropout", "0.1", "--epochs", last).exit_code == 0
    resumed, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_in_the_first_epoch_leaves_a_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, info: BatchInfo) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress.LineReporter, "on_batch", interrupt)
        stopped = train(tmp_path / "run", "--epochs", "1")
    assert stopped.exit_code == 130
    assert "holds a checkpoint after epoch 0" in stopped.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["history"] == []
    assert train(tmp_path / "run", "--epochs", "1", "--resume").exit_code == 0
    assert train(tmp_path / "whole", "--epochs", "1").exit_code == 0
    resumed, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_cifar_is_standardised_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 3, 32, 32, generator=generator), torch.arange(20) % 10
    seen: list[float] = []

    class Recorded(data.Dataset):
        def to(
            self, device: torch.device | str, dtype: torch.dtype = torch.float32
        ) -> data.Dataset:
            seen.append(float(self.train_x.mean()))
            return super().to(device, dtype)

    dataset = Recorded("cifar-10", x, y, x, y, 10, "here")
    monkeypatch.setattr("bpfree.data.load", lambda *_: dataset)
    for name, option in (("a", []), ("b", ["--no-standardize"])):
        done = train(tmp_path / name, "--data", "cifar-10", "--epochs", "1", *option)
        assert done.exit_code == 0, done.output
    assert seen[0] == pytest.approx(0, abs=1e-5)
    assert seen[1] == pytest.approx(0.5, abs=0.05)


def test_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert train(tmp_path, "--epochs", "1", "--threads", "1").exit_code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_doctor_hands_over_to_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        return 1

    monkeypatch.setattr("bpfree_kernels.doctor.main", main)
    assert run("doctor").exit_code == 1
    assert run("doctor", "--json").exit_code == 1
    assert calls == [[], ["--json"]]


def test_a_missing_extra_is_named_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = r'install it with pip install "bpfree-kernels[train]".'
    for module in ("sklearn.datasets", "matplotlib"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            refused = train(tmp_path)
        assert refused.exit_code == 1
        assert f"needs the package {module.split('.')[0]}: {advice}" in refused.stderr
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "bpfree.cli")
    with pytest.raises(SystemExit, match="needs the package typer"):
        importlib.import_module("bpfree.cli")


def test_summary_averages_the_last_ten_epochs() -> None:
    summary = summarize([result(epoch, accuracy=epoch / 100) for epoch in range(1, 21)])
    assert (summary.epochs, summary.averaged, summary.seconds) == (20, 10, 40.0)
    assert summary.test_error == pytest.approx(80)
    assert summary.mean_test_error == pytest.approx(100 - sum(range(11, 21)) / 10)


def test_metrics_of_a_diverged_run_are_valid_json(tmp_path: Path) -> None:
    write_metrics(tmp_path, {}, [result(1, loss=float("nan"), accuracy=None)])
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["history"][0]["train_loss"] is None
    assert document["final_test_error_percent"] is None
    assert str(error_percent(None)) == "nan"


def test_the_bar_shows_loss_error_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with progress.BarReporter(console, epochs=2, start_epoch=1, batches=3) as bar:
        for batch in (1, 2, 3):
            bar.on_batch(BatchInfo(2, batch, 3, 10, torch.tensor(0.25)))
        bar.on_epoch(result(2))
    shown = screen.getvalue()
    assert "epoch 2/2" in shown
    assert "test error 10.00 %" in shown
    assert "30 samples/s" in shown


def test_optimizers_take_torchs_defaults_unless_told() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert make_optimizer([parameter], "adamw", 0.1).defaults["weight_decay"] == 1e-2
    sgd = make_optimizer([parameter], "sgd", 0.1, momentum=0.9, weight_decay=1e-3).defaults
    assert (sgd["momentum"], sgd["weight_decay"], sgd["lr"]) == (0.9, 1e-3, 0.1)
    assert (
        make_optimizer([parameter], "adam", 0.1, weight_decay=0.2).defaults["weight_decay"] == 0.2
    )


@pytest.mark.slow
@pytest.mark.skipif("BPFREE_DATA" not in os.environ, reason="BPFREE_DATA names no data sets")
def test_one_epoch_on_the_real_mnist(tmp_path: Path) -> None:
    done = train(tmp_path, "--data", "mnist", "--epochs", "1", "--lr", "1e-3")
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["final_test_error_percent"] < 25

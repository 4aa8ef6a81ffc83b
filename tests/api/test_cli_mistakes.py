"""The command line: one sentence for each mistake, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import run, train, weights


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--rule", "magic"],
            "rule must be one of drtp, pepita, urfb, frfb, ekdaa, gait, shallow, bp",
        ),
        (["--model", "vgg"], "model must be fc<L>-<H>"),
        (["--data", "svhn"], "data set must be one of digits, mnist"),
        (
            ["--data", "mnist", "--data-dir", "nowhere"],
            "nowhere, given by data_dir (--data-dir), is not",
        ),
        (["--loss", "l7"], "loss must be one of"),
        (["--activation", "swish"], "activation must be one of tanh"),
        (["--optimizer", "lion"], "optimizer must be one of adam, adamw, sgd, got 'lion'"),
        (["--momentum", "0.9"], "momentum has no meaning for adam, only for sgd"),
        (["--dropout", "1"], "dropout must lie in [0, 1), got 1.0"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--untied"], "untied needs a model with convolutions, got 'fc1-16'"),
        (["--connectivity", "0.5"], "connectivity has no meaning for DRTP, only for URFB, FRFB"),
        (["--rule", "urfb", "--connectivity", "0"], "connectivity must lie in (0, 1], got 0.0"),
        (["--beta", "0.5"], "beta has no meaning for DRTP, only for EKDAA"),
        (["--rule", "urfb", "--gamma", "0.1"], "gamma has no meaning for URFB, only for EKDAA"),
        (["--rule", "ekdaa", "--connectivity", "1"], "connectivity has no meaning for EKDAA, only"),
        (["--rule", "ekdaa", "--upsample", "x"], "upsample must be one of 'argmax', 'nearest'"),
        (["--rule", "ekdaa", "--max-norm", "0"], "max_norm must be positive and finite, got 0.0"),
        (["--rule", "gait"], "GAITProp needs an inverse of every layer but the first"),
        (["--rule", "gait", "--vanilla"], "--vanilla) must be true unless form is 'literal'"),
        (["--rule", "gait", "--form", "x"], "form must be one of 'difference', 'literal', got 'x'"),
        (["--off-diagonal"], "off_diagonal has no meaning for DRTP, only for GAIT-prop"),
        (["--activation", "sign"], "DRTP needs the derivative of every activation, but that of"),
    ],
)
def test_a_mistake_gets_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BPFREE_DATA", raising=False)
    refused = train(tmp_path / "run", "--epochs", "1", *arguments)
    assert refused.exit_code == 1
    assert sentence in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_out_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = train(tmp_path / "file" / "run")
    assert refused.exit_code == 1
    assert "cannot be made" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    for refused in (train(tmp_path, "--device", "cuda"), run("demo", "--device", "cuda")):
        assert refused.exit_code == 1
        assert "torch sees no CUDA device here: use --device cpu." in refused.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rule", "drtp", "--model", "gait1-16"], "DRTP trains Linear, Conv2d, but layer '3'"),
        (
            ["--rule", "gait", "--model", "gait2-16", "--optimizer", "sgd", "--lr", "1e9"],
            "cannot be inverted in torch.float32",
        ),
    ],
    ids=str,
)
def test_a_sentence_where_a_rule_cannot_train_a_net(
    options: list[str], sentence: str, tmp_path: Path
) -> None:
    refused = run("train", "--out", str(tmp_path / "run"), "--epochs", "2", *options)
    assert refused.exit_code == 1
    assert sentence in refused.stderr
    assert isinstance(refused.exception, SystemExit)


def test_a_run_in_float64(tmp_path: Path) -> None:
    assert train(tmp_path / "wide", "--epochs", "1", "--dtype", "float64").exit_code == 0
    assert {weight.dtype for weight in weights(tmp_path / "wide").values()} == {torch.float64}
    refused = train(tmp_path / "half", "--dtype", "float16")
    assert refused.exit_code == 1
    assert "dtype must be one of float32, float64, got 'float16'." in refused.stderr

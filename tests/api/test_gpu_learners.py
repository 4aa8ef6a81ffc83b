"""Every rule on a GPU: the same learning as on the CPU, from the first batch to a resumed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import invertible_nets
import pytest
import torch
from nets import conv, conv_batch, dense, dense_batch
from torch import Tensor, nn

import bpfree
from bpfree import checkpoint
from bpfree.registry import RULES, make_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

NETS: dict[str, tuple[Callable[..., nn.Sequential], Callable[..., tuple[Tensor, Tensor]]]] = {
    "dense": (dense, dense_batch),
    "conv": (conv, conv_batch),
}


INVERTIBLE = {"dense": invertible_nets.dense, "conv": invertible_nets.conv}


def _model(rule: str, net: str) -> nn.Sequential:
    return INVERTIBLE[net](torch.float32) if rule == "gait" else NETS[net][0](dtype=torch.float32)


def _learner(rule: str, net: str, device: str, optimizer: str = "sgd") -> bpfree.Learner:
    model = _model(rule, net).to(device)
    chosen = RULES[rule]
    made = make_optimizer(model.parameters(), optimizer, 0.05)
    return chosen.learner(model, made, loss=chosen.loss, seed=3)


def _batch(rule: str, net: str, device: str) -> tuple[Tensor, Tensor]:
    if rule == "gait":
        x, y = invertible_nets.batch_for(_model(rule, net))
    else:
        x, y = NETS[net][1](dtype=torch.float32)
    return x.to(device), y.to(device)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_learns_as_on_the_cpu(rule: str, net: str, optimizer: str) -> None:
    on_cpu, on_gpu = (_learner(rule, net, device, optimizer) for device in ("cpu", "cuda"))
    for _ in range(3):
        here, there = (
            on_cpu.step(*_batch(rule, net, "cpu")),
            on_gpu.step(*_batch(rule, net, "cuda")),
        )
        torch.testing.assert_close(there.loss.cpu(), here.loss, rtol=1e-3, atol=1e-4)
    for (name, weight), other in zip(
        on_cpu.model.named_parameters(), on_gpu.model.parameters(), strict=True
    ):
        assert other.is_cuda
        torch.testing.assert_close(other.cpu(), weight, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_of_a_gpu_goes_on_there(rule: str, net: str, tmp_path: Path) -> None:
    straight, resumed = (_learner(rule, net, "cuda", "adam") for _ in range(2))
    data = _batch(rule, net, "cuda")
    straight.fit(data, epochs=1, batch_size=2)
    checkpoint.save(tmp_path / "run.pt", straight, epoch=1, history=[])
    checkpoint.restore(resumed, checkpoint.load(tmp_path / "run.pt"))
    torch.manual_seed(1)
    straight.fit(data, epochs=1, batch_size=2, start_epoch=1)
    torch.manual_seed(1)
    resumed.fit(data, epochs=1, batch_size=2, start_epoch=1)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_model_may_move_between_steps(rule: str) -> None:
    """A learner follows its model from the CPU to the GPU."""
    learner = _learner(rule, "dense", "cpu")
    x, y = _batch(rule, "dense", "cpu")
    learner.step(x, y)
    learner.model.to("cuda")
    result = learner.step(x.cuda(), y.cuda())
    assert result.output.is_cuda
    assert bool(result.loss.isfinite())

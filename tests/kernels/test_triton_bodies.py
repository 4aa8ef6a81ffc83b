"""What is Triton's own: tile functions, both ways to launch a step, half precision, scalars on the device.

The formulas themselves are tested for every backend alike in `test_drtp`, `test_classifier` and
`test_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from bpfree_kernels import SGD, Adam, AdamW, backends
from bpfree_kernels.reference import classifier as reference_classifier
from bpfree_kernels.reference import drtp as reference_drtp
from bpfree_kernels.reference.activations import activate as reference_activate
from bpfree_kernels.triton import classifier, dense, drtp, launch, optimizers, pepita, update
from bpfree_kernels.update import UpdateRule

STATUS = backends.status("triton")
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
RULES = (SGD(0.1), SGD(0.1, 0.9, 0.01), SGD(0.1, 0.9, 0.01, nesterov=True),
         Adam(0.01, (0.8, 0.99), weight_decay=0.1), AdamW(0.01, weight_decay=0.1))  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation, as a part of the largest value wanted."""
    wanted = wanted.double().cpu()
    return float((got.double().cpu() - wanted).abs().max() / wanted.abs().max())


def activate(z: Tensor, activation: str, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """f(z) and f′(z) by the tile function: the signal of a feedback of ones is f′."""
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    y, derivative = drtp.drtp_signal(z[None], torch.ones_like(z[None]), labels, activation, slope)
    return y[0], derivative[0]


def spread() -> Tensor:
    """Numbers of every size and sign, ±1e4 and 0 among them."""
    sizes = torch.cat([torch.logspace(-30, 4, 700), torch.linspace(0, 12, 800)])
    return torch.cat([sizes, -sizes]).to(DEVICE)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_are_accurate_at_every_size(activation: str) -> None:
    z = spread()
    y, derivative = activate(z, activation)
    exact = getattr(torch, activation)(z.double())
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    relative = ((y.double() - exact) / exact)[normal].abs()
    assert relative.max() < 1e-6
    assert (y.double() - exact)[~normal].abs().max() < 1e-37
    slope = 1 - exact**2 if activation == "tanh" else exact * (1 - exact)
    assert (derivative.double() - slope).abs().max() < 5e-7


def test_saturated_tanh_is_flat() -> None:
    z = torch.tensor([20.0, 30.0, 88.0, 89.0, 1e4, 3e38, math.inf], device=DEVICE)
    for sign in (1, -1):
        y, derivative = activate(sign * z, "tanh")
        assert torch.equal(y, torch.full_like(z, sign))
        assert torch.equal(derivative, torch.zeros_like(z))


@triton.jit
def one_minus_power_kernel(out_ptr, log_beta, counts_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + places)
    tl.store(out_ptr + places, optimizers.one_minus_power(log_beta, counts))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_correction_keeps_its_digits(beta: float) -> None:
    counts = torch.tensor(
        [1, 2, 3, 5, 10, 30, 100, 1000, 3000, 1e4, 1e5, 1e6, 2**24, 7, 8, 9], device=DEVICE
    )
    out = torch.empty_like(counts)
    log_beta = math.log(beta) if beta else -math.inf
    launch.launch(one_minus_power_kernel, (1,), out, log_beta, counts, 16, on=out)
    exact = -torch.special.expm1(counts.double() * log_beta)
    assert ((out.double() - exact) / exact).abs().max() < 5e-7


def torch_optimizer(rule: UpdateRule, param: Tensor) -> torch.optim.Optimizer:
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            [param], rule.lr, rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov
        )
    kind = torch.optim.AdamW if isinstance(rule, AdamW) else torch.optim.Adam
    return kind([param], rule.lr, rule.betas, rule.eps, rule.weight_decay)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_those_of_torch_optim(rule: UpdateRule) -> None:
    param = random(1500)
    exact = param.double().requires_grad_()
    optimizer, state = torch_optimizer(rule, exact), rule.new_param_state(param)
    for count in range(4):
        gradient = random(1500, seed=count)
        exact.grad = gradient.double()
        optimizer.step()
        update.apply_update(
            param, gradient, 1.0, math.inf, *rule.args(), state.m, state.v, state.step
        )
        if state.step is not None:
            state.step += 1
    assert error(param, exact.detach()) < 3e-7


@pytest.mark.parametrize("rule", [Adam(0.01), AdamW(0.01)], ids=str)
def test_scalars_on_the_device_equal_numbers(rule: UpdateRule) -> None:
    """A step and a learning rate that the kernel reads itself, against ones read for it."""
    start, gradient, count = random(300), random(300, seed=1), 6.0
    results = []
    for on_device in (True, False):
        param, m, v = start.clone(), random(300, seed=2), random(300, seed=3).abs()
        args = rule.args()
        kernel_rule, epilogue = optimizers.make_rule(args, param.device)
        target = optimizers.Target(param, m, v, count)
        if on_device:
            lr = torch.tensor([0.01], dtype=torch.float64, device=DEVICE)
            kernel_rule, _ = optimizers.make_rule(args._replace(lr_tensor=lr), param.device)
            step = torch.tensor(count, device=DEVICE)
            target = optimizers.make_target(param, m, v, step)
        assert (kernel_rule.lr_ptr is not None) == (target.step_ptr is not None) == on_device
        launch.launch(
            update.apply_kernel, (1,), gradient, None, target, kernel_rule, 1.0, math.inf, on=param,
            **launch.sizes(size=300), count=0, EPILOGUE=epilogue, BLOCK=update.BLOCK, SUMS=1,
        )  # fmt: skip
        results.append((param, m, v))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_scalars_elsewhere_are_read_on_the_host() -> None:
    gpu = torch.device("cuda", 0)
    assert optimizers.make_rule(Adam(torch.tensor(0.5)).args(), gpu)[0].lr == 0.5
    target = optimizers.make_target(torch.empty(1, device="meta"), None, None, torch.tensor(3.0))
    assert (target.step, target.step_ptr) == (3.0, None)


def step_args(rule: UpdateRule, weight: Tensor, bias: Tensor) -> list[Any]:
    """The rule and fresh state of a layer, in schema order."""
    state = rule.new_state(weight, bias)
    of_weight, of_bias = state.weight, state.bias
    return [
        *rule.args(),
        of_weight.m, of_weight.v, of_weight.step, of_bias.m, of_bias.v, of_bias.step,
    ]  # fmt: skip


def drtp_step(
    body: Callable[..., Tensor], batch: int, rule: UpdateRule, dtype: torch.dtype
) -> list[Tensor]:
    """Output, weight and bias of one step with 37 inputs, 21 units and 4 classes, and one bad label."""
    x, weight = random(batch, 37, dtype=dtype), random(21, 37, dtype=dtype, seed=1) / 4
    bias, feedback = random(21, dtype=dtype, seed=2), random(4, 21, dtype=dtype, seed=3)
    labels = torch.arange(batch, dtype=torch.int32, device=DEVICE) % 5
    args = step_args(rule, weight, bias)
    y = body(x, weight, bias, feedback, labels, "tanh", 0.0, *args)
    return [y, weight, bias]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_launch_and_two_agree(rule: UpdateRule, monkeypatch: pytest.MonkeyPatch) -> None:
    one = drtp_step(drtp.drtp_linear_step, 40, rule, torch.float32)
    monkeypatch.setattr(drtp, "step_blocks", lambda *_: None)
    two = drtp_step(drtp.drtp_linear_step, 40, rule, torch.float32)
    assert max(map(error, one, two)) < 1e-6


@pytest.mark.parametrize("batch", [1, 32, 33, 128, 129, 200])
def test_every_batch_block(batch: int) -> None:
    """Batches on both sides of each block's limit, the last two in two launches."""
    got = drtp_step(drtp.drtp_linear_step, batch, SGD(0.01, 0.9), torch.float32)
    wanted = drtp_step(reference_drtp.drtp_linear_step, batch, SGD(0.01, 0.9), torch.float32)
    assert max(map(error, got, wanted)) < 1e-6


def test_many_units_take_taller_tiles() -> None:
    x = random(40, 8)
    assert {dense.step_blocks(x, units).BLOCK_H for units in (1000, 3000)} == {16, 32}
    assert dense.step_blocks(random(129, 8), 1000) is None


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("batch", [20, 150])
def test_half_precision_accumulates_in_float32(half: torch.dtype, batch: int) -> None:
    """Against float32 from the same inputs: two roundings of the result, none of the sums."""
    rule = SGD(0.01)
    got = drtp_step(drtp.drtp_linear_step, batch, rule, half)
    inputs = [random(batch, 37, dtype=half), random(21, 37, dtype=half, seed=1) / 4]
    more = [random(21, dtype=half, seed=2), random(4, 21, dtype=half, seed=3)]
    x, weight, bias, feedback = (tensor.float() for tensor in (*inputs, *more))
    labels = torch.arange(batch, device=DEVICE) % 5
    args = step_args(rule, weight, bias)
    y = reference_drtp.drtp_linear_step(x, weight, bias, feedback, labels, "tanh", 0.0, *args)
    bound = 2 * torch.finfo(half).eps
    assert [float(e) < bound for e in map(error, got, (y, weight, bias))] == [True] * 3


def two_pass_updates(
    x: Tensor, weights: list[Tensor], change: Tensor, activation: str
) -> list[Tensor]:
    """Gradients of PEPITA's hidden layers as the paper prints them, in the dtype of what is given."""
    gradients, h, h_err = [], x, x + change
    for weight in weights:
        pre = h_err
        h, h_err = (reference_activate(t @ weight.t(), activation, 0.0)[0] for t in (h, h_err))
        gradients.append((h - h_err).t() @ pre / x.shape[0])
    return gradients


def difference_updates(
    x: Tensor, weights: list[Tensor], error: Tensor, feedback: Tensor, activation: str
) -> list[Tensor]:
    """The same by the kernels, in the difference form."""
    gradients, h, pre, change = [], x, x + error @ feedback, error
    rows: Tensor | None = feedback
    for weight in weights:
        z, h = dense.dense_forward(h, weight, None, activation, 0.0)
        gradients.append(torch.empty_like(weight))
        grads = gradients[-1], None, False
        change = pepita.pepita_linear_grad(
            z, pre, change, rows, None, weight, activation, 0.0, *grads
        )
        pre, rows = h + change, None
    return gradients


@pytest.mark.parametrize("size", [1.0, 0.01])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_the_difference_form_is_worth(activation: str, size: float) -> None:
    """bfloat16 updates of two hidden layers stay near the exact ones, however small the error is.

    Subtracting the outputs of two bfloat16 passes leaves mostly rounding, and nothing else of an
    error a hundred times smaller.
    """
    half = torch.bfloat16
    x, labels = random(40, 64, dtype=half), torch.arange(40, device=DEVICE) % 10
    output_error = random(40, 10, seed=1).softmax(1)
    output_error[range(40), labels] -= 1
    output_error = (size * output_error).to(half)
    weights = [(random(48, width, seed=width) * (2 / width) ** 0.5).to(half) for width in (64, 48)]
    feedback = (0.05 * (2 / 64) ** 0.5 * random(10, 64, seed=2)).to(half)
    wide = [weight.double() for weight in weights]
    exact = two_pass_updates(
        x.double(), wide, output_error.double() @ feedback.double(), activation
    )
    literal = two_pass_updates(x, weights, output_error @ feedback, activation)
    ours = difference_updates(x, weights, output_error, feedback, activation)
    for mine, theirs, wanted in zip(ours, literal, exact, strict=True):
        errors = [float((g.double() - wanted).norm() / wanted.norm()) for g in (mine, theirs)]
        assert errors[0] < 0.08
        assert errors[1] > (0.2 if size == 1 else 2)


def classify(
    module: Any, classes: int, loss: str, dtype: torch.dtype, inputs: int = 9
) -> list[Tensor]:
    """Output, error, loss, weight and bias after one step of 18 samples, two of them unlabelled."""
    x, weight = random(18, inputs, dtype=dtype), random(classes, inputs, dtype=dtype, seed=1)
    bias = 10 * random(classes, dtype=dtype, seed=2)
    labels = torch.arange(18, device=DEVICE) * 7 % classes
    labels[3], labels[5] = -1, classes
    args = step_args(SGD(0.5), weight, bias)
    options = (0.5, 0.25) if loss == "hinge" else (0.0, 0.0)
    outputs = module.classifier_step(x, weight, bias, labels, loss, *options, *args)
    return [*outputs, weight, bias]


@pytest.mark.parametrize("classes", [1, 16, 17, 129, 1500])
@pytest.mark.parametrize("loss", ["ce", "bce", "mse", "hinge"])
def test_few_and_many_classes(classes: int, loss: str) -> None:
    """Up to 16 and 128 classes in one block, more by rows of 1024 at a time."""
    got = classify(classifier, classes, loss, torch.float32)
    wanted = classify(reference_classifier, classes, loss, torch.float32)
    atol = 1e-6 * wanted[2].abs().max().item()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("classes", [10, 130])
def test_half_precision_classifier(half: torch.dtype, classes: int) -> None:
    got = classify(classifier, classes, "ce", half)
    wanted = classify(reference_classifier, classes, "ce", torch.float32)
    assert max(map(error, got, wanted)) < 8 * torch.finfo(half).eps  # inputs are rounded as well


def test_small_losses_keep_their_digits() -> None:
    """log(1 + e^−|z|) of a confident output is far below 1."""
    x = torch.tensor([[8.0], [12.0], [16.0], [30.0]], device=DEVICE)
    weight = torch.ones(1, 1, device=DEVICE)
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    args = step_args(SGD(0.0), weight, weight[0])
    *_, loss = classifier.classifier_step(x, weight, None, labels, "bce", 0.0, 0.0, *args)
    exact = torch.log1p(torch.exp(-x.double()))[:, 0]
    assert ((loss.double() - exact) / exact).abs().max() < 3e-6


@pytest.mark.parametrize(
    ("batch", "inputs", "units"), [(3, 0, 5), (150, 0, 5), (3, 4, 0), (150, 4, 0)]
)
def test_layers_without_inputs_or_units(batch: int, inputs: int, units: int) -> None:
    results = []
    for body in (drtp.drtp_linear_grad, reference_drtp.drtp_linear_grad):
        weight, bias, feedback = random(units, inputs), random(units), random(2, units)
        grads = torch.full_like(weight, math.nan), torch.full_like(bias, math.nan)
        labels = torch.ones(batch, dtype=torch.int64, device=DEVICE)
        x = random(batch, inputs)
        y = body(x, weight, bias, feedback, labels, "sigmoid", 0.0, *grads, False)
        results.append((y, *grads))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_empty_map_has_an_empty_signal() -> None:
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    y, post = drtp.drtp_signal(random(0, 3, 4), random(2, 3, 4), labels, "tanh", 0.0)
    assert y.shape == post.shape == (0, 3, 4)


def test_an_empty_batch_has_empty_outputs() -> None:
    x, few, many = random(0, 4), random(3, 4), random(200, 4)
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    z, y = dense.dense_forward(x, few, None, "tanh", 0.0)
    assert z.shape == y.shape == (0, 3)
    for weight in (few, many):
        outputs = classifier.classifier_forward(x, weight, None, labels, "ce", 0.0, 0.0)
        assert [tuple(t.shape) for t in outputs] == [(0, len(weight)), (0, len(weight)), (0,)]
    changed = pepita.pepita_difference(random(0, 2, 3), random(0, 5), random(5, 2, 3), "relu", 0.0)
    assert changed.shape == (0, 2, 3)


def test_float64_is_refused() -> None:
    x = random(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        update.apply_update(x, x.clone(), 1.0, math.inf, *SGD(0.1).args(), None, None, None)


@pytest.fixture
def tf32_switch() -> Iterator[Any]:
    """Where torch keeps its switch for TF32, put back afterwards."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


def test_tf32_follows_torch(tf32_switch: Any) -> None:
    x, half = random(1), random(1, dtype=torch.float16)
    allowed = "ieee" if torch.version.hip else "tf32"  # ROCm's float32 matrix units need no TF32
    for name, off, on in (("fp32_precision", "ieee", "tf32"), ("allow_tf32", False, True)):
        for value, wanted in ((off, "ieee"), (on, allowed)):
            setattr(tf32_switch, name, value)
            assert (launch.precision(x), launch.precision(half)) == (wanted, "ieee")


def test_sizes_tell_the_alignment() -> None:
    assert launch.sizes(inputs=1000, outputs=10) == {
        "inputs": 125, "INPUTS_BY": 8, "outputs": 5, "OUTPUTS_BY": 2,
    }  # fmt: skip

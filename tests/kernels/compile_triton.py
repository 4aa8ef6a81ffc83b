"""Compile the shipped kernels for one GPU without having it, and print what came out as JSON.

    python -m tests.kernels.compile_triton sm_90 blocks:float32 blocks:tf32 branches:bfloat16

Runs the library's own bodies on tensors without memory; each launch compiles instead. So what is checked
is what ships: the same block sizes, options and argument types. A process of its own, because kernels
defined under TRITON_INTERPRET=1 do not compile, and because a process has one target.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bpfree_kernels.activations import ACTIVATIONS
from bpfree_kernels.geometry import Geometry, Pooling
from bpfree_kernels.triton import (
    classifier,
    conv,
    dense,
    drtp,
    ekdaa,
    local_conv,
    pepita,
    pepita_pool,
    update,
)
from bpfree_kernels.update import UpdateArgs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

ADAM = UpdateArgs("adam", 0.1, 0.9, 0.999, 1e-8, 0.0, False, None)
RULES = (
    UpdateArgs("sgd", 0.1, 0.0, 0.0, 0.0, 0.1, False, None),
    UpdateArgs("sgd", 0.1, 0.9, 0.0, 0.0, 0.1, False, None),
    UpdateArgs("sgd", 0.1, 0.9, 0.0, 0.0, 0.1, True, None),
    UpdateArgs("adamw", 0.1, 0.9, 0.999, 1e-8, 0.1, False, torch.empty((), device="meta")),
)

SAME_SIZE = Geometry(1, 1, 1, 1, 1, 1, 1)
"""Windows of 3 × 3 that keep the size of a map."""

HALVES = Pooling(2, 2, 2, 2, 0, 0, 1, 1)
"""Windows of a max pooling that do not overlap."""

THIRDS = Pooling(3, 3, 2, 2, 1, 1, 1, 1)
"""Windows that do."""


class _Driver:
    """Stands in for a GPU driver: names a target, launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _labels(batch: int) -> Tensor:
    return _new(batch, dtype=torch.int64)


def _state(rule: UpdateArgs, *params: Tensor) -> list[Tensor | None]:
    """What a rule remembers, in schema order."""
    state: list[Tensor | None] = []
    for param in params:
        adam = rule.optimizer != "sgd"
        state.append(param if adam or rule.beta1 else None)
        state.append(param if adam else None)
        state.append(_new(dtype=torch.float32) if adam else None)
    return state


def _layer(batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        _new(batch, inputs, dtype=dtype),
        _new(outputs, inputs, dtype=dtype),
        _new(outputs, dtype=dtype),
    )


def _pepita_step(
    batch: int, inputs: int, outputs: int, classes: int | None, dtype: torch.dtype,
    activation: str = "tanh", rule: UpdateArgs = ADAM,
) -> None:  # fmt: skip
    """A hidden layer of PEPITA; the first one, with a feedback matrix, if `classes` are given."""
    pre, weight, bias = _layer(batch, inputs, outputs, dtype)
    z = _new(batch, outputs, dtype=dtype)
    feedback = None if classes is None else _new(classes, inputs, dtype=dtype)
    change = pre if classes is None else _new(batch, classes, dtype=dtype)
    pepita.pepita_linear_step(
        z, pre, change, feedback, z, weight, bias, activation, 0.5,
        *rule, *_state(rule, weight, bias),
    )  # fmt: skip


def _local_conv(
    batch: int, channels: int, outputs: int, dtype: torch.dtype, rule: UpdateArgs = ADAM,
    *, masked: bool = True, order: torch.memory_format = torch.contiguous_format,
    place: Geometry = SAME_SIZE,
) -> None:  # fmt: skip
    """A locally connected layer of 16 × 16 maps and 3 × 3 windows: both passes and a step."""
    x = _new(batch, channels, 16, 16, dtype=dtype).to(memory_format=order)
    signal = _new(batch, outputs, 16, 16, dtype=dtype).to(memory_format=order)
    weight = _new(16, 16, 3, 3, channels // place.groups, outputs, dtype=dtype)
    bias = _new(16, 16, outputs, dtype=dtype)
    mask = _new(*weight.shape, dtype=torch.bool) if masked else None
    local_conv.local_conv_forward(x, weight, bias, "tanh", 0.0, *place)
    local_conv.local_conv_feedback(signal, weight, x, "tanh", 0.0, 16, 16, *place)
    local_conv.local_conv_step(
        signal, x, weight, bias, weight, mask, mask, 0.5, *place, *rule,
        *_state(rule, weight, bias, weight),
    )  # fmt: skip


def _ekdaa(
    batch: int, channels: int, outputs: int, dtype: torch.dtype, rule: UpdateArgs = ADAM,
    *, pool: Pooling = HALVES, upsample: str = "argmax", activation: str = "tanh",
    order: torch.memory_format = torch.contiguous_format, place: Geometry = SAME_SIZE,
) -> None:  # fmt: skip
    """A convolution of 16 × 16 maps pooled from 32 × 32 and 3 × 3 windows: errors below, and a step."""
    z = _new(batch, channels, 32, 32, dtype=dtype).to(memory_format=order)
    x = _new(batch, channels, 16, 16, dtype=dtype).to(memory_format=order)
    error = _new(batch, outputs, 16, 16, dtype=dtype).to(memory_format=order)
    weight = _new(outputs, channels // place.groups, 3, 3, dtype=dtype)
    bias = _new(outputs, dtype=dtype)
    of_below = (upsample, *pool, activation, 0.5)
    ekdaa.ekdaa_conv_error(error, weight, z, 0.9, *place, 16, 16, *of_below)
    ekdaa.ekdaa_error(x, z, 0.9, *of_below)
    ekdaa.ekdaa_linear_error(
        _new(batch, outputs, dtype=dtype), _new(outputs, channels, dtype=dtype),
        _new(batch, channels, dtype=dtype), 0.9, activation, 0.5,
    )  # fmt: skip
    conv.conv_step(
        error, x, weight, bias, weight, 0.5, 0.1, *place, *rule, *_state(rule, weight, bias, weight)
    )


def _every_block(dtype: torch.dtype, odd: int = 0) -> None:
    """Reach every entry of the tables of block sizes, with the heaviest epilogue.

    `odd` makes the rows of every tensor that much longer: with 1, they are not aligned any more.
    """
    for batch in (32, 64, 128, 300):
        for outputs in (1000 + odd, 4096 + odd):
            x, weight, bias = _layer(batch, 784 + odd, outputs, dtype)
            drtp.drtp_linear_step(
                x, weight, bias, _new(10, outputs, dtype=dtype), _labels(batch), "tanh", 0.0,
                *ADAM, *_state(ADAM, weight, bias),
            )  # fmt: skip
            _pepita_step(batch, 784 + odd, outputs, 10 if outputs < 2048 else None, dtype)
    for classes in (10 + odd, 100 + odd, 1000 + odd):
        x, weight, bias = _layer(100, 1000 + odd, classes, dtype)
        state = _state(ADAM, weight, bias)
        classifier.classifier_step(x, weight, bias, _labels(100), "ce", 0.0, 0.0, *ADAM, *state)
    for size in (100 + odd, 5000 + odd):
        z, feedback = _new(60, size, dtype=dtype), _new(10, size, dtype=dtype)
        drtp.drtp_signal(z, feedback, _labels(60), "tanh", 0.0)
    pepita.pepita_difference(z, _new(60, 10, dtype=dtype), feedback, "tanh", 0.0)
    dense.dense_forward(*_layer(100, 784 + odd, 1000 + odd, dtype), "tanh", 0.0)
    x, weight, bias = _layer(60, 784 + odd, 100 + odd, dtype)
    state = _state(ADAM, weight, bias, weight)
    dense.dense_step(bias.expand(60, -1), x, weight, bias, weight, 0.5, 0.1, *ADAM, *state)
    update.apply_update(weight, weight, 0.5, 1.0, *ADAM, *_state(ADAM, weight))
    _local_conv(50, 64 + odd, 64 + odd, dtype)
    for order in (torch.contiguous_format, torch.channels_last):
        _ekdaa(50, 64 + odd, 64 + odd, dtype, order=order)


def _every_way(dtype: torch.dtype, odd: int = 0) -> None:
    """Reach PEPITA's kernels with all tiles and numbers of classes: minutes, for changes of a table."""
    for batch in (32, 64, 128, 300):
        for outputs in (1000 + odd, 4096 + odd):
            for classes in (None, 10, 30, 60):
                for rule in (ADAM, RULES[1]):
                    for activation in ("tanh", "relu"):
                        _pepita_step(batch, 784 + odd, outputs, classes, dtype, activation, rule)
    for activation in ACTIVATIONS:
        for size in (100 + odd, 5000 + odd):
            z, basis = _new(60, size, dtype=dtype), _new(10, size, dtype=dtype)
            pepita.pepita_difference(z, z, None, activation, 0.5)
            pepita.pepita_difference(z, _new(60, 10, dtype=dtype), basis, activation, 0.5)
        dense.dense_forward(*_layer(60, 784 + odd, 1000 + odd, dtype), activation, 0.5)
    for batch in (16, 32, 300):
        for channels, outputs in ((3, 16 + odd), (16 + odd, 32), (32, 64 + odd), (128, 128)):
            for rule in (ADAM, *RULES):
                for order in (torch.contiguous_format, torch.channels_last):
                    _local_conv(batch, channels, outputs, dtype, rule, order=order)
                    _local_conv(batch, channels, outputs, dtype, rule, masked=False, order=order)
                    _ekdaa(batch, channels, outputs, dtype, rule, order=order)
                    _ekdaa(batch, channels, outputs, dtype, rule, order=order, pool=THIRDS)


def _every_branch(dtype: torch.dtype) -> None:
    """Reach every activation, loss and epilogue, a missing bias, and sizes of 1."""
    z, feedback = _new(60, 100, dtype=dtype), _new(10, 100, dtype=dtype)
    for activation in ACTIVATIONS:
        drtp.drtp_signal(z, feedback, _labels(60), activation, 0.5)
        pepita.pepita_difference(z, z, None, activation, 0.5)
        _ekdaa(1, 4, 2, dtype, activation=activation, place=Geometry(2, 3, 11, 17, 3, 2, 2))
    _ekdaa(50, 3, 32, dtype, upsample="average", order=torch.channels_last)
    maps = _new(60, 24, 24, 32, dtype=dtype)
    for change in (None, maps):
        pepita_pool.pepita_max_pool(maps, change, 12, 12, 3, 3, 2, 2, 1, 1, 1, 1)
    x, weight, bias = _layer(60, 784, 100, dtype)
    for rule in RULES:
        state = _state(rule, weight, bias)
        drtp.drtp_linear_step(x, weight, bias, feedback, _labels(60), "tanh", 0.0, *rule, *state)
        update.apply_update(weight, weight, 0.5, math.inf, *rule, *_state(rule, weight))
        _ekdaa(50, 3, 32, dtype, rule, pool=THIRDS, upsample="nearest", activation="sign")
    step_on_cpu = torch.zeros(())
    update.apply_update(weight, weight, 0.5, math.inf, *ADAM, weight, weight, step_on_cpu)
    for accumulate in (False, True):
        grads = weight, bias, accumulate
        drtp.drtp_linear_grad(x, weight, bias, feedback, _labels(60), "relu", 0.0, *grads)
    for loss in ("bce", "mse", "hinge"):
        for classes in (10, 1000):
            x, weight, bias = _layer(60, 784, classes, dtype)
            options = (1.0, 0.1) if loss == "hinge" else (0.0, 0.0)
            classifier.classifier_grad(
                x, weight, None, _labels(60), loss, *options, weight, None, False
            )
    for batch in (1, 300):
        x, weight, bias = _layer(batch, 1, 1, dtype)
        feedback, labels = _new(1, 1, dtype=dtype), _labels(batch)
        drtp.drtp_linear_grad(x, weight, None, feedback, labels, "sign", 0.0, weight, None, False)
        for rows in (None, feedback):
            pepita.pepita_linear_grad(x, x, x, rows, None, weight, "relu", 0.0, weight, bias, True)
        dense.dense_forward(x, weight, None, "identity", 0.0)
    classifier.classifier_grad(x, weight, bias, labels, "ce", 0.0, 0.0, weight, bias, True)
    _local_conv(50, 3, 32, dtype, RULES[1], masked=False, order=torch.channels_last)
    _local_conv(1, 2, 2, dtype, RULES[3], place=Geometry(2, 3, 11, 17, 3, 2, 2))
    x, weight = _new(50, 3, 16, 16, dtype=dtype), _new(16, 16, 3, 3, 3, 32, dtype=dtype)
    local_conv.local_conv_forward(x, weight, None, "identity", 0.0, *SAME_SIZE)
    signal = _new(50, 32, 16, 16, dtype=dtype)
    local_conv.local_conv_feedback(signal, weight, None, "identity", 0.0, 16, 16, *SAME_SIZE)
    kernel = _new(32, 3, 3, 3, dtype=dtype)
    for accumulate in (False, True):
        local_conv.local_conv_grad(signal, x, None, 1.0, *SAME_SIZE, weight, None, accumulate)
        conv.conv_grad(signal, x, 1.0, *SAME_SIZE, kernel, None, accumulate)


WORK: dict[str, Callable[[torch.dtype], None]] = {
    "blocks": _every_block,
    "odd": functools.partial(_every_block, odd=1),
    "branches": _every_branch,
    "ways": _every_way,
    "odd_ways": functools.partial(_every_way, odd=1),
}


def _resources(kernel: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers, what was spilled from them, shared memory, and whether matrix units are used."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        registers, *spilled = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names)
        matrix = "v_mfma" in text
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        registers, *spilled = (int(usage[name]) for name in ("REG", "STACK", "LOCAL"))
        matrix = bool(re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"]))
    return {
        "registers": registers,
        "spilled": sum(spilled),
        "shared": kernel.metadata.shared,
        "matrix": matrix,
    }


def _narrow_products(kernel: Any) -> list[str]:
    """Products in int32 of anything but a block index and a constant: offsets that can overflow."""
    text = kernel.asm["ttir"]
    constants = set(re.findall(r"(%\S+) = arith\.constant", text))
    products = re.findall(r"arith\.muli (%[^,]+), (%\S+) : .*i32\b", text)
    return [" * ".join(factors) for factors in products if not constants & set(factors)]


def main(target_name: str, *work: str) -> None:
    """Compile, with one JSON object per launch on stdout."""
    target = TARGETS[target_name]
    triton.runtime.driver.set_active(_Driver(target))
    torch.version.hip = "any" if target.backend == "hip" else None

    def compile_instead(self: Any, grid: object) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            kernel = self.warmup(*args, grid=grid, **options)
            facts = {"kernel": self.fn.__name__, "work": item, "narrow": _narrow_products(kernel)}
            facts["options"] = {k: v for k, v in options.items() if isinstance(v, int | str)}
            print(json.dumps(facts | _resources(kernel, target)))

        return compile_only

    triton.runtime.JITFunction.__getitem__ = compile_instead
    for item in work:
        calls, dtype = item.split(":")
        tf32 = dtype == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        WORK[calls](torch.float32 if tf32 else getattr(torch, dtype))


if __name__ == "__main__":
    main(*sys.argv[1:])

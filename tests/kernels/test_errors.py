"""Wrong arguments: the right exception, a message that says what to change, and nothing changed.

The arguments are checked before any body is chosen, so one backend stands for all. The mistakes
themselves are in `mistakes`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bpfree_kernels as bk

from .calls import FUNCTIONS, bodies_of
from .cases import Snapshot
from .mistakes import MISTAKES

pytestmark = pytest.mark.filterwarnings("ignore::bpfree_kernels.BackendFallbackWarning")

CALLS = [(name, mistake) for mistake, entry in MISTAKES.items() for name in entry.functions]


@pytest.mark.parametrize(("function", "mistake"), CALLS, ids=map(": ".join, CALLS))
def test_mistakes(function: str, mistake: str) -> None:
    """The exception, its words, and every bit of every argument as it was."""
    call, valid = FUNCTIONS[function]
    entry = MISTAKES[mistake]
    arguments = valid()
    arguments.update(entry.change(arguments))
    snapshot = Snapshot(arguments)
    with pytest.raises(entry.error) as caught:
        call(**arguments)
    snapshot.check_unchanged()
    message = str(caught.value)
    for word in entry.words:
        assert word in message, f"{word!r} is not in: {message}"
    assert "\n" not in message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_valid_call_is_valid(function: str) -> None:
    """Without a mistake the calls pass, and the snapshot notices that something was learnt."""
    call, valid = FUNCTIONS[function]
    arguments = valid()
    snapshot = Snapshot(arguments)
    call(**arguments)
    if "update" in arguments:
        with pytest.raises(AssertionError, match="has changed"):
            snapshot.check_unchanged()
    else:
        snapshot.check_unchanged()


def test_every_public_function_is_here() -> None:
    """A new function of the library needs a valid call, and mistakes."""
    public = {name: getattr(bk, name) for name in bk.__all__}
    ops = {
        name
        for name, value in public.items()
        if inspect.isfunction(value) and "backend" in inspect.signature(value).parameters
    }
    assert ops == set(FUNCTIONS)
    assert ops == {name for entry in MISTAKES.values() for name in entry.functions}


RULES: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: bk.SGD(-0.1), ("lr", "SGD", "-0.1")),
    (lambda: bk.SGD(float("nan")), ("lr", "SGD", "nan")),
    (lambda: bk.SGD(0.1, momentum=-0.9), ("momentum", "SGD", "-0.9")),
    (lambda: bk.SGD(0.1, weight_decay=-1.0), ("weight_decay", "SGD", "-1.0")),
    (lambda: bk.SGD(0.1, nesterov=True), ("nesterov", "momentum", "0")),
    (lambda: bk.Adam(-1.0), ("lr", "Adam", "-1.0")),
    (lambda: bk.Adam(eps=-1e-8), ("eps", "Adam", "-1e-08")),
    (lambda: bk.Adam(weight_decay=-0.1), ("weight_decay", "Adam", "-0.1")),
    (lambda: bk.Adam(betas=(1.0, 0.999)), ("betas", "[0, 1)", "1.0")),
    (lambda: bk.Adam(betas=(0.9, -0.1)), ("betas", "[0, 1)", "-0.1")),
    (lambda: bk.Adam(betas=(0.9, float("nan"))), ("betas", "nan")),
    (lambda: bk.Adam(betas=(0.9,)), ("betas", "(0.9,)")),
    (lambda: bk.AdamW(-1.0), ("lr", "AdamW", "-1.0")),
    (lambda: bk.AdamW(weight_decay=-0.1), ("weight_decay", "AdamW", "-0.1")),
]


@pytest.mark.parametrize(("make", "words"), RULES, ids=[" ".join(words) for _, words in RULES])
def test_hyper_parameters(make: Callable[[], Any], words: tuple[str, ...]) -> None:
    """A rule that makes no sense is refused when it is made."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_backend_that_cannot_run(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name, a backend that is not there is an error with the reason."""
    off = bk.backends.Status(False, "it was left at home")
    monkeypatch.setattr(bk.backends, "status", lambda _: off)
    call, valid = FUNCTIONS[function]
    arguments = valid()
    snapshot = Snapshot(arguments)
    for backend in set(bodies_of(function)) - {"reference"}:
        with pytest.raises(RuntimeError, match=f"'{backend}'.*it was left at home"):
            call(**arguments, backend=backend)
    snapshot.check_unchanged()


def test_labels_are_checked_wherever_they_lie_in_memory() -> None:
    """The position in the message is the label's, not the memory's."""
    labels = torch.tensor([0, 9, 1, 9, 2, 9, 7, 9, 0, 9])[::2]
    arguments = {**FUNCTIONS["drtp_linear_grad"][1](), "labels": labels}
    with pytest.raises(IndexError, match="got 7 at position 3"):
        bk.drtp_linear_grad(**arguments)

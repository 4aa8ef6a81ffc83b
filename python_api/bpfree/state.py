"""Saving and restoring what a learner has become, checked before anything changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bpfree.losses import describe

if TYPE_CHECKING:
    from bpfree.rules.base import Learner


def state_dict(learner: Learner) -> dict[str, Any]:
    """The state of a learner, with references to its tensors, as torch's own state dicts have them.

    Returns:
        ``rule`` and ``loss``, as text; ``seed``; ``model`` and ``optimizer``, torch's state
        dicts (``None`` without an optimizer); ``feedback`` and ``buffers``, tensors by name;
        ``generators``, states of the rule's own random generators by name.
    """
    return {
        "rule": learner.rule,
        "loss": describe(learner.loss),
        "seed": learner.seed,
        "model": learner.model.state_dict(),
        "feedback": dict(learner.feedback),
        "buffers": learner.buffers,
        "generators": {name: g.get_state() for name, g in learner.generators.items()},
        "optimizer": None if learner.optimizer is None else learner.optimizer.state_dict(),
    }


def load_state_dict(learner: Learner, saved: dict[str, Any]) -> None:
    """Restore a state that `state_dict` returned.

    A learner without an optimizer leaves the optimizer's state aside.

    Raises:
        ValueError: a state of another rule, loss, model or optimizer, or one with other shapes;
            nothing has changed then.
    """
    missing = {"rule", "loss", "seed", "model", "feedback", "buffers", "optimizer"} - set(saved)
    if missing:
        raise ValueError(f"state lacks {', '.join(sorted(missing))}.")
    for name, wanted in (("rule", learner.rule), ("loss", describe(learner.loss))):
        if saved[name] != wanted:
            raise ValueError(f"state has {name} {saved[name]!r}, but the learner has {wanted!r}.")
    _check_tensors("model", saved["model"], learner.model.state_dict())
    learner.check_feedback(saved["feedback"])
    learner.check_buffers(saved["buffers"])
    _check_generators(saved["generators"], learner.generators)
    if learner.optimizer is not None:
        _check_optimizer(saved["optimizer"], learner.optimizer)
        # torch keeps the tensors that it is given, which may be another learner's.
        learner.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    learner.model.load_state_dict(saved["model"])
    learner.seed = saved["seed"]  # feedback that waits for the first batch is drawn from it
    learner.take_feedback(saved["feedback"])
    learner.take_buffers(saved["buffers"])
    for name, generator in learner.generators.items():
        generator.set_state(saved["generators"][name])


def _check_tensors(part: str, saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if saved.keys() != wanted.keys():
        raise ValueError(
            f"{part} of the state has {sorted(saved)}, but the learner has {sorted(wanted)}."
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{part} of the state has {name!r} of shape {tuple(saved[name].shape)}, "
                f"but the learner's is {tuple(tensor.shape)}."
            )


def _check_generators(saved: dict[str, Tensor], wanted: dict[str, torch.Generator]) -> None:
    if saved.keys() != wanted.keys():
        raise ValueError(
            f"state has random generators {sorted(saved)}, but the learner has {sorted(wanted)}."
        )
    for name, generator_state in saved.items():
        if generator_state.shape != wanted[name].get_state().shape:
            raise ValueError(f"state of the random generator {name!r} is not one of this torch.")


def _check_optimizer(saved: dict[str, Any] | None, optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    if saved is None:
        raise ValueError(f"state has no optimizer, but the learner has {kind}.")
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != wanted:
        raise ValueError(
            f"optimizer of the state has groups of {sizes} parameters, "
            f"but the learner's has {wanted}."
        )
    # Flags come and go with torch's versions; the numbers are what makes an optimizer.
    numbers = {
        name
        for name, value in optimizer.defaults.items()
        if value is not None and not isinstance(value, bool)
    }
    for group in saved["param_groups"]:
        lacking = numbers - set(group)
        if lacking:
            raise ValueError(
                f"optimizer of the state is no {kind}: it lacks {', '.join(sorted(lacking))}."
            )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    positions = [i for group in saved["param_groups"] for i in group["params"]]
    for position, parameter in zip(positions, parameters, strict=True):
        for name, tensor in saved["state"].get(position, {}).items():
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape != parameter.shape:
                raise ValueError(
                    f"optimizer of the state has {name!r} of shape {tuple(tensor.shape)} for a "
                    f"parameter of shape {tuple(parameter.shape)}."
                )

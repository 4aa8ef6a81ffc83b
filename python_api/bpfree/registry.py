"""Every learning rule by name, with what the command line and the demo need to know about it.

A new rule is one entry in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bpfree.plain import PlainDRTP, PlainEKDAA, PlainGAIT, PlainPEPITA, PlainURFB
from bpfree.rules.base import Learner
from bpfree.rules.bp import BP
from bpfree.rules.drtp import DRTP
from bpfree.rules.ekdaa import EKDAA
from bpfree.rules.gait import GAITProp
from bpfree.rules.pepita import PEPITA
from bpfree.rules.shallow import Shallow
from bpfree.rules.urfb import FRFB, URFB

OPTIMIZERS = ("adam", "adamw", "sgd")
"""Optimizers by name."""


class PlainStep(Protocol):
    """A rule written down in plain PyTorch, the way its authors did: what the kernels replace."""

    def step(self, x: Tensor, y: Tensor) -> object:
        """Learn one batch: x [N, ...], y int64 [N]."""


@dataclass(frozen=True)
class Rule:
    """A learning rule and its default hyper-parameters.

    Attributes:
        title: its name in tables.
        learner: makes the learner.
        loss: default loss of the output layer, the one of the rule's paper.
        lr: default learning rate, for Adam.
        demo_lr: learning rate (Adam) for the demo's small net and data, picked among a few by its test
            accuracy: the demo illustrates, it is no benchmark of accuracy.
        plain: makes the plain-PyTorch formulation for the model and the feedback of a learner;
            ``None`` for baselines, which are plain PyTorch themselves.
        options: names of the learner's arguments that other rules lack, as the command line has them.
        demo_model: the demo's net, by name (`bpfree.models.build_model`).
    """

    title: str
    learner: type[Learner]
    loss: str
    lr: float
    demo_lr: float
    plain: Callable[[Learner, nn.Sequential, torch.optim.Optimizer], PlainStep] | None = None
    options: tuple[str, ...] = ()
    demo_model: str = "fc2-256"

    def make(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        *,
        loss: str,
        seed: int,
        options: Mapping[str, Any],
    ) -> Learner:
        """Make a learner.

        Args:
            model, optimizer, loss, seed: as every learner takes them.
            options: the rule's own arguments by name; its defaults for those that are not there.

        Raises:
            ValueError: an option that the rule does not have; else as the learner.
        """
        for name in options:
            if name not in self.options:
                rules = ", ".join(rule.title for rule in RULES.values() if name in rule.options)
                raise ValueError(f"{name} has no meaning for {self.title}, only for {rules}.")
        return self.learner(model, optimizer, loss=loss, seed=seed, **options)


def _plain_drtp(
    learner: Learner, model: nn.Sequential, optimizer: torch.optim.Optimizer
) -> PlainStep:
    return PlainDRTP(model, learner.feedback, optimizer, learner.loss)


def _plain_pepita(
    learner: Learner, model: nn.Sequential, optimizer: torch.optim.Optimizer
) -> PlainStep:
    pepita = cast(PEPITA, learner)
    return PlainPEPITA(
        model,
        pepita.feedback,
        optimizer,
        pepita.loss,
        presynaptic=pepita.presynaptic,
        output_error=pepita.output_error,
        space=pepita.space,
    )


def _plain_urfb(
    learner: Learner, model: nn.Sequential, optimizer: torch.optim.Optimizer
) -> PlainStep:
    urfb = cast(URFB, learner)
    return PlainURFB(
        model, urfb.feedback, optimizer, urfb.loss, learns_feedback=urfb.feedback_scale != 0
    )


def _plain_ekdaa(
    learner: Learner, model: nn.Sequential, optimizer: torch.optim.Optimizer
) -> PlainStep:
    ekdaa = cast(EKDAA, learner)
    return PlainEKDAA(
        model,
        ekdaa.feedback,
        optimizer,
        ekdaa.loss,
        beta=ekdaa.beta,
        gamma=ekdaa.gamma,
        upsample=ekdaa.upsample,
        reduction=ekdaa.reduction,
        max_norm=ekdaa.max_norm,
    )


def _plain_gait(
    learner: Learner, model: nn.Sequential, optimizer: torch.optim.Optimizer
) -> PlainStep:
    gait = cast(GAITProp, learner)
    return PlainGAIT(
        model,
        optimizer,
        gait.loss,
        orthogonal_penalty=gait.orthogonal_penalty,
        off_diagonal=gait.off_diagonal,
        normalised=gait.nudge.normalised,
        eta=gait.nudge.eta,
        rate=gait.nudge.rate,
    )


_OF_GAIT = ("orthogonal_penalty", "off_diagonal", "form", "normalised")

# Learning rates: the DRTP paper's for its fully connected nets; the GAIT paper's for CIFAR-10.
RULES = {
    "drtp": Rule("DRTP", DRTP, "bce", 1.5e-4, 1e-3, _plain_drtp),
    "pepita": Rule("PEPITA", PEPITA, "ce", 1.5e-4, 3e-4, _plain_pepita),
    "urfb": Rule("URFB", URFB, "hinge", 1.5e-4, 1e-3, _plain_urfb, ("connectivity",)),
    "frfb": Rule("FRFB", FRFB, "hinge", 1.5e-4, 1e-3, _plain_urfb, ("connectivity",)),
    "ekdaa": Rule(
        "EKDAA", EKDAA, "ce", 1.5e-4, 3e-3, _plain_ekdaa, ("beta", "gamma", "upsample", "max_norm")
    ),
    "gait": Rule(
        "GAIT-prop", GAITProp, "ce", 1.9e-5, 1e-3, _plain_gait, _OF_GAIT, demo_model="gait2-256"
    ),
    "shallow": Rule("Shallow", Shallow, "bce", 1.5e-4, 1e-3),
    "bp": Rule("BP", BP, "ce", 1.5e-4, 1e-3),
}
"""Every rule by the name that ``--rule`` takes."""


def find_rule(name: str) -> Rule:
    """The rule of a name; ValueError that lists the names if there is none."""
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}.")
    return RULES[name]


def make_optimizer(
    params: Iterable[nn.Parameter],
    name: str,
    lr: float,
    momentum: float | None = None,
    weight_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Make a torch optimizer by name.

    Args:
        params: what it optimises.
        name: one of `OPTIMIZERS`.
        lr: learning rate.
        momentum: of SGD, 0 if not given; the others have none.
        weight_decay: torch's default if not given (0.01 for AdamW, 0 for the others).

    Raises:
        ValueError: an unknown name, a momentum where it has no meaning, or a value out of range.
    """
    options: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum or 0.0, **options)
    if momentum is not None:
        raise ValueError(f"momentum has no meaning for {name}, only for sgd.")
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, **options)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, **options)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")

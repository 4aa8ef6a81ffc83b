"""What is kept beside W and its feedback R: which of their connections exist, the optimizer's state of R."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bpfree import seeds
from bpfree.nn import LocallyConnected2d
from bpfree.nn.connectivity import random_connectivity
from bpfree.stages import Network, Stage
from bpfree_kernels import Adam, ParamState, checks
from bpfree_kernels.update import UpdateRule

_MASKS = ("weight_mask", "feedback_mask")
_STATE = ("feedback_m", "feedback_v", "feedback_step")


class Masks(NamedTuple):
    """Where a layer's W and R exist, bool and shaped like them; ``None``: everywhere."""

    weight: Tensor | None
    feedback: Tensor | None


class FeedbackBuffers:
    """Tensors by kind and layer, such as ``"weight_mask.1"``.

    Masks are explicit: a weight that happens to be 0 is alive all the same.
    """

    def __init__(self, network: Network, connectivity: float, seed: int) -> None:
        """Draw the masks; changes no weight.

        Args:
            network: the model; its output layer keeps all its connections.
            connectivity: share of the connections that exist, in (0, 1].
            seed: seed of the learner.

        Raises:
            ValueError: a connectivity out of range.
        """
        if not 0 < connectivity <= 1:
            raise ValueError(f"connectivity must lie in (0, 1], got {connectivity}.")
        self._stages = network.stages
        self._tensors: dict[str, Tensor] = {}
        if connectivity == 1:
            return
        for stage in network.hidden:
            for kind in _MASKS if stage.position else _MASKS[:1]:
                self._tensors[f"{kind}.{stage.name}"] = random_connectivity(
                    stage.layer.weight, connectivity, seeds.generator(kind, seed, stage.position)
                )
            if isinstance(stage.layer, LocallyConnected2d) and stage.layer.mask is not None:
                self._tensors[f"weight_mask.{stage.name}"] &= stage.layer.mask

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name; the tensors themselves."""
        return dict(self._tensors)

    def masks(self, stage: Stage) -> Masks:
        """The masks of a layer; W's is the layer's own where none was drawn."""
        weight, feedback = (self._tensors.get(f"{kind}.{stage.name}") for kind in _MASKS)
        if weight is None and isinstance(stage.layer, LocallyConnected2d):
            weight = stage.layer.mask
        return Masks(weight, feedback)

    def state(self, stage: Stage, feedback: Tensor, rule: UpdateRule) -> ParamState:
        """What an update rule remembers of a layer's R; made at the first update, as torch does."""
        names = [f"{kind}.{stage.name}" for kind in _STATE]
        wanted = names if isinstance(rule, Adam) else names[: 1 if rule.momentum else 0]
        if not all(name in self._tensors for name in wanted):
            made = rule.new_param_state(feedback)
            fresh = zip(names, (made.m, made.v, made.step), strict=True)
            self._tensors |= {name: tensor for name, tensor in fresh if tensor is not None}
        return ParamState(*(self._tensors[name] for name in wanted))

    def to_layers(self) -> None:
        """Put everything on the device, and the state in the dtype, of its layer's weight."""
        for stage in self._stages:
            weight = stage.layer.weight
            for kind in (*_MASKS, *_STATE):
                name = f"{kind}.{stage.name}"
                if name in self._tensors:
                    like = weight.dtype if kind in ("feedback_m", "feedback_v") else None
                    self._tensors[name] = self._tensors[name].to(weight.device, like)

    def check(self, given: Mapping[str, Tensor]) -> None:
        """Check tensors that are to take the place of these.

        Raises:
            TypeError: something that is no tensor.
            ValueError: an unknown name, masks where there are none or the other way round, or a shape
                or dtype that does not fit.
        """
        shapes = {
            f"{kind}.{stage.name}": () if kind == "feedback_step" else stage.layer.weight.shape
            for stage in self._stages
            for kind in _STATE
        }
        masks = {name: t.shape for name, t in self._tensors.items() if name.startswith(_MASKS)}
        if masks.keys() != {name for name in given if name.startswith(_MASKS)}:
            raise ValueError(
                f"state has the masks {sorted(n for n in given if n.startswith(_MASKS))}, but the "
                f"learner has {sorted(masks)}: make it with the same connectivity."
            )
        shapes |= masks
        for name, tensor in given.items():
            if name not in shapes:
                raise ValueError(f"state has {name!r}, which no layer of the learner has.")
            checks.tensor(f"{name!r} of the state", tensor)
            if (tensor.dtype == torch.bool) != (name in masks) or tensor.shape != shapes[name]:
                raise ValueError(
                    f"{name!r} of the state must have shape {tuple(shapes[name])}"
                    f"{' and be boolean' if name in masks else ''}, got {tuple(tensor.shape)} "
                    f"of {tensor.dtype}."
                )

    def take(self, given: Mapping[str, Tensor]) -> None:
        """Take copies of checked tensors in the place of these."""
        self._tensors = {name: tensor.detach().clone() for name, tensor in given.items()}
        self.to_layers()

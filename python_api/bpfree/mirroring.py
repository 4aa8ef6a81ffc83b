"""Weight mirroring: feedback that follows the forward weights (Akrout et al., 2019), for PEPITA.

PEPITA's projection F becomes a product of one matrix for each layer, F ∝ −B_1 B_2 … B_L, and each B_l
is drawn towards the transpose of its layer's weight by what the layer answers to noise (Srinivasan
et al., 2024). The functions here work on plain tensors; `bpfree.PEPITA` calls them.

The minus matters: a random F needs no sign, because the weights come to oppose it, but a learned one does.
With F ∝ −(W_L … W_1)ᵀ adding F e lowers the error, and a hidden layer's signal −W_1 F e points where
backprop's does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bpfree import seeds


@dataclass(frozen=True)
class WeightMirroring:
    """How fast the feedback follows the forward weights.

    After each step on N samples, every layer answers to noise ξ ~ noise·N(0, 1), [N, n_{l−1}], and::

        B_l ← (1 − decay)·B_l + lr · ξᵀ f_l(W_l ξ + b_l) / N

    with f_L, of the output layer, the identity. For a linear layer that drives B_l to
    ``lr·noise²/decay · W_lᵀ``. F is −B_1 B_2 … B_L scaled to the size of an ordinary F, so that these
    numbers do not decide how fast hidden layers learn; `decay` says over how many steps the noise, which
    is large in a single answer, is averaged.

    Args:
        lr: weight of the answer.
        decay: share of B_l that each step forgets, 0 to 1.
        noise: standard deviation of the noise.

    Raises:
        ValueError: a value out of range.
    """

    lr: float = 0.1
    decay: float = 0.01
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("noise", self.noise)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} of WeightMirroring must be positive and finite, got {value}."
                )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay of WeightMirroring must lie in [0, 1], got {self.decay}.")


def draw_factors(sizes: Sequence[int], *, std: float, seed: int) -> list[Tensor]:
    """Draw B_1 … B_L ~ N(0, σ²), with σ such that the entries of their product deviate by `std`.

    An entry of the product sums over n_1·n_2·…·n_{L−1} paths, so ``std² = σ^(2L) · n_1 ⋯ n_{L−1}``.

    Args:
        sizes: n_0 … n_L, the number of inputs and the widths of all layers.
        std: standard deviation of an entry of F.
        seed: seed of the learner.

    Returns:
        float32, on the CPU: B_l of shape [n_{l−1}, n_l].
    """
    depth = len(sizes) - 1
    sigma = (std / math.sqrt(math.prod(sizes[1:-1]))) ** (1 / depth)
    factors = []
    for position in range(depth):
        factor = torch.empty(sizes[position], sizes[position + 1], device="cpu")
        generator = seeds.generator("mirrored feedback", seed, position)
        factors.append(factor.normal_(0, sigma, generator=generator))
    return factors


def projection(factors: Mapping[str, Tensor], rms: float) -> Tensor:
    """F = −c·B_1 B_2 … B_L, [n_0, n_L], the transpose of a contiguous tensor.

    Args:
        factors: B_1 … B_L in order.
        rms: root mean square of F's entries, which decides c.
    """
    *others, result = (factor.t() for factor in factors.values())
    for factor in reversed(others):  # from the short end
        result = result @ factor
    size = result.square().mean().sqrt().clamp(min=torch.finfo(result.dtype).tiny)
    return (result * (-rms / size)).contiguous().t()


def draw_noise(
    mirroring: WeightMirroring, samples: int, like: Tensor, generator: torch.Generator
) -> Tensor:
    """Noise ξ for a layer, [samples, in]: the same numbers for every device and dtype.

    Args:
        mirroring: whose ``noise`` is the standard deviation.
        samples: number of samples N.
        like: weight of the layer, [out, in].
        generator: a generator of the CPU.
    """
    noise = torch.randn(samples, like.shape[1], generator=generator, dtype=torch.float32)
    return noise.mul_(mirroring.noise).to(like.device, like.dtype)


def mirror(mirroring: WeightMirroring, factor: Tensor, noise: Tensor, answer: Tensor) -> None:
    """One step of `WeightMirroring`, in place.

    Args:
        mirroring: how fast.
        factor: B_l, [in, out].
        noise: ξ, [samples, in].
        answer: f_l(W_l ξ + b_l), [samples, out].
    """
    factor.addmm_(noise.t(), answer, beta=1 - mirroring.decay, alpha=mirroring.lr / noise.shape[0])

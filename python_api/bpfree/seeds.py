"""Random generators that depend on nothing but a purpose, a seed and a position."""

from __future__ import annotations

import hashlib

import torch


def generator(purpose: str, seed: int, position: int) -> torch.Generator:
    """A CPU generator of its own for each (purpose, seed, position).

    A hash mixes the three, because torch's CPU generator reads only 32 bits of its seed and
    neighbouring seeds of a sum would collide (seed 0, epoch 1 with seed 1, epoch 0).
    """
    key = f"bpfree/{purpose}/{seed}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

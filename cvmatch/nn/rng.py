"""Random numbers as a function of the row, so that batch, worker and restart do not matter.

A number is a hash of (row key, stream, position): splitmix64 (Steele, Lea, Flood, OOPSLA 2014) as a
counter-based generator. The integers agree on every device; normals agree to float32 rounding.
"""

import hashlib
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_MASK_63 = 2**63 - 1


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def row_key(pair_id: str) -> int:
    """Hash a row's id to [0, 2**63): the same number in every process and on every machine."""
    return _hash(pair_id)


def fold_in(seed: int, epoch: int = 0, purpose: str = "") -> int:
    """Hash seed, epoch and purpose to the number of an independent stream of random numbers."""
    return _hash(f"{seed}/{epoch}/{purpose}")


def uniform(keys: Int64[Tensor, " row"], stream: int, *shape: int) -> Float[Tensor, " row *shape"]:
    """Sample `shape` numbers from [0, 1) for each key, 24 bits each, on the device of `keys`."""
    return _uniform(keys, stream, math.prod(shape)).reshape(len(keys), *shape)


def normal(keys: Int64[Tensor, " row"], stream: int, *shape: int) -> Float[Tensor, " row *shape"]:
    """Sample from N(0, 1) by Box and Muller (1958), on the device of `keys`; within +-5.8."""
    count = math.prod(shape)
    flat = _uniform(keys, stream, 2 * count)
    radius = torch.sqrt(-2 * torch.log1p(-flat[:, :count]))  # 1 - u is never 0, since u < 1
    return (radius * torch.cos(2 * math.pi * flat[:, count:])).reshape(len(keys), *shape)


def _uniform(keys: Int64[Tensor, " row"], stream: int, count: int) -> Float[Tensor, "row n"]:
    start = _mix(_mix(keys + _GOLDEN) ^ _signed(stream))
    position = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    bits = _mix(start[:, None] + position)
    return _right(bits, 40).float() * 2.0**-24


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap, as the algorithm requires."""
    bits = (bits ^ _right(bits, 30)) * _FIRST
    bits = (bits ^ _right(bits, 27)) * _SECOND
    return bits ^ _right(bits, 31)


def _right(bits: Tensor, places: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK_63

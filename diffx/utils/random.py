r"""Random numbers with addresses instead of a state.

Every random number of diffx is a pure function of (seed, stream, sample number, step, position): sample k gets the same
noise whatever the batch, the rank, the number of workers or the number of restarts, and nothing has to be saved to
resume. The function is a counter-based generator in tensor operations, without a Python loop over samples: the output
function of SplitMix64 (Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014, with
variant 13 of Stafford's mixers) applied to `address ^ mix(position)`. Integers wrap modulo 2^64, so that all devices
agree on the bits; normal numbers are computed in float64 and rounded, so that they agree but for a stray last bit.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed integer
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64-bit integers.

    Arguments:
        z: int64 of any shape, read as unsigned.

    Returns:
        int64 of the same shape, read as unsigned.
    """
    # >> keeps the sign: the mask makes it the unsigned shift. In place where it can be: allocations count
    z = (z >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(z).mul_(_MIX_1)
    z = (z >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(z).mul_(_MIX_2)
    return (z >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(z)


def _mix64(z: np.ndarray) -> np.ndarray:
    """`mix64` of uint64."""
    z = z ^ (shifted := z >> _SHIFT_1)
    z *= _FACTOR_1
    z ^= np.right_shift(z, _SHIFT_2, out=shifted)
    z *= _FACTOR_2
    z ^= np.right_shift(z, _SHIFT_3, out=shifted)
    return z


_SHIFT_1, _SHIFT_2, _SHIFT_3 = (np.uint64(shift) for shift in (30, 27, 31))
_FACTOR_1, _FACTOR_2, _STEP = (np.uint64(factor % 2**64) for factor in (_MIX_1, _MIX_2, _GAMMA))


class Keys:
    """The addresses of a batch's random numbers: one (seed, sample number, step) per sample.

    Arguments:
        seed: the seed of the run.
        index: the global sample numbers, int64 `[B]`.
        step: the step of a sampler; 0 where a sample needs one draw only.
        total: the size of the global batch of which these samples are a part; `len(index)` by default. Samplers of
            training times that spread a batch over strata need it.
    """

    def __init__(self, seed: int, index: Tensor, step: int = 0, total: int | None = None) -> None:
        self.seed = seed
        self.index = index
        self.step = step
        self.total = len(index) if total is None else total

    def __len__(self) -> int:
        return len(self.index)

    def at(self, step: int) -> "Keys":
        """The same samples at another step."""
        return Keys(self.seed, self.index, step, self.total)

    def bits(self, stream: str, count: int) -> Tensor:
        """Random bits, int64 `[B, count]`; different streams are independent."""
        start, positions = _address(self.seed, stream, self.step), _positions(count, self.index.device)
        if self.index.device.type == "cpu":
            # the same in numpy, which has an unsigned shift, and whose calls cost a third of torch's on short arrays
            address = _mix64((self.index.numpy().view(np.uint64) + np.uint64(start % 2**64)) * _STEP)
            bits = _mix64(address[:, None] ^ positions.numpy().view(np.uint64))
            return torch.from_numpy(bits.view(np.int64))
        address = mix64((self.index + start).mul_(_GAMMA))
        return mix64(address[:, None] ^ positions)

    def uniform(self, stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in the open interval (0, 1), shape `[B, *shape]`."""
        return _unit(self.bits(stream, math.prod(shape)) >> 32, 32, dtype).reshape(len(self), *shape)

    def normal(self, stream: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers (Box and Muller), shape `[B, *shape]`.

        Two come from 64 bits: the radius from the upper 32, the angle from the lower 32, so that |z| ≤ 6.8.
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        bits = self.bits(stream, half)
        # from here on in place: a batch of images is large enough for its allocations to count
        radius = _unit(bits >> 32, 32, torch.float64).log_().mul_(-2).sqrt_()
        angle = _float64(bits.bitwise_and_(0xFFFFFFFF), 0.0, 2 * math.pi / 2**32)
        if count == 1:
            return angle.cos_().mul_(radius).to(dtype).reshape(len(self), *shape)
        both = torch.empty(len(self), 2 * half, dtype=dtype, device=bits.device)
        torch.mul(angle.cos(), radius, out=both[:, :half])
        torch.mul(angle.sin_(), radius, out=both[:, half:])
        return both[:, :count].reshape(len(self), *shape)


def permutation(seed: int, stream: str, epoch: int, n: int) -> Tensor:
    """A random order of `range(n)`, int64 `[n]`, that depends on (seed, stream, epoch) alone."""
    return Keys(seed, torch.arange(n), epoch).bits(stream, 1)[:, 0].argsort(stable=True)


def _unit(bits: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The centres of 2^width equal cells of (0, 1), from signed integers of that width."""
    value = _float64(bits, 2.0 ** (width - 1) + 0.5, 2.0**-width)
    # float32 rounds the last cells up to 1, which is no value of the open interval
    return value if dtype == torch.float64 else value.to(dtype).clamp_(max=1 - torch.finfo(dtype).eps / 2)


def _float64(bits: Tensor, offset: float, factor: float) -> Tensor:
    """(bits + offset)·factor."""
    if bits.device.type == "cpu":
        value = bits.numpy().astype(np.float64)
        value += offset
        value *= factor
        return torch.from_numpy(value)
    return bits.to(torch.float64).add_(offset).mul_(factor)


@lru_cache(maxsize=1024)
def _address(seed: int, stream: str, step: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@lru_cache(maxsize=1024)
def _positions(count: int, device: torch.device) -> Tensor:
    # mixed, so that neighbouring addresses never share a run of numbers; the same for every batch, hence kept
    return mix64(torch.arange(1, count + 1, device=device) * _GAMMA)

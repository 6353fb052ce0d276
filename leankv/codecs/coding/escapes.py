"""Escapes: what a code says of values that lie outside of the usual ones, a byte for which and a byte for what."""

from functools import cache

import torch

ESCAPE_BITS = 16  # one byte says which coordinate, one says its value; 24 where coordinates need two
MOST_ESCAPES = 255  # of a token: a byte counts them
LINEAR, FINE = 96, 4  # escape values up to 96 are exact, larger ones stand 2^(1/4) apart


def escape_bits(coordinates: int) -> int:
    """What one escape takes where so many coordinates are in use."""
    return ESCAPE_BITS + 8 * (coordinates > 256)


def representable(q: torch.Tensor) -> torch.Tensor:
    """Whole numbers of a size that an escape can hold: what it says of a large one is coarse."""
    size = q.abs()
    exponent = (FINE * torch.log2(size.clamp_min(LINEAR) / LINEAR)).round().clamp_max(126 - LINEAR)
    coarse = (LINEAR * torch.exp2(exponent / FINE)).round()
    return torch.where(size <= LINEAR, size, coarse) * q.sign()


def escape_byte(q: torch.Tensor) -> torch.Tensor:
    """Values that `representable` gives, as one byte each: 128 sizes and a sign."""
    size = q.abs()
    coarse = LINEAR + (FINE * torch.log2(size.clamp_min(LINEAR) / LINEAR)).round()
    return (torch.where(size <= LINEAR, size, coarse) + 128 * (q < 0)).to(torch.uint8)


def escape_value(byte: torch.Tensor) -> torch.Tensor:
    """The way back, float32."""
    size = (byte % 128).float()
    coarse = (LINEAR * torch.exp2((size - LINEAR) / FINE)).round()
    return torch.where(size <= LINEAR, size, coarse) * (1 - 2 * (byte >= 128).float())


ESCAPE_VALUES = escape_value(torch.arange(256, dtype=torch.uint8))


@cache
def escape_values(device: torch.device) -> torch.Tensor:
    """`ESCAPE_VALUES` there: what each byte means is looked up, not worked out again for each token."""
    return ESCAPE_VALUES.to(device)

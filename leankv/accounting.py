"""Bytes: what a cache of N tokens takes, compressed and not. Arithmetic only; `LeanCache.nbytes()` measures the same.

The uncompressed cache counted against is always the 16-bit one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from leankv.experiment import PARTS
from leankv.model import BYTES_16_BIT, Geometry

CONTEXT_LENGTHS = (1024, 4096, 32768, 131072)
"""Tokens at which cache ratios are computed from what codecs claim; nothing is measured there."""

BitsPlan = Mapping[int, Mapping[str, float]]
"""layer -> part -> bits per token of its codec; what is not named stays exact."""


@dataclass(frozen=True)
class Footprint:
    """What a plan makes of a model's cache, tokens that can still be read counted.

    (After a long prefill transformers' own sliding-window layers keep the whole of it alive until the next token;
    `LeanCache.nbytes()` shows that, these figures do not.)

    Attributes:
        geometry: the model's.
        bits: layer -> part -> bits per token.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
    """

    geometry: Geometry
    bits: BitsPlan
    sinks: int
    window: int

    def base_bytes(self, tokens: int) -> int:
        """Bytes of the 16-bit cache after `tokens` tokens, one sequence."""
        return sum(2 * layer.tokens_held(tokens) * layer.width * BYTES_16_BIT for layer in self.geometry.layers)

    def compressed_bytes(self, tokens: int) -> float:
        """Bytes of the compressed cache after `tokens` tokens, sinks, window and uncompressed layers counted."""
        total = 0.0
        for number, layer in enumerate(self.geometry.layers):
            held = layer.tokens_held(tokens)
            # In a sliding-window layer the sinks have left the cache once more tokens came than it holds.
            sinks = max(self.sinks - (tokens - held), 0)
            exact = min(held, sinks + self.window)
            for part in PARTS:
                bits = self.bits.get(number, {}).get(part)
                vector = layer.width * BYTES_16_BIT
                total += held * vector if bits is None else exact * vector + (held - exact) * bits / 8
        return total

    def cache_ratio(self, tokens: int) -> float:
        """Cache ratio at `tokens` tokens: bytes of the whole 16-bit cache over bytes of the whole compressed one."""
        return self.base_bytes(tokens) / self.compressed_bytes(tokens)

    def code_ratio(self) -> float | None:
        """Code ratio: 16-bit bytes of a token's *compressed vectors* over the bytes of their codes.

        Uncompressed layers, sinks and window are left out. None where there are no codes, or they take no bytes.
        """
        coded = [(self.geometry.layers[layer].width, bits) for layer, own in self.bits.items() for bits in own.values()]
        total_bits = sum(bits for _, bits in coded)
        return sum(width for width, _ in coded) * BYTES_16_BIT * 8 / total_bits if total_bits else None

    def bytes_per_token(self) -> tuple[int, float]:
        """Bytes that one more token takes far from sinks and window: uncompressed, compressed."""
        codes = sum(bits / 8 for own in self.bits.values() for bits in own.values())
        replaced = sum(
            self.geometry.layers[layer].width * BYTES_16_BIT for layer, own in self.bits.items() for _ in own
        )
        return self.geometry.bytes_per_token, self.geometry.bytes_per_token - replaced + codes

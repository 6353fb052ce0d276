"""Footprints: what a cache of N tokens takes under a plan, by arithmetic; `LeanCache.nbytes()` measures the same.

The uncompressed cache counted against is always the 16-bit one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from leankv.cache.plan import Site
from leankv.config.plan_table import PARTS
from leankv.models.geometry import BYTES_16_BIT, Geometry

CONTEXT_LENGTHS = (1024, 4096, 32768, 131072)
"""Tokens at which cache ratios are computed from what codecs claim; nothing is measured there."""


Bits = Mapping[Site, float]
"""Site -> bits per token of its codec; what is not named stays exact."""


@dataclass(frozen=True)
class Footprint:
    """What a plan makes of a model's cache, tokens that can still be read counted.

    (After a long prefill transformers' own sliding-window layers keep the whole of it alive until the next token;
    `LeanCache.nbytes()` shows that, these figures do not.)

    Attributes:
        geometry: the model's.
        bits: site -> bits per token.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
    """

    geometry: Geometry
    bits: Bits
    sinks: int
    window: int

    def base_bytes(self, tokens: int) -> int:
        """Bytes of the 16-bit cache after `tokens` tokens, one sequence."""
        return sum(
            layer.tokens_held(tokens) * layer.width_of(part) * BYTES_16_BIT
            for layer in self.geometry.layers
            for part in PARTS
        )

    def compressed_bytes(self, tokens: int) -> float:
        """Bytes of the compressed cache after `tokens` tokens, sinks, window and uncompressed layers counted."""
        total = 0.0
        for number, layer in enumerate(self.geometry.layers):
            held = layer.tokens_held(tokens)
            # In a sliding-window layer the sinks have left the cache once more tokens came than it holds.
            sinks = max(self.sinks - (tokens - held), 0)
            exact = min(held, sinks + self.window)
            for part in PARTS:
                bits = self.bits.get(Site(number, part))
                vector = layer.width_of(part) * BYTES_16_BIT
                total += held * vector if bits is None else exact * vector + (held - exact) * bits / 8
        return total

    def cache_ratio(self, tokens: int) -> float:
        """Cache ratio at `tokens` tokens: bytes of the whole 16-bit cache over bytes of the whole compressed one."""
        return self.base_bytes(tokens) / self.compressed_bytes(tokens)

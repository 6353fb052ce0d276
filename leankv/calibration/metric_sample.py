"""What an error metric is estimated from: which of a model's cached vectors, on which text."""

from collections.abc import Sequence
from dataclasses import dataclass

from leankv.data.blocks import Blocks
from leankv.models.rope import KeyRotation


@dataclass(frozen=True)
class MetricSample:
    """The cached vectors that error metrics are estimated from.

    Attributes:
        blocks: calibration text.
        layers: of which layers.
        rotation: given, keys are pre-RoPE.
        sinks: first tokens of each block, which are held exact and not counted.
        seed: of what is drawn.
    """

    blocks: Blocks
    layers: Sequence[int]
    rotation: KeyRotation | None
    sinks: int
    seed: int

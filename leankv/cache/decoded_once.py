"""A part store that keeps what it decoded: for measuring, where a text is fed in many chunks and time is what counts.

A cache that is used decodes all its codes at every step and holds nothing else. Measuring a block of 4,096 tokens in
chunks of 128 so decodes each vector up to 31 times. This store decodes it once and keeps it beside its code.
"""

import torch

from leankv.cache.code_runs import CodeRuns
from leankv.cache.part_store import PartStore, Rows
from leankv.codecs import Codec


class DecodedOnceStore(PartStore):
    """As `PartStore`, and hands out the same numbers but for the last bits of products over other rows at a time.

    What is read of earlier sites is the vectors that were decoded in the same step, so sources are stores of this kind
    with the same sinks and window. What drops or reorders tokens makes it decode all of them anew.
    """

    keeps_decoded = True

    def clear(self) -> None:
        super().clear()
        self._decoded: torch.Tensor | None = None  # [B, heads, coded tokens, head_dim], as attention reads them

    def keep(self, start: int, stop: int) -> None:
        before = len(self)
        super().keep(start, stop)
        if len(self) != before:
            self._decoded = None

    def index(self, rows: torch.Tensor) -> None:
        super().index(rows)
        self._decoded = None

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._decoded = None

    def _read_codes(self, codec: Codec, code: CodeRuns, into: Rows, shown: list[torch.Tensor]) -> int:
        done = 0 if self._decoded is None else self._decoded.shape[2]
        if self._decoded is not None:
            into[:, :, :done] = self._decoded
        if done < code.shape[1]:
            self._decode(codec, code, done, into, shown)
            self._decoded = into.clone()
        return done

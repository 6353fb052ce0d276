"""What stores show each other within a forward pass: the vectors that codecs of later sites predict from."""

from collections.abc import Sequence

import torch
from jaxtyping import Float16

Shown = Float16[torch.Tensor, "batch tokens width"]


class CrossLayer:
    """One store's side of the protocol: what it sees of earlier sites, and what it shows to later ones.

    In every forward pass the stores are read one after another, each after its sources. When one is read it shows its
    vectors (`show`), if it has readers, and lets go of its sources; a source forgets what it showed when its last
    reader has let go. So nothing of this is held between two steps.

    Args:
        sources: of the sites whose vectors the codec predicts from, in the order in which it was fitted to them.
    """

    def __init__(self, sources: Sequence["CrossLayer"] = ()):
        self.sources = sources
        self.readers = 0  # stores that have this one among their sources
        for source in sources:
            source.readers += 1
        self.clear()

    def clear(self) -> None:
        """Forget what is shown."""
        self._left = 0  # readers that are still to come in this forward pass
        self._shown: torch.Tensor | None = None  # [B, tokens, W], until the last reader of a step took it
        self._first = 0  # which token of the sequence it begins with

    def known(self, first: int, count: int, batch: int, device: torch.device) -> Float16[torch.Tensor, "tokens known"]:
        """What the sources show of `count` tokens from token `first` on, `[B * count, R]`; in a first layer R is 0."""
        shown = [source.context(first, count).to(device) for source in self.sources]
        nothing = torch.empty(batch, count, 0, dtype=torch.float16, device=device)
        return torch.cat([nothing, *shown], dim=2).flatten(0, 1)

    def context(self, first: int, count: int) -> Shown:
        """Tokens from `first` on as they are shown, `[B, count, W]`."""
        assert self._shown is not None, "a source is read before the stores that predict from it"
        start = first - self._first
        return self._shown[:, start : start + count]

    def show(self, pieces: Sequence[Float16[torch.Tensor, "batch _ width"]], first: int) -> None:
        """Show vectors, behind each other, of which the first is token `first`; and let go of the sources."""
        for source in self.sources:
            source.release()
        self._left, self._first = self.readers, first
        self._shown = torch.cat(list(pieces), dim=1) if len(pieces) > 1 else pieces[0] if pieces else None

    def offer(self, shown: Shown | None, first: int) -> None:
        """Show vectors, of which the first is token `first`, that are filled in while the sources are still read."""
        self._left, self._first, self._shown = self.readers, first, shown

    def end(self) -> None:
        """Let go of the sources: what was offered is complete."""
        for source in self.sources:
            source.release()

    def release(self) -> None:
        """One of the readers has what it needs for this forward pass."""
        self._left -= 1
        if self._left == 0:
            self._shown = None

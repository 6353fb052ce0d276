"""Base and compressed model over the same blocks, side by side: perplexity of both, and how far they are apart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int

from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.divergence import Divergence, divergence_from, divergence_of
from leankv.evaluation.exact_prefixes import ExactPrefixes
from leankv.evaluation.perplexity import (
    LOGIT_ROWS,
    BlockNats,
    check_finite,
    feed,
    feeding_of,
    label_nats,
    log_probabilities,
    run_through,
    sum_by_block,
)


@dataclass(frozen=True)
class PairedRun:
    """What one pass of both models gave.

    Attributes:
        base: the uncompressed model's nats, those of `measure_nats` to the last bit; its `seconds` are of both runs.
        compressed: the same with the compressed cache.
        divergence: how far the two are apart.
    """

    base: BlockNats
    compressed: BlockNats
    divergence: Divergence

    @property
    def seconds(self) -> float:
        """Time that both runs took, side by side."""
        return self.base.seconds

    def cell(self) -> dict[str, Any]:
        """As a cell holds it."""
        parts = {"base": self.base.cell(), "compressed": self.compressed.cell()}
        return {**parts, "divergence": asdict(self.divergence)}

    @classmethod
    def from_cell(cls, cell: Mapping[str, Any]) -> "PairedRun":
        """Read back what `cell` gives."""
        base, compressed = (BlockNats.from_cell(cell[run]) for run in ("base", "compressed"))
        return cls(base, compressed, divergence_from(cell["divergence"]))


@torch.no_grad()
def measure_pair(
    model: Any,
    blocks: Blocks,
    protocol: ProtocolConfig,
    base_pass: BasePass,
    make_cache: Callable[[], Any],
    on_block: Callable[[], None] = lambda: None,
    prefixes: ExactPrefixes | None = None,
) -> PairedRun:
    """Feed every block to the model twice, piece by piece in turn, and compare what it predicts.

    Of the logits, `leankv.models.logits.HEAD_ROWS` tokens of each run are held at a time. Divergences are taken from
    float32 log-probabilities, so they are known to about 1e-6 nats a token, and summed in float64.

    Args:
        model: a causal LM in eval mode.
        blocks: `[blocks, block_length]` tokens.
        protocol: how the blocks are fed.
        base_pass: of this model; what it keeps of a block serves the plans to come.
        make_cache: a fresh cache for a batch of blocks, the compressed one.
        on_block: called after each block.
        prefixes: as in `measure_nats`.

    Raises:
        UserError: the loss of a block, or the divergence, is not finite, or blocks are too short for the protocol.
    """
    started = time.monotonic()
    base: list[float] = []
    compressed: list[float] = []
    seen: list[torch.Tensor] = []
    feeding = feeding_of(protocol, blocks.tokens.shape[1])
    for batch in blocks.tokens.split(protocol.batch_size):
        total = torch.zeros(2, len(batch), dtype=torch.float64)
        pieces = []
        tokens = batch.to(model.device)
        runs = [base_pass.run(tokens, feeding), run_through(model, make_cache(), protocol.coded_after, prefixes)]
        for labels, logits in feed(tokens, feeding, runs):
            nats, apart = _compared(logits[0], logits[1], labels)
            total += nats
            pieces.append(apart)
        apart = torch.cat(pieces, dim=2)
        check_finite(total.sum(dim=0) + apart[0].sum(dim=1), len(base), blocks)
        base += total[0].tolist()
        compressed += total[1].tolist()
        seen.append(apart)
        for _ in batch:
            on_block()
    kl, same, change = torch.cat(seen, dim=1).numpy()
    seconds = time.monotonic() - started
    return PairedRun(
        BlockNats(tuple(base), kl.shape[1], seconds),
        BlockNats(tuple(compressed), kl.shape[1], seconds),
        divergence_of(kl, same.astype(bool), change),
    )


def _compared(
    base: Float[torch.Tensor, "B n V"], other: Float[torch.Tensor, "B n V"], labels: Int[torch.Tensor, "B n"]
) -> tuple[Float64[torch.Tensor, "2 B"], Float64[torch.Tensor, "3 B n"]]:
    """Logits of both runs and the next tokens -> sums of nats, and what sets the runs apart.

    Returns:
        Nats of the base and of the other; and KL divergence, 1 where the likeliest token is the
        same, change of the true token's probability, token by token. All on the CPU.
    """
    nats, apart = [], []
    rows = (tensor.flatten(0, 1).split(LOGIT_ROWS) for tensor in (base, other))
    for base_rows, other_rows, own in zip(*rows, labels.flatten().split(LOGIT_ROWS), strict=True):
        log_p, log_q = log_probabilities(base_rows), log_probabilities(other_rows)
        p = log_p.exp()
        # What the base model rules out counts nothing, whatever the other says of it (0 ln 0 = 0).
        kl = (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(dim=1, dtype=torch.float64)
        same = base_rows.argmax(dim=1) == other_rows.argmax(dim=1)
        both = torch.stack([label_nats(log_p, own), label_nats(log_q, own)])
        probability = torch.exp(-both.double())
        nats.append(both)
        apart.append(torch.stack([kl, same.double(), probability[1] - probability[0]]))
    sums = [sum_by_block(each, labels.shape) for each in torch.cat(nats, dim=1)]
    return torch.stack(sums), torch.cat(apart, dim=1).unflatten(1, labels.shape).cpu()

"""Free running: what the compressed model says by itself, against what the base model says.

Perplexity feeds the true tokens, so an error cannot add up. Here each model goes on from a prompt by itself, greedily
and token by token (protocol `decode`), and reads what it wrote.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int

from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.models.structure import max_positions
from leankv.report.evaluation import FreeRun
from leankv.search.statistics import t_interval


def prompts_of(model: Any, blocks: Blocks, new_tokens: int) -> Int[torch.Tensor, "blocks half"]:
    """The first half of each block.

    Raises:
        UserError: with the continuation it is longer than the model's positions reach.
    """
    prompts = blocks.tokens[:, : blocks.tokens.shape[1] // 2]
    positions = max_positions(model.config)
    if positions is not None and prompts.shape[1] + new_tokens > positions:
        raise UserError(
            f"prompts of {prompts.shape[1]} tokens (half a block) and {new_tokens} more are beyond the model's "
            f"{positions} positions; use a smaller --free-run or --block-length"
        )
    return prompts


@torch.no_grad()
def free_run(
    model: Any,
    prompts: Int[torch.Tensor, "prompts T"],
    new_tokens: int,
    batch_size: int,
    make_base: Callable[[], Any],
    make_cache: Callable[[], Any],
    on_prompt: Callable[[], None] = lambda: None,
    chunk: int | None = None,
) -> FreeRun:
    """Continue each prompt greedily through both caches with `generate`, and compare token by token.

    A prompt is read in one pass unless told otherwise, as `generate` reads it: in a cache of ours, what it attends to
    has gone through the codecs, but for sinks and window; other caches may hand it out exact. A token that ends a text
    ends nothing here, so that all continuations are of one length. The model's own generation settings apply otherwise.

    Args:
        model: a causal LM in eval mode.
        prompts: the tokens that both begin with.
        new_tokens: how many tokens to generate.
        batch_size: prompts continued together.
        make_base: a fresh cache for a batch of prompts, of the base run.
        make_cache: likewise of the compressed one.
        on_prompt: called after each prompt.
        chunk: tokens of a prompt read at a time; None for all at once.
    """

    def continued(batch: torch.Tensor, cache: Any) -> torch.Tensor:
        output = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            prefill_chunk_size=chunk,
        )
        new: torch.Tensor = output[:, batch.shape[1] :]
        return new

    equal = []
    for batch in prompts.split(batch_size):
        tokens = batch.to(model.device)
        equal.append((continued(tokens, make_base()) == continued(tokens, make_cache())).cpu())
        for _ in batch:
            on_prompt()
    return agreement(torch.cat(equal), prompts.shape[1])


def agreement(equal: Bool[torch.Tensor, "prompts new_tokens"], prompt_tokens: int) -> FreeRun:
    """The figures from which tokens are the same, after prompts of `prompt_tokens`."""
    shares = (100 * equal.double().mean(dim=1)).tolist()
    same_before = equal.long().cumprod(dim=1).sum(dim=1).tolist()
    interval = t_interval(shares)
    return FreeRun(
        prompts=len(equal),
        prompt_tokens=prompt_tokens,
        new_tokens=equal.shape[1],
        equal_percent=statistics.fmean(shares),
        equal_interval=None if interval is None else (max(interval[0], 0.0), min(interval[1], 100.0)),
        first_difference=statistics.median(same_before),
        without_difference=same_before.count(equal.shape[1]),
    )

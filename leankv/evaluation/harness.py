"""lm-evaluation-harness (`lm_eval`), reading a KV cache of one's choice.

The harness asks a model for likelihoods in one pass over the whole text, without a cache of ours, and for completions
after one pass over the whole prompt. A cache hands out what it was just given, and many hand it out exact: so a
compressed cache shows no loss in a likelihood task, and little in a completion, whose first token has then read nothing
compressed. Here both feed the tokens chunk by chunk through a cache that the caller makes: protocol `stream` of
`leankv.evaluation.perplexity`. It works with any cache that transformers takes:

    lm = CacheLM(model, tokenizer, lambda mask: QuantizedCache("hqq", model.config))
    lm_eval.simple_evaluate(lm, tasks=["gsm8k"])
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from leankv.storage.lines import Lines

MakeCache = Callable[[Int[torch.Tensor, "B T"] | None], Any]
"""The prompt's attention mask, 0 at its left padding, or None where nothing is padded on the left -> a fresh cache."""


class CacheLM(HFLM):
    """The harness's own model class, with a cache under it.

    Likelihoods of texts and completions of prompts are those of HFLM otherwise; the batch is padded on the right for
    likelihoods, on the left for completions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        make_cache: MakeCache,
        *,
        chunk: int = 128,
        batch_size: int = 1,
        responses: Lines | None = None,
    ):
        """
        Args:
            model: a causal LM in eval mode.
            tokenizer: its tokenizer.
            make_cache: a fresh transformers cache for a batch.
            chunk: tokens fed at a time.
            batch_size: texts read together.
            responses: where answers are kept and found again, of this model and cache alone: the harness names a
                response by what was asked, whoever answered it.
        """
        with quietly():  # it warns of a model that is handed in loaded
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.make_cache = make_cache
        self.chunk = chunk
        self.responses = responses
        if responses is not None:
            self.set_cache_hook(_Hook(responses))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness has it; what was answered before is looked up."""
        answers = self._answered("loglikelihood", requests, lambda new: super(CacheLM, self).loglikelihood(new))
        return [(float(nats), bool(greedy)) for nats, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As the harness has it; what was answered before is looked up."""
        kind = "loglikelihood_rolling"
        return self._answered(kind, requests, lambda new: super(CacheLM, self).loglikelihood_rolling(new))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As the harness has it; what was answered before is looked up, but for what is sampled."""
        return self._answered("generate_until", requests, lambda new: super(CacheLM, self).generate_until(new))

    def _answered(
        self, kind: str, requests: Sequence[Instance], answer: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """The answers to some requests, in order; the hook keeps new ones as they come."""
        known = self.responses
        if known is None:
            return answer(list(requests))
        missing = [one for one in requests if _is_sampled(one) or [kind, *one.args] not in known]
        found = iter(answer(missing) if missing else [])
        new = {id(one) for one in missing}
        return [next(found) if id(one) in new else known.get([kind, *one.args]) for one in requests]

    def _model_call(
        self,
        inps: Int[torch.Tensor, "B T"],
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Float[torch.Tensor, "B T vocabulary"]:
        """Logits of all tokens, each chunk having read those before it from the cache."""
        assert attn_mask is None, "only encoders have one"
        assert labels is None, "only encoders have some"
        cache = self.make_cache(None)
        with torch.no_grad():
            pieces = [
                self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in inps.split(self.chunk, dim=1)
            ]
        return torch.cat(pieces, dim=1)

    def _model_generate(
        self, context: Int[torch.Tensor, "B T"], max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Int[torch.Tensor, "B longer"]:
        """Prompts and their completions; the prompt too is read chunk by chunk."""
        mask = generation_kwargs.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        return super()._model_generate(
            context,
            max_length,
            stop,
            past_key_values=self.make_cache(mask if padded else None),
            prefill_chunk_size=self.chunk,
            **generation_kwargs,
        )


class _Hook:
    """What the harness calls with each answer as it comes."""

    def __init__(self, responses: Lines):
        self.responses = responses

    def add_partial(self, kind: str, asked: Any, answer: Any) -> None:
        if not (kind == "generate_until" and asked[1].get("do_sample")):
            self.responses.put([kind, *asked], answer)


def _is_sampled(request: Instance) -> bool:
    return request.request_type == "generate_until" and bool(request.args[1].get("do_sample"))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what the harness prints, logs and shows bars of while it looks for tasks, loads and draws."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

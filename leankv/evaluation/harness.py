"""lm-evaluation-harness (`lm_eval`), reading a KV cache of one's choice.

The harness asks a model for likelihoods in one pass over the whole text, without a cache of ours, and for completions
after one pass over the whole prompt. A cache hands out what it was just given, and many hand it out exact: so a
compressed cache shows no loss in a likelihood task, and little in a completion, whose first token has then read nothing
compressed. Here both feed the tokens chunk by chunk through a cache that the caller makes: protocol `stream` of
`leankv.evaluation.perplexity`. It works with any cache that transformers takes:

    lm = CacheLM(model, tokenizer, lambda: QuantizedCache("hqq", model.config))
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


class CacheLM(HFLM):
    """The harness's own model class, with a cache under it.

    Likelihoods of texts and completions of prompts are those of HFLM otherwise. Texts of different lengths are read
    together for likelihoods, padded on the right, and one by one for completions: padding on the left would have to be
    held, and by some caches is held exact together with what stands beside it in other rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        make_cache: Callable[[], Any],
        *,
        chunk: int = 128,
        batch_size: int = 1,
        max_length: int | None = None,
        responses: Lines | None = None,
    ):
        """
        Args:
            model: a causal LM in eval mode.
            tokenizer: its tokenizer.
            make_cache: a fresh transformers cache for a batch.
            chunk: tokens fed at a time.
            batch_size: texts read together.
            max_length: tokens beyond which the harness cuts texts at their beginning; unless given, as far as the
                model's positions reach.
            responses: where answers are kept and found again, of this model and cache alone: the harness names a
                response by what was asked, whoever answered it. Not for answers that are drawn at random.
        """
        with quietly():  # it warns of a model that is handed in loaded
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
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
        """As the harness has it; what was answered before is looked up."""
        return self._answered("generate_until", requests, lambda new: super(CacheLM, self).generate_until(new))

    def _answered(
        self, kind: str, requests: Sequence[Instance], answer: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """The answers to some requests, in order; the hook keeps new ones as they come."""
        known = self.responses
        if known is None:
            return answer(list(requests))
        missing = [one for one in requests if [kind, *one.args] not in known]
        if missing:
            answer(missing)
        return [known.get([kind, *one.args]) for one in requests]

    def _model_call(
        self,
        inps: Int[torch.Tensor, "B T"],
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Float[torch.Tensor, "B T vocabulary"]:
        """Logits of all tokens, each chunk having read those before it from the cache."""
        assert attn_mask is None, "only encoders have one"
        assert labels is None, "only encoders have some"
        cache = self.make_cache()
        with torch.no_grad():
            pieces = [
                self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in inps.split(self.chunk, dim=1)
            ]
        return torch.cat(pieces, dim=1)

    def _model_generate(
        self, context: Int[torch.Tensor, "B T"], max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Int[torch.Tensor, "B longer"]:
        """Prompts and their completions; the prompts too are read chunk by chunk."""
        mask = generation_kwargs.pop("attention_mask")
        if bool(mask.all()):
            return self._completed(context, max_length, stop, generation_kwargs)
        new_tokens, rows = max_length - context.shape[1], []
        for row, own in zip(context, mask.bool(), strict=True):
            prompt = row[own][None]
            completed = self._completed(prompt, prompt.shape[1] + new_tokens, stop, generation_kwargs)
            rows.append(torch.cat([row, completed[0, prompt.shape[1] :]]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _completed(
        self, context: Int[torch.Tensor, "B T"], max_length: int, stop: list[str], given: dict[str, Any]
    ) -> Int[torch.Tensor, "B longer"]:
        return super()._model_generate(
            context,
            max_length,
            stop,
            attention_mask=torch.ones_like(context),
            past_key_values=self.make_cache(),
            prefill_chunk_size=self.chunk,
            **given,
        )


class _Hook:
    """What the harness calls with each answer as it comes."""

    def __init__(self, responses: Lines):
        self.responses = responses

    def add_partial(self, kind: str, asked: Any, answer: Any) -> None:
        self.responses.put([kind, *asked], answer)


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

"""Generating text through a compressed cache, and what the cache held."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from transformers import TextStreamer

from leankv.cache.code_attention import attention_over_codes
from leankv.cache.lean_cache import LeanCache
from leankv.config.plan_table import PARTS
from leankv.errors import UserError
from leankv.models.loading import LoadedModel


@dataclass(frozen=True)
class Completion:
    """A completion.

    Attributes:
        text: what was generated, the prompt left out.
        ids: token ids of prompt and completion, on the CPU.
        tokens: tokens that the cache held at the end.
        tokens_at_start: tokens that it held when the prompt came.
        cache_bytes: bytes that the compressed cache held then (measured).
        uncompressed_bytes: what the stock cache holds for as many tokens in the model's dtype.
        seconds_to_first_token: from the call to the first generated token.
        tokens_per_second: generated tokens over the time of the whole call, prompt included.
    """

    text: str
    ids: Int[torch.Tensor, "1 T"]
    tokens: int
    tokens_at_start: int
    cache_bytes: int
    uncompressed_bytes: int
    seconds_to_first_token: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """All but the token ids."""
        return {name: value for name, value in vars(self).items() if name != "ids"}


class _Callback(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first_token: float | None = None  # when it came, on the monotonic clock

    def put(self, value: torch.Tensor) -> None:
        if self.first_token is None and not self.next_tokens_are_prompt:
            self.first_token = time.monotonic()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def encoded(loaded: LoadedModel, prompt: str, chat: bool) -> Int[torch.Tensor, "1 T"]:
    """Token ids of a prompt, plain or as the user's turn in the tokenizer's chat template.

    Raises:
        UserError: it has no tokens, or there is no template.
    """
    tokenizer = loaded.tokenizer
    if chat and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {loaded.name} has no chat template; leave --chat out")
    ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}]) if chat else tokenizer(prompt)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty; give some text to go on from")
    return torch.tensor([ids])


def chat_ids(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of turns in the tokenizer's chat template, up to where an answer begins."""
    ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


@torch.no_grad()
def complete(
    loaded: LoadedModel,
    cache: LeanCache,
    input_ids: Int[torch.Tensor, "1 T"],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None],
) -> Completion:
    """Generate a completion through `cache`, handing text to `on_text` as it comes.

    Args:
        loaded: the model.
        cache: a fresh cache, or one that holds the first tokens of the prompt.
        input_ids: of the prompt; the last is not in the cache yet.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token; otherwise samples.
        seed: for sampling.
        on_text: gets pieces of text.
    """
    tokenizer, inputs = loaded.tokenizer, input_ids.to(loaded.model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    held_at_start = cache.get_seq_length()
    callback = _Callback(tokenizer, on_text)
    started = time.monotonic()
    with attention_over_codes(loaded.model):
        output = loaded.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=callback,
            **sampling,
        )
    seconds = time.monotonic() - started
    new = output[0, inputs.shape[1] :]
    tokens = cache.get_seq_length()
    held = sum(layer.width_of(part) * layer.tokens_held(tokens) for layer in loaded.geometry.layers for part in PARTS)
    return Completion(
        text=tokenizer.decode(new, skip_special_tokens=True),
        ids=output.cpu(),
        tokens=tokens,
        tokens_at_start=held_at_start,
        cache_bytes=cache.nbytes(),
        uncompressed_bytes=held * loaded.model.dtype.itemsize,
        seconds_to_first_token=(callback.first_token or time.monotonic()) - started,
        tokens_per_second=len(new) / seconds,
    )


@torch.no_grad()
def base_text(loaded: LoadedModel, input_ids: Int[torch.Tensor, "1 T"], max_new_tokens: int) -> str:
    """What the uncompressed model goes on with, taking the likeliest tokens."""
    inputs = input_ids.to(loaded.model.device)
    output = loaded.model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False
    )
    return str(loaded.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))


def format_completion(completion: Completion, dtype: str) -> str:
    """One sentence on what the cache held, and where it began."""
    held, whole = completion.cache_bytes, completion.uncompressed_bytes
    times = f"{whole / held:.2f}x" if held else "nothing is held"  # by `mean` everywhere, without sinks and window
    return (
        f"{completion.tokens} tokens: the compressed cache held {held:,} bytes, the uncompressed one "
        f"({dtype}) holds {whole:,} ({times}); {completion.tokens_at_start} tokens were there at the start, "
        f"first token after {completion.seconds_to_first_token:.2f} s, "
        f"{completion.tokens_per_second:.1f} tokens/s"
    )

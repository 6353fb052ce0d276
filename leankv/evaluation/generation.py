"""Generating text through a compressed cache, and what the cache held."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from leankv.cache.code_attention import attention_over_codes
from leankv.cache.lean_cache import LeanCache
from leankv.config.plan_table import PARTS
from leankv.models.loading import LoadedModel


@dataclass(frozen=True)
class Completion:
    """A completion.

    Attributes:
        text: what was generated, the prompt left out.
        tokens: tokens that the cache held at the end.
        cache_bytes: bytes that the compressed cache held then (measured).
        uncompressed_bytes: what the stock cache holds for as many tokens in the model's dtype.
        tokens_per_second: generated tokens over the time of the whole call, prompt included.
    """

    text: str
    tokens: int
    cache_bytes: int
    uncompressed_bytes: int
    tokens_per_second: float


class _Callback(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


@torch.no_grad()
def complete(
    loaded: LoadedModel,
    cache: LeanCache,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    seed: int,
    on_text: Callable[[str], None],
) -> Completion:
    """Generate a completion of `prompt` through `cache`, handing text to `on_text` as it comes.

    Args:
        loaded: the model.
        cache: a fresh cache.
        prompt: plain text, or with `chat` the user's turn in the tokenizer's chat template.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token; otherwise samples.
        chat: see `prompt`.
        seed: for sampling.
        on_text: gets pieces of text.
    """
    tokenizer = loaded.tokenizer
    if chat:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(loaded.model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    started = time.monotonic()
    with attention_over_codes(loaded.model):
        output = loaded.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=_Callback(tokenizer, on_text),
            **sampling,
        )
    seconds = time.monotonic() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    tokens = cache.get_seq_length()
    held = sum(layer.width_of(part) * layer.tokens_held(tokens) for layer in loaded.geometry.layers for part in PARTS)
    return Completion(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=tokens,
        cache_bytes=cache.nbytes(),
        uncompressed_bytes=held * loaded.model.dtype.itemsize,
        tokens_per_second=len(new) / seconds,
    )


def format_completion(completion: Completion, dtype: str) -> str:
    """One sentence on what the cache held."""
    ratio = completion.uncompressed_bytes / completion.cache_bytes
    return (
        f"{completion.tokens} tokens: the compressed cache held {completion.cache_bytes:,} bytes, the uncompressed one "
        f"({dtype}) holds {completion.uncompressed_bytes:,} ({ratio:.2f}x); {completion.tokens_per_second:.1f} tokens/s"
    )

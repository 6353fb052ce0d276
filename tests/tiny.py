"""Tiny models built from configurations, a tiny tokenizer, and text: everything tests need without a download."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # Weights of the usual 0.02 make a tiny model that hardly attends; larger ones make caches that matter.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=12),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        sliding_window=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=32,
        n_layer=4,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
"""The architectures that every test of the cache and of perplexity goes through."""

OTHERS: dict[str, Any] = {
    # Keys of 16 numbers a head, values of 12; twice as many heads of both in sliding layers.
    "mimo": lambda: transformers.MiMoV2FlashConfig(
        **COMMON,
        v_head_dim=12,
        sliding_window=12,
        layer_types=["full_attention", "sliding_attention"] * 2,
        mlp_layer_types=["dense"] * 4,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    ),
}
"""Architectures that some tests build by name."""


def with_each(recipes: Sequence[str], everywhere: str) -> list[tuple[str, str]]:
    """Architectures and recipes to go through together.

    A codec sees vectors; what an architecture changes is which layers slide and whether keys are rotated. So all
    recipes run where there are layers of both kinds and where nothing is rotated, and on the others one.
    """
    return [
        (architecture, recipe)
        for architecture in ARCHITECTURES
        for recipe in recipes
        if recipe == everywhere or architecture in ("gemma3", "gpt2")
    ]


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny float32 model of an architecture named above, in eval mode, always the same for one seed."""
    config = (ARCHITECTURES | OTHERS)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokenizer() -> Any:
    """A byte-level tokenizer without merges: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>")


def save(folder: Path, model: Any) -> Path:
    """Save a model with the tiny tokenizer, as `from_pretrained` reads it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(characters: int, seed: int = 0) -> str:
    """Paragraphs of made-up words, with enough structure for keys and values to be compressible."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 7))) for _ in range(80)]
    paragraphs: list[str] = []
    length = 0
    while length < characters:
        paragraphs.append(" ".join(rng.choices(words, weights=range(len(words), 0, -1), k=rng.randint(20, 60))) + ".")
        length += len(paragraphs[-1]) + 1
    return "\n".join(paragraphs)


def tokens(blocks: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[blocks, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 257, (blocks, length), generator=generator)

"""Free running: against plain loops over forward passes, and the figures from known agreements."""

from typing import Any

import pytest
import torch
from scipy import stats

from leankv import UserError
from leankv.cache.lean_cache import LeanCache
from leankv.data.blocks import Blocks
from leankv.evaluation.free_run import agreement, free_run, prompts_of
from leankv.report.evaluation import free_run_rows
from tests import tiny
from tests.oracles import Rounding, SlowCache, identity_plan, plan_of

pytestmark = pytest.mark.whole_runs

NEW_TOKENS = 10


@pytest.fixture
def prompts() -> torch.Tensor:
    """Longer than the sliding window."""
    return tiny.tokens(4, 14)


@torch.no_grad()
def by_hand(model: Any, prompt: torch.Tensor, cache: Any) -> list[int]:
    """The likeliest token after the prompt, fed back, and so on."""
    inputs, said = prompt[None], []
    for _ in range(NEW_TOKENS):
        token = model(inputs, past_key_values=cache, use_cache=True).logits[0, -1].argmax()
        said.append(int(token))
        inputs = token[None, None]
    return said


@torch.no_grad()
def by_hand_without_cache(model: Any, prompt: torch.Tensor) -> list[int]:
    text = prompt[None]
    for _ in range(NEW_TOKENS):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return text[0, len(prompt) :].tolist()


def test_identity_codecs_say_the_same(model: Any, prompts: torch.Tensor) -> None:
    ran = free_run(
        model,
        prompts,
        NEW_TOKENS,
        1,
        lambda: LeanCache(model.config, {}, sinks=0, window=0),
        lambda: LeanCache(model.config, identity_plan(model), sinks=2, window=5),
    )
    assert ran.equal_percent == 100
    assert ran.equal_interval == (100, 100)
    assert ran.first_difference == NEW_TOKENS
    assert ran.without_difference == ran.prompts == len(prompts)
    assert ("first difference, median", "none") in free_run_rows(ran)


def test_lossy_codecs_say_what_a_loop_over_forward_passes_says(model: Any, prompts: torch.Tensor) -> None:
    plan = plan_of(model, Rounding)
    base = [by_hand_without_cache(model, prompt) for prompt in prompts]
    lossy = [by_hand(model, prompt, SlowCache(model.config, plan, 2, 5)) for prompt in prompts]
    equal = torch.tensor(base) == torch.tensor(lossy)
    assert not equal.all()  # so that the following says something
    for batch_size in (1, 2):
        steps: list[int] = []
        ran = free_run(
            model,
            prompts,
            NEW_TOKENS,
            batch_size,
            lambda: LeanCache(model.config, {}, sinks=0, window=0),
            lambda: LeanCache(model.config, plan, sinks=2, window=5),
            lambda steps=steps: steps.append(1),
        )
        assert ran == agreement(equal, prompts.shape[1])
        assert len(steps) == len(prompts)


def test_a_token_that_ends_texts_ends_nothing(prompts: torch.Tensor) -> None:
    model = tiny.build("llama")
    model.generation_config.eos_token_id = by_hand_without_cache(model, prompts[0])[2]
    ran = free_run(
        model,
        prompts[:1],
        NEW_TOKENS,
        1,
        lambda: LeanCache(model.config, {}, sinks=0, window=0),
        lambda: LeanCache(model.config, identity_plan(model), sinks=0, window=0),
    )
    assert ran.new_tokens == NEW_TOKENS


def test_the_figures_of_known_agreements() -> None:
    rows = [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]]
    ran = agreement(torch.tensor(rows, dtype=torch.bool), prompt_tokens=7)
    shares = [100.0, 75.0, 75.0, 25.0]
    low = stats.ttest_1samp(shares, 0).confidence_interval(0.95).low
    assert ran.equal_percent == pytest.approx(68.75)
    assert ran.equal_interval == pytest.approx((low, 100.0))  # cut off: no share is larger
    assert ran.first_difference == 1.5  # of 4 (none), 2, 0 and 1
    assert ran.without_difference == 1
    assert (ran.prompts, ran.prompt_tokens, ran.new_tokens) == (4, 7, 4)
    assert ("first difference, median", "after 1.5 equal tokens") in free_run_rows(ran)


def test_one_prompt_has_no_interval() -> None:
    ran = agreement(torch.tensor([[True, False]]), 3)
    assert ran.equal_interval is None
    assert any("not known" in text for _, text in free_run_rows(ran))


def test_prompts_are_the_first_halves_and_stay_within_the_models_positions() -> None:
    model, blocks = tiny.build("gpt2"), Blocks(tiny.tokens(2, 41), "report", "random tokens")
    assert torch.equal(prompts_of(model, blocks, 492), blocks.tokens[:, :20])
    with pytest.raises(UserError, match="beyond the model's 512 positions"):
        prompts_of(model, blocks, 493)

"""Training all codecs of a plan together, for what the model says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, PlanSpec, Site
from leankv.cache.trainable_cache import TrainableCache
from leankv.calibration.distillation import Distillation
from leankv.codecs import FitData, TrainingSettings, parse_recipe
from leankv.codecs.trainable import trainable
from leankv.errors import UserError
from tests import tiny
from tests.test_share import captured, context_of, fitted, rotation_of

RECIPES = ["transform:s0.3", "share:-2q4", "share:-1r3q8", "share:-1r3", "resid(share:-2q4,transform:s0.3)"]
SPEC = PlanSpec.uniform("resid(share:-1q8,transform:s0.4)")
TRAINING = TrainingSettings(epochs=1, batch_tokens=32, learning_rate=1e-2, seed=0)


def data(seed: int = 0) -> FitData:
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(1, 600, 80, generator=generator)
    x = known[..., :16] * 0.7 + torch.randn(1, 600, 16, generator=generator) * torch.logspace(0.5, -1, 16)
    return FitData(x[:, :400], x[:, 400:], context=known[:, :400], heldout_context=known[:, 400:], training=TRAINING)


@pytest.mark.parametrize("text", RECIPES)
def test_it_begins_as_the_codec_is_and_settles_as_what_it_is(text: str) -> None:
    """Vectors and bits are those of the codec, before training; and afterwards, of the codec that it becomes."""
    own = data()
    (codec,) = parse_recipe(text).fit(own)
    trained = trainable(codec)
    x, context = own.heldout[0], own.heldout_context[0]
    for _ in range(2):
        read, bits = trained(x, context)
        torch.testing.assert_close(read, codec.decode(codec.encode(x, context), context), rtol=0, atol=1e-4)
        assert float(bits.detach()) / len(x) == pytest.approx(codec.stored_bits_per_token, abs=0.5)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
        settled = trained.settled(own)
        assert all(torch.equal(codec.state_dict()[name], tensor) for name, tensor in before.items())
        assert settled.recipe == codec.recipe
        codec, trained = settled, trainable(settled)


@pytest.mark.parametrize("text", RECIPES[:-1])  # the second stage of `resid` undoes it: it codes what the first leaves
def test_training_moves_what_is_read_to_where_it_is_wanted(text: str) -> None:
    """A tenth further from the mean: what is decoded goes there, and the codec that it becomes decodes the same."""
    own = data()
    (codec,) = parse_recipe(text).fit(own)
    trained, mean = trainable(codec), own.train[0].mean(dim=0)
    x, context = own.train[0], own.context[0]
    wanted = mean + 1.1 * (codec.decode(codec.encode(x, context), context) - mean)
    adam = torch.optim.Adam(trained.parameters(), lr=0.05)
    before = (trained(x, context)[0] - wanted).square().mean()
    for _ in range(60):
        adam.zero_grad()
        (trained(x, context)[0] - wanted).square().mean().backward()
        adam.step()
    after, settled = (trained(x, context)[0] - wanted).square().mean(), trained.settled(own)
    assert after < 0.5 * before
    read = settled.decode(settled.encode(x, context), context)
    assert (read - wanted).square().mean() == pytest.approx(after.item(), abs=0.02 * before.item())


def plan_of(model: Any, folder: Path, rotation: Any) -> tuple[Plan, dict[Site, list[Site]]]:
    found = fitted(model, captured(model, folder, rotation), SPEC)
    return {site: own.codec for site, own in found.items()}, {site: context_of(model, SPEC, site) for site in found}


def test_attention_reads_what_a_strict_pass_reads(model: Any, architecture: str, tmp_path: Path) -> None:
    rotation = rotation_of(architecture, model)
    plan, context = plan_of(model, tmp_path / "activations", rotation)
    tokens = tiny.tokens(2, 33, seed=5)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
    for sinks in (0, 3):
        cache = TrainableCache(
            model.config, {site: trainable(codec) for site, codec in plan.items()}, context, sinks, rotation
        )
        lean = LeanCache(model.config, plan, sinks=sinks, window=0, rotation=rotation)
        with torch.no_grad():
            expected = model(input_ids=tokens, past_key_values=lean, use_cache=True).logits
        found = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        # Where a number lies on the border of two steps, the two may round it apart.
        assert (found - expected).abs().median() < 0.05 * (exact - expected).abs().median(), sinks


def test_training_lowers_the_loss_on_text_that_it_was_not_trained_on(tmp_path: Path) -> None:
    model = tiny.build("llama")
    rotation = rotation_of("llama", model)
    plan, context = plan_of(model, tmp_path / "activations", rotation)
    for codec in plan.values():  # something to mend, which tiny models of random weights do not have
        codec.second.synthesis.scale.mul_(0.7)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = Distillation(model, plan, context, 2, rotation)
    steps: list[int] = []
    found = training.train(tiny.tokens(12, 32, seed=6), tiny.tokens(3, 32, seed=7), 0, lambda: steps.append(1))
    assert found.after.priced(found.price) < found.before.priced(found.price)
    assert len(steps) == found.steps > 0
    assert training.score(tiny.tokens(3, 32, seed=7)) == found.after, "the best numbers are the ones that are kept"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("text", ["nuq:4+1", "resid(share:-1,nuq:4+1)"])
def test_a_family_that_is_not_trained_is_named(text: str) -> None:
    (codec,) = parse_recipe(text).fit(data())
    with pytest.raises(UserError, match=r"nuq:4\+1 is not trained"):
        trainable(codec)

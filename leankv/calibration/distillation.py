"""Training all codecs of a plan together, so that the compressed model says what the base model says.

The loss is the divergence KL(base || compressed), nats a token, plus a price for what the codes take, stored (Hinton et
al., 2015, arXiv 1503.02531, with the rate term of learned compression: Balle et al., 2017, arXiv 1611.01704). The model
is frozen. The price is what the plan itself pays at the margin: how much less it costs to make all steps finer by a
little, over what that takes. So training moves along the plan's own trade-off and not to another place on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int

from leankv.cache.lean_cache import LeanCache
from leankv.cache.on_device import codec_on
from leankv.cache.plan import Plan, Site
from leankv.cache.trainable_cache import TrainableCache
from leankv.calibration.sensitivity import divergence_of
from leankv.codecs.trainable import Trainable, trainable
from leankv.errors import UserError
from leankv.models.logits import piecewise_logits
from leankv.models.rope import KeyRotation

DISTILLING_REVISION = 1
"""Raised when what distillation makes of a plan changes."""

LENGTH = 1024  # assumption: tokens of a pass; errors compound over layers more than over a long text
LEARNING_RATE = 0.02  # of Adam (Kingma and Ba, 2014, arXiv 1412.6980): a thousandth of a matrix's numbers a step
PASSES = 2  # assumption: over the calibration text at most
CHECKED_EVERY = 8  # steps
PATIENCE = 3  # checks without a new best
COARSER = 1.1  # factor on all steps that the price is found with


@dataclass(frozen=True)
class Score:
    """What codecs come to on some text: nats a token, and stored bits a token of all sites together."""

    divergence: float
    bits: float

    def priced(self, price: float) -> float:
        """The loss, nats a token."""
        return self.divergence + price * self.bits


@dataclass(frozen=True)
class Distilled:
    """Codecs as they were when they came to the least loss on selection text.

    Attributes:
        codecs: of every site of the plan.
        before: on selection text.
        after: the same.
        price: nats a bit.
        steps: how many were made.
    """

    codecs: Mapping[Site, Trainable]
    before: Score
    after: Score
    price: float
    steps: int


class Distillation:
    """Trains the codecs of one plan.

    Args:
        model: a causal LM in eval mode; its weights stay as they are.
        plan: fitted codecs.
        context: of each site the ones that its codec predicts from.
        sinks: first tokens of each block that stay exact.
        rotation: given, keys are coded pre-RoPE.

    Raises:
        UserError: a codec's family is not trained.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        context: Mapping[Site, Sequence[Site]],
        sinks: int,
        rotation: KeyRotation | None,
    ):
        self._model, self._context, self._sinks, self._rotation = model, context, sinks, rotation
        self.codecs = {site: trainable(codec_on(codec, model.device)) for site, codec in plan.items()}
        self._all = torch.nn.ModuleList(self.codecs.values())

    def train(
        self,
        texts: Int[torch.Tensor, "n T"],
        checked: Int[torch.Tensor, "m T"],
        seed: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Distilled:
        """Train until the loss on other text falls no more.

        Args:
            texts: to train on, one row a step.
            checked: to stop by.
            seed: of the order.
            on_step: called after each of at most `PASSES * n` steps.

        Raises:
            UserError: the divergence is not finite, or coarser steps would save no bits.
        """
        before = self.score(checked)
        price = self._price(checked, before)
        adam = torch.optim.Adam(self._all.parameters(), lr=LEARNING_RATE)
        most = PASSES * len(texts)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, most)
        generator = torch.Generator().manual_seed(seed)
        order = [int(row) for _ in range(PASSES) for row in torch.randperm(len(texts), generator=generator)]
        best, kept, waited, steps = before, self._state(), 0, 0
        for steps, row in enumerate(order, start=1):
            adam.zero_grad()
            with torch.enable_grad():
                divergence, bits = self._loss(texts[row][None])
                (divergence + price * bits).backward()
            adam.step()
            decay.step()
            on_step()
            if steps % CHECKED_EVERY == 0 or steps == most:
                now = self.score(checked)
                if now.priced(price) < best.priced(price):
                    best, kept, waited = now, self._state(), 0
                elif (waited := waited + 1) == PATIENCE:
                    break
        self._all.load_state_dict(kept)
        return Distilled(self.codecs, before, best, price, steps)

    def score(self, texts: Int[torch.Tensor, "n T"]) -> Score:
        """What the codecs come to as they are now."""
        with torch.no_grad():
            found = [self._loss(row[None]) for row in texts]
        divergence, bits = (float(torch.stack([own[place] for own in found]).double().mean()) for place in (0, 1))
        if not divergence < float("inf"):
            raise UserError("the divergence of the compressed model is not finite; try --dtype float32")
        return Score(divergence, bits)

    def _price(self, texts: Int[torch.Tensor, "n T"], now: Score) -> float:
        """Nats a bit."""
        for codec in self.codecs.values():
            codec.scale_steps(COARSER)
        coarser = self.score(texts)
        for codec in self.codecs.values():
            codec.scale_steps(1.0)
        if coarser.bits >= now.bits:
            raise UserError("the plan's codes take no bits, so there is nothing to distill; take another plan")
        return max(0.0, (coarser.divergence - now.divergence) / (now.bits - coarser.bits))

    def _loss(self, tokens: Int[torch.Tensor, "1 T"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence, nats a predicted token, and bits a coded token."""
        tokens = tokens.to(self._model.device)
        count = tokens.shape[1] - 1
        cache = TrainableCache(self._model.config, self.codecs, self._context, self._sinks, self._rotation)
        with torch.no_grad():
            exact = LeanCache(self._model.config, {}, sinks=0, window=0)
            logits = piecewise_logits(self._model, tokens, exact, count)
            base = [own[0].clone() for own in logits]
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for own, other in zip(base, piecewise_logits(self._model, tokens, cache, count), strict=True):
            total = total + divergence_of(own, other[0])
        return total / count, cache.bits / (tokens.shape[1] - self._sinks)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._all.state_dict().items()}

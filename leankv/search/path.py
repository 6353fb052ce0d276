"""What a search leaves behind: every plan it measured, how, and which of them are worth having."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from leankv.search.plan_space import Choice, Measure, PlanSpace


@dataclass(frozen=True)
class Measured:
    """A choice that was measured on all blocks.

    Attributes:
        choice: which option each site takes.
        strategy: what tried it.
        what: in words, why.
        cost: mean of the nats a token that it adds.
        predicted: what was expected of it; None where nothing was.
        size: bytes of what is to be small.
        ratio: bytes of the 16-bit cache over these.
        evaluations: full evaluations spent up to here, this one included.
        is_allowed: whether its codecs keep to their memory; a search may begin at a plan whose do not.
    """

    choice: Choice
    strategy: str
    what: str
    cost: float
    predicted: float | None
    size: float
    ratio: float
    evaluations: float
    is_allowed: bool

    @property
    def percent(self) -> float:
        """The cost as a rise of perplexity, percent."""
        return 100 * math.expm1(self.cost)


@dataclass
class Path:
    """Measures choices, counts what that takes, and remembers.

    A full evaluation is one pass over all blocks; a pass over some counts as that part of one. What was measured before
    is looked up.

    Attributes:
        space: what is chosen from.
        measure: handed in.
        n_blocks: all blocks.
        steps: choices measured on all blocks, in order.
        evaluations: full evaluations so far.
    """

    space: PlanSpace
    measure: Measure
    n_blocks: int
    steps: list[Measured] = field(default_factory=list)
    evaluations: float = 0.0
    _known: dict[Choice, list[float]] = field(default_factory=dict)

    def cost(self, choice: Choice, blocks: int | None = None) -> float:
        """Mean nats a token that a choice adds, on the first so many blocks, or on all."""
        wanted = blocks or self.n_blocks
        known = self._known.setdefault(choice, [])
        if len(known) < wanted:
            self.evaluations += (wanted - len(known)) / self.n_blocks
            known += self.measure(choice, len(known), wanted)
        return math.fsum(known[:wanted]) / wanted

    def record(self, choice: Choice, strategy: str, what: str, predicted: float | None = None) -> Measured:
        """Measure a choice on all blocks and note it as a step; one that is noted already stays as it is."""
        if known := next((step for step in self.steps if step.choice == choice), None):
            return known
        cost = self.cost(choice)
        step = Measured(
            choice,
            strategy,
            what,
            cost,
            predicted,
            self.space.size(choice),
            self.space.ratio(choice),
            self.evaluations,
            self.space.codec_bytes(choice) <= self.space.max_codec_bytes,
        )
        self.steps.append(step)
        return step


def frontier(steps: Sequence[Measured]) -> list[Measured]:
    """The steps that no other beats in both cost and size, from the cheapest (and largest) to the dearest."""
    found: list[Measured] = []
    smallest = math.inf
    for step in sorted((step for step in steps if step.is_allowed), key=lambda each: (each.cost, each.size)):
        if step.size < smallest:
            found.append(step)
            smallest = step.size
    return found

"""Certificates: that a plan costs no more than its budget on text of one source, and which of many plans has one.

The claim is about perplexity, nats over tokens: `E[nats compressed - nats base] / E[tokens] <= ln(1 + budget)` over the
documents of a source. That is the same as `E[Z] <= 0` for each document's

    Z = ((nats compressed - nats base) - tokens * ln(1 + budget)) / typical tokens

with sums over the whole document. So a long document counts for more than a short one, as it does in a perplexity. A
difference *per token* of each document would be another claim, about the mean over documents of their own rates; the
two differ where documents differ in length and dear ones are the long ones. Dividing by one fixed number of tokens,
stated before (that of the longest that is read), changes nothing but the unit: nats a token of a typical document, in
which bounds are stated and compared across lengths.

`leankv.search.betting` tests it, and says why Z has to be cut to a bound. What is certified is therefore: *the mean of
Z, each document's counted as the bound where it is more, is below zero.* Where none was cut, that and the claim about
perplexity differ by what documents that were never seen have beyond the bound. How many were cut is said.

Several plans: Learn then Test (Angelopoulos et al., 2021, arXiv 2110.01052), by fixed-sequence testing as in Pareto
Testing (Laufer-Goldshtein et al., 2022, arXiv 2210.07913). Plans in an order that other text chose, each tested at the
full level until the first fails, falsely certify *any* with probability alpha at most: the first plan in the order
that is over the budget has to pass, and its own test lets it pass that seldom. That all see the same documents does
not matter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from leankv.errors import UserError

AnyPlan = TypeVar("AnyPlan")


@dataclass(frozen=True)
class Certificate:
    """What testing one plan against one budget came to.

    Attributes:
        certified: whether the claim holds at this confidence.
        confidence: 1 - alpha.
        budget_percent: rise of the base perplexity allowed, in percent.
        source: the text that the claim covers, as its data set is called.
        documents: certification documents that the plan was measured on.
        documents_available: how many there were to take from.
        documents_left_out: documents of the split that are shorter than `least_tokens`; the claim does not cover such.
        least_tokens: tokens that a document has at least.
        block_length: tokens that are read of each, from its first on; the claim covers no more of it.
        tokens: predicted tokens of the documents measured.
        cost_percent: rise of perplexity on these documents, nothing cut, in percent. A figure beside the claim: when to
            stop measuring depended on it.
        deviation: standard deviation of a document's difference, in nats a token of a typical document; None of one.
        clip: the bound of Z, in nats a token of a typical document, stated before any of these was measured.
        share_clipped: share of the documents whose Z lay above the bound, from 0 to 1.
        wealth: of the betting test at its end; `1 / (1 - confidence)` certifies.
        documents_needed: how many documents like these it would likely take in all; None where it is certified, and
            where no number in reach would do.
        protocol: `kind`, `sinks` and `window` that the claim holds under, and of `prefix` its `prefix_length`; None
            where an earlier version wrote it, which kept none.
        documents_hash: of the measured documents' tokens, in order; None likewise.
    """

    certified: bool
    confidence: float
    budget_percent: float
    source: str
    documents: int
    documents_available: int
    documents_left_out: int
    least_tokens: int
    block_length: int
    tokens: int
    cost_percent: float
    deviation: float | None
    clip: float
    share_clipped: float
    wealth: float
    documents_needed: int | None
    protocol: Mapping[str, Any] | None = None
    documents_hash: str | None = None

    def sentence(self) -> str:
        """The claim, or what it lacks, in words."""
        text = f"the first {self.block_length} tokens of documents of {self.source}"
        if self.protocol is not None and "prefix_length" in self.protocol:
            before = self.protocol["prefix_length"]
            text = f"the {self.block_length - before} tokens behind the first {before} of documents of {self.source}"
        seen = f"{self.documents} documents, {self.cost_percent:+.2f} % on them, {self.share_clipped:.0%} clipped"
        seen += f" at {self.clip:.3g} nats a token"
        if self.certified:
            return (
                f"certified: at most +{self.budget_percent:g} % at {100 * self.confidence:g} % confidence, over {text} "
                f"({seen})"
            )
        start = f"not certified for +{self.budget_percent:g} % at {100 * self.confidence:g} % confidence, over {text}"
        if self.documents_needed is None:
            return f"{start} ({seen}); no number of documents like these is likely to certify it"
        return f"{start} ({seen}); about {self.documents_needed} documents would likely be needed"

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Certificate":
        """Read back what `to_json` gave.

        Raises:
            UserError: it is no certificate.
        """
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, dict) or not needed <= values.keys() <= names:
            raise UserError("this is no certificate as this version writes it; certify the plan again")
        return cls(**values)


def fixed_sequence(plans: Iterable[AnyPlan], test: Callable[[AnyPlan], bool]) -> AnyPlan | None:
    """The last plan that passes before the first that fails; those behind it are not tested.

    Args:
        plans: from safe to bold. The order must be chosen on other text than `test` reads.
        test: whether a plan passes, at the full level.

    Returns:
        The plan; None where the first already fails.
    """
    passed = None
    for plan in plans:
        if not test(plan):
            break
        passed = plan
    return passed

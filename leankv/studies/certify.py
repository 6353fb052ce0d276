"""Certifying plans: documents that nothing was chosen by are measured one by one, until a plan's budget is proved."""

import hashlib
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

from leankv.cache.plan import PlanSpec
from leankv.config.experiment import CertificationConfig
from leankv.data.documents import Documents
from leankv.errors import UserError
from leankv.evaluation.perplexity import BlockNats
from leankv.search.betting import BettingTest, choose_clip, documents_needed, least_documents
from leankv.search.certificate import Certificate, fixed_sequence
from leankv.studies.plan_evaluator import EVERYTHING_EXACT, PlanEvaluator

EvaluatedPlan = tuple[PlanEvaluator, PlanSpec]
"""A plan, and who measures it: with which sinks and window."""


def certify(
    evaluator: PlanEvaluator,
    plans: Sequence[PlanSpec],
    budget_percent: float,
    settings: CertificationConfig | None = None,
    clip: float | None = None,
) -> tuple[int | None, list[Certificate]]:
    """Test plans against a budget, from safe to bold, until the first that cannot be certified.

    Every document's nats, of the base model and of each plan, are cells of their own: a run that was killed goes on
    where it was, and plans share the base model's.

    Args:
        evaluator: measures them; its protocol is the one that the claim is about.
        plans: from safe to bold, in an order that certification text had no part in.
        budget_percent: rise of the base perplexity allowed, in percent.
        settings: confidence and limits; those of the experiment unless given.
        clip: bound of one document, in nats a token; as the settings say unless given.

    Returns:
        The place of the last plan that is certified in `plans` (None: the first already is not), and the certificates
        of all plans that were tested, in order.

    Raises:
        UserError: there are fewer documents than could certify even a plan that costs nothing.
    """
    return certify_candidates([(evaluator, plan) for plan in plans], budget_percent, settings, clip)


def certify_candidates(
    candidates: Sequence[EvaluatedPlan],
    budget_percent: float,
    settings: CertificationConfig | None = None,
    clip: float | None = None,
) -> tuple[int | None, list[Certificate]]:
    """As `certify`, for plans that are measured with sinks and windows of their own."""
    if not candidates:
        return None, []
    workspace = candidates[0][0].workspace
    settings = settings or workspace.experiment.certification
    documents = workspace.documents("certification", settings.least_tokens)
    # Neighbours in a source may be alike; in a random order each is a draw like any other.
    order = random.Random(workspace.experiment.seed).sample(range(len(documents)), len(documents))
    bound = clip or _stated_clip(settings)
    # A clip that is chosen turns out larger, but a test that runs out of documents says how many it takes.
    _check_enough(documents, budget_percent, bound or math.log1p(budget_percent / 100), settings)
    certificates: list[Certificate] = []

    def test(place: int) -> bool:
        evaluator, spec = candidates[place]
        stated = bound or clip_for(evaluator, spec, budget_percent)
        certificates.append(_test(evaluator, spec, documents, order, budget_percent, stated, settings))
        return certificates[-1].certified

    return fixed_sequence(range(len(candidates)), test), certificates


def check_certifiable(evaluator: PlanEvaluator, budgets_percent: Sequence[float]) -> None:
    """Refuse, before anything is searched, budgets that no plan could be certified under.

    Args:
        evaluator: as its candidates will be measured: with selection blocks as long as those of reports.
        budgets_percent: rises of the base perplexity allowed, in percent.

    Raises:
        UserError: there are too few documents, or one selection block only to choose a clip by.
    """
    workspace = evaluator.workspace
    settings = workspace.experiment.certification
    documents, stated = workspace.documents("certification", settings.least_tokens), _stated_clip(settings)
    if stated is None:
        _check_blocks(evaluator)
    for percent in budgets_percent:
        # A clip that is chosen is no less than what the budget allows.
        _check_enough(documents, percent, stated or math.log1p(percent / 100), settings)


def _stated_clip(settings: CertificationConfig) -> float | None:
    return None if settings.clip == "auto" else float(settings.clip)


def _check_blocks(evaluator: PlanEvaluator) -> None:
    """Refuse to choose a clip by a single block."""
    workspace = evaluator.workspace
    if len(workspace.blocks("selection")) > 1:
        return
    experiment = workspace.experiment
    short, long = experiment.length_of("selection"), experiment.measured_length
    raise UserError(
        f"selection text has one block of {long} tokens, which shows no deviation to choose certification.clip by; set "
        f"data.selection_blocks to {math.ceil(2 * long / short)} or more (some 16 blocks of {long} tokens are better), "
        "or give a clip such as 0.1"
    )


def clip_for(evaluator: PlanEvaluator, spec: PlanSpec, budget_percent: float) -> float:
    """The bound that selection text suggests for a plan, in nats a token; see `leankv.search.betting.choose_clip`.

    Raises:
        UserError: there is one selection block only.
    """
    _check_blocks(evaluator)
    base = evaluator.base("selection")
    compressed = evaluator.nats_by_batch(spec, "the plan on selection text")
    differences = [
        (after - before) / base.tokens_per_block for before, after in zip(base.nats, compressed.nats, strict=True)
    ]
    return choose_clip(differences, math.log1p(budget_percent / 100))


def _check_enough(documents: Documents, budget_percent: float, clip: float, settings: CertificationConfig) -> None:
    """Refuse what no plan could pass.

    Raises:
        UserError: says how many documents are needed, and how to get them.
    """
    least = least_documents(math.log1p(budget_percent / 100), clip, 1 - settings.confidence)
    needs = f"certifying +{budget_percent:g} % at {100 * settings.confidence:g} % confidence and a clip of {clip:.3g}"
    needs += f" takes at least {least} documents, even of a plan that costs nothing"
    if settings.max_documents < least:
        raise UserError(f"{needs}; set certification.max_documents to more than {settings.max_documents}")
    if len(documents) >= least:
        return
    # Where whole blocks are asked for, as under `prefix`, only shorter ones let more documents in.
    whole_blocks = documents.least_tokens == documents.block_length
    shorter = "protocol.prefix_length or data.block_length" if whole_blocks else "certification.least_tokens"
    raise UserError(
        f"{needs}, but the certification split of {documents.source} has {len(documents)} of {documents.least_tokens} "
        f"tokens or more ({documents.left_out} shorter ones are left out); give a larger data set (rows of a .jsonl or "
        f".parquet file are documents), lower data.calibration_blocks or {shorter}, or raise the budget"
    )


def _test(
    evaluator: PlanEvaluator,
    spec: PlanSpec,
    documents: Documents,
    order: Sequence[int],
    budget_percent: float,
    clip: float,
    settings: CertificationConfig,
) -> Certificate:
    """Measure documents in `order` until the plan is certified, none are left, or it is hopeless."""
    allowed, alpha = math.log1p(budget_percent / 100), 1 - settings.confidence
    typical = evaluator.base("selection").tokens_per_block  # of a whole block under this protocol
    betting = BettingTest(clip, alpha)
    limit = min(settings.max_documents, len(documents))
    pairs: list[tuple[BlockNats, BlockNats]] = []
    values: list[float] = []
    within = False
    with evaluator.workspace.progress.stage(f"certifying {spec.in_short(evaluator.workspace.n_layers)}", limit) as step:
        blocks = [documents.blocks[number] for number in order[:limit]]
        for base, compressed in evaluator.documents_nats((EVERYTHING_EXACT, spec), blocks):
            pairs.append((base, compressed))
            values.append((compressed.nats[0] - base.nats[0] - base.tokens_per_block * allowed) / typical)
            betting.add(values[-1])
            # A cut document lets the mean of what was seen be over the budget. That is not certified, whatever the test
            # says; more documents may bring it within, and a test that has rejected stays valid.
            within = math.fsum(values) <= 0
            step(f"{betting.wealth:.3g} of {1 / alpha:.3g}")
            if (betting.rejected and within) or betting.is_hopeless(limit - betting.count):
                break
    differences = [compressed.nats[0] - base.nats[0] for base, compressed in pairs]
    tokens = sum(base.tokens_per_block for base, _ in pairs)
    cost = math.expm1(math.fsum(differences) / tokens)
    certified = betting.rejected and within
    measured = [blocks[place].hash for place in range(len(pairs))]
    return Certificate(
        certified=certified,
        confidence=settings.confidence,
        budget_percent=budget_percent,
        source=documents.source,
        documents=len(pairs),
        documents_available=len(documents),
        documents_left_out=documents.left_out,
        least_tokens=documents.least_tokens,
        block_length=documents.block_length,
        tokens=tokens,
        cost_percent=100 * cost,
        deviation=statistics.stdev(each / typical for each in differences) if len(pairs) > 1 else None,
        clip=clip,
        share_clipped=betting.n_clipped / betting.count,
        wealth=betting.wealth,
        documents_needed=None
        if betting.rejected
        else documents_needed(values, clip, alpha, evaluator.workspace.experiment.seed),
        protocol=_protocol_of(evaluator),
        documents_hash=hashlib.sha256("".join(measured).encode()).hexdigest(),
    )


def _protocol_of(evaluator: PlanEvaluator) -> dict[str, Any]:
    """What of a protocol a certificate is about."""
    protocol = evaluator.protocol
    names = ("kind", "sinks", "window", *(("prefix_length",) if protocol.kind == "prefix" else ()))
    return {name: getattr(protocol, name) for name in names}

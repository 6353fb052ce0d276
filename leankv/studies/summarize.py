"""The summary of a chosen plan: its joint cost, divergence and bytes on text that nothing was chosen by."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

from leankv.cache.footprint import CONTEXT_LENGTHS, Footprint
from leankv.cache.plan import PlanSpec
from leankv.config.notation import Budget
from leankv.evaluation.divergence import divergence_columns
from leankv.evaluation.perplexity import compare
from leankv.report.summary import Summary
from leankv.search.certificate import Certificate
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.stored_bytes import bytes_of_plan


@dataclass(frozen=True)
class Choosing:
    """How a plan was chosen, as its summary tells it.

    Attributes:
        strategy: `greedy`, or the strategies that searched, one after another.
        minimize: which bytes were to be few; None where layers were simply added.
        refit: `none`, `sequential` or `distill`.
        evaluations: full evaluations that the search took; None where it was not counted.
        certificate: what certifying came to; None where it was not asked for.
        seconds: what the stages took.
    """

    strategy: str = "greedy"
    minimize: str | None = None
    refit: str = "none"
    evaluations: float | None = None
    certificate: Certificate | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def summarize(evaluator: PlanEvaluator, spec: PlanSpec, budget: Budget, base_ppl: float, how: Choosing) -> Summary:
    """Measure a plan on the report split, and say all that is known of it.

    Args:
        evaluator: measures it.
        spec: the plan.
        budget: that it was chosen under.
        base_ppl: of the text it was chosen on, which turns points into percent: points are not the same rise on text of
            another base perplexity.
        how: it was chosen.
    """
    workspace = evaluator.workspace
    experiment, loaded, protocol = workspace.experiment, workspace.loaded, evaluator.protocol
    pair = evaluator.pair(spec, "report", "joint cost and divergence, report split")
    joint = compare(pair.base, pair.compressed)
    plan = evaluator.codecs.plan(spec)
    measured_bytes = bytes_of_plan(evaluator, "report", spec)
    bits = {site: codec.bits_per_token for site, codec in plan.items()}
    footprint = Footprint(loaded.geometry, bits, protocol.sinks, protocol.window)
    percent = budget.percent_of(base_ppl)
    return Summary(
        model=loaded.name,
        n_layers=len(loaded.geometry.layers),
        width=loaded.geometry.width,
        codec=spec.in_short(len(loaded.geometry.layers)),
        key_space=workspace.key_space,
        error_metric=experiment.fit.error_metric,
        protocol=protocol.kind,
        sinks=protocol.sinks,
        window=protocol.window,
        dataset=experiment.data.dataset,
        split="report",
        tokens=joint.tokens,
        budget=str(budget),
        budget_points=joint.base_ppl * percent / 100,
        base_ppl=joint.base_ppl,
        selected_layers=tuple(sorted({site.layer for site in spec.sites(workspace.n_layers)})),
        ppl=joint.ppl,
        delta_ppl=joint.delta_ppl,
        delta_ppl_interval=joint.interval,
        delta_percent=joint.delta_percent,
        within_budget=joint.delta_percent <= percent,
        divergence=divergence_columns(pair.divergence),
        context=measured_bytes.context,
        code_ratio=measured_bytes.code_ratio_live,
        code_ratio_stored=measured_bytes.code_ratio_stored,
        cache_ratio=measured_bytes.cache_ratio,
        all_in_ratio=measured_bytes.all_in_ratio,
        base_bytes=measured_bytes.base,
        held_bytes=measured_bytes.held,
        stored_bytes=measured_bytes.stored,
        peak_step_bytes=measured_bytes.peak_step,
        claimed_cache_ratio={tokens: footprint.cache_ratio(tokens) for tokens in CONTEXT_LENGTHS},
        codec_parameters=sum(codec.n_parameters for codec in plan.values()),
        codec_bytes=sum(codec.nbytes for codec in plan.values()),
        codec_bytes_memory=measured_bytes.codecs,
        seconds={**how.seconds, "report": pair.seconds},
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=loaded.numerics["device"],
        dtype=loaded.numerics["dtype"],
        budget_percent=percent,
        strategy=how.strategy,
        minimize=how.minimize,
        refit=how.refit,
        evaluations=how.evaluations,
        certificate=None if how.certificate is None else how.certificate.to_json(),
        claimed_base_bytes={tokens: footprint.base_bytes(tokens) for tokens in CONTEXT_LENGTHS},
    )

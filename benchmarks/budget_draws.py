"""Thousands of selections and certifications, drawn from documents that were measured once. Numbers only."""

import math
from collections.abc import Sequence
from typing import Any

import numpy

from leankv.search.betting import choose_clip, log_wealth_paths

DRAWS = 2000
SELECTION = 16  # documents that order the plans and choose their bounds
OLD_BLOCKS = 4  # documents that the old rule took its point estimate on
ALPHA = 0.05
BUDGETS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)
JUST_UNDER = 0.99
"""Of a plan's true cost: budgets that the plan is just over. The hardest: it passes if any plan over a budget does."""

Array = numpy.ndarray


def true_costs(differences: Array, tokens: Array) -> Array:
    """Rise of perplexity over all documents in percent, `[documents, plans]`, `[documents]` -> `[plans]`."""
    return 100 * numpy.expm1(differences.sum(axis=0) / tokens.sum())


def draw_all(differences: Array, tokens: Array, ratios: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Every budget, by both kinds of draw.

    Args:
        differences: nats that a plan adds on a document, `[documents, plans]`.
        tokens: predicted tokens of each document, `[documents]`.
        ratios: of each plan; a bolder plan has more.
        names: of the plans.
    """
    costs = true_costs(differences, tokens)
    budgets = [(budget, "") for budget in BUDGETS]
    budgets += [(JUST_UNDER * float(cost), f"just under {name}") for cost, name in zip(costs, names, strict=True)]
    rows = []
    for replace in (False, True):
        for place, (budget, note) in enumerate(sorted(budgets)):
            generator = numpy.random.default_rng([place, replace])
            drawn = _draw(generator, differences, tokens, numpy.asarray(ratios), costs, budget, replace)
            rows.append({"certification": "with replacement" if replace else "parted", "note": note, **drawn})
    deviations = (differences / tokens.max()).std(axis=0, ddof=1)
    plans = [
        {"plan": name, "stored_code_ratio": ratio, "cost_percent": round(float(cost), 3), "deviation": float(deviation)}
        for name, ratio, cost, deviation in zip(names, ratios, costs, deviations, strict=True)
    ]
    about = {"documents": len(tokens), "draws": DRAWS, "selection_documents": SELECTION, "old_blocks": OLD_BLOCKS}
    return {**about, "alpha": ALPHA, "plans": plans, "rows": rows}


def _draw(
    generator: numpy.random.Generator,
    differences: Array,
    tokens: Array,
    ratios: Array,
    costs: Array,
    budget: float,
    replace: bool,
) -> dict[str, Any]:
    """What `DRAWS` draws come to under one budget, by certificates and by the old rule."""
    count, n_plans = differences.shape
    allowed, typical = math.log1p(budget / 100), tokens.max()
    values = (differences - allowed * tokens[:, None]) / typical  # Z
    shipped, shipped_by_old, documents, clipped = [], [], [], []
    for _ in range(DRAWS):
        order = generator.permutation(count)
        selection = order[:SELECTION]
        certifying = generator.integers(count, size=count) if replace else order[SELECTION:]
        seen = true_costs(differences[selection], tokens[selection])
        passed, needed, cut = None, 0, 0.0
        for plan in safe_to_bold(seen, ratios):
            clip = choose_clip((differences[selection, plan] / typical).tolist(), allowed)
            own = values[certifying, plan]
            won = log_wealth_paths(own, clip, ALPHA) >= math.log(1 / ALPHA)
            if not won.any():
                break
            passed, needed = plan, int(won.argmax()) + 1
            cut = float((own[:needed] > clip).mean())
        shipped.append(passed)
        if passed is not None:
            documents.append(needed)
            clipped.append(cut)
        old = true_costs(differences[order[:OLD_BLOCKS]], tokens[order[:OLD_BLOCKS]])
        fits = [plan for plan in range(n_plans) if old[plan] <= budget]
        shipped_by_old.append(max(fits, key=lambda plan: ratios[plan]) if fits else None)
    return {
        "budget_percent": round(budget, 4),
        "certified": _came_to(shipped, costs, ratios, budget),
        "documents_median": int(numpy.median(documents)) if documents else None,
        "share_clipped": round(float(numpy.mean(clipped)), 5) if clipped else None,
        "old_rule": _came_to(shipped_by_old, costs, ratios, budget),
    }


def safe_to_bold(costs: Array, ratios: Array) -> list[int]:
    """The frontier, in order of cost: plans that have a larger ratio than all that cost less."""
    frontier: list[int] = []
    for plan in numpy.argsort(costs, kind="stable").tolist():
        if not frontier or ratios[plan] > ratios[frontier[-1]]:
            frontier.append(plan)
    return frontier


def _came_to(shipped: Sequence[int | None], costs: Array, ratios: Array, budget: float) -> dict[str, float | None]:
    """Shares of the draws that ship a plan, and one that is over the budget in truth; mean ratio of those shipped."""
    plans = [plan for plan in shipped if plan is not None]
    return {
        "shipped": round(len(plans) / len(shipped), 4),
        "over_budget": round(sum(costs[plan] > budget for plan in plans) / len(shipped), 4),
        "mean_ratio": round(float(numpy.mean([ratios[plan] for plan in plans])), 3) if plans else None,
    }


def table(result: dict[str, Any]) -> str:
    """The draws as Markdown."""
    worst, worst_old = (max(row[rule]["over_budget"] for row in result["rows"]) for rule in ("certified", "old_rule"))
    lines = [
        "# Do certified budgets hold?",
        "",
        f"{result['documents']} documents are the source; {result['draws']} draws a row. A draw takes "
        f"{result['selection_documents']} documents for selection and certifies on the rest (*parted*), or on as many "
        "drawn from all *with replacement*. *Over budget*: the plan that is shipped costs more than the budget over "
        f"all documents. The old rule ships the boldest plan whose cost on {result['old_blocks']} documents is within "
        f"the budget. Worst row: {100 * worst:.1f} % over budget where certified ({100 * result['alpha']:g} % is "
        f"allowed), {100 * worst_old:.1f} % by the old rule.",
        "",
        "| plan | stored code ratio | true cost | deviation, nats a token |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{plan['plan']}` | {plan['stored_code_ratio']:.1f} | {plan['cost_percent']:+.2f} % | "
            f"{plan['deviation']:.4f} |"
            for plan in result["plans"]
        ),
        "",
        "| certification | budget | ships | over budget | mean ratio | documents, median | clipped | old rule ships | "
        "over budget | mean ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        ours, old = row["certified"], row["old_rule"]
        note = f" ({row['note']})" if row["note"] else ""
        cells = [
            row["certification"],
            f"{row['budget_percent']:.2f} %{note}",
            *_cells(ours),
            row["documents_median"] or "-",
            "-" if row["share_clipped"] is None else _percent(row["share_clipped"]),
            *_cells(old),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _cells(came_to: dict[str, float | None]) -> list[str]:
    shipped, over, ratio = came_to["shipped"], came_to["over_budget"], came_to["mean_ratio"]
    assert shipped is not None
    assert over is not None
    return [_percent(shipped), _percent(over), "-" if ratio is None else f"{ratio:.1f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

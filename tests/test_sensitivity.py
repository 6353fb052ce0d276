"""Contributions of sites to a plan's cost, against the divergence that is measured."""

import pytest
import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, PlanSpec
from leankv.calibration.sensitivity import site_contributions
from leankv.codecs import parse_recipe
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.paired import measure_pair
from leankv.evaluation.perplexity import exact_window, feeding_of
from leankv.models.geometry import find_geometry
from leankv.storage.memory_budget import MemoryBudget
from tests import tiny

PROTOCOLS = {
    "strict": ProtocolConfig(kind="strict", sinks=0),
    "stream": ProtocolConfig(kind="stream", sinks=2, window=4, chunk=8),
    "prefix": ProtocolConfig(kind="prefix", sinks=2, prefix_length=24, continuation=16),
}


def plan_of(model, spec: PlanSpec) -> Plan:
    layers = find_geometry(model).layers
    return {site: recipe.without_text(layers[site.layer].width) for site, recipe in spec.sites(len(layers)).items()}


def measured(model, blocks: torch.Tensor, protocol: ProtocolConfig, plan: Plan) -> float:
    base = BasePass(model, lambda: LeanCache(model.config, {}, sinks=0, window=0), MemoryBudget(10**9))
    caches = lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=exact_window(protocol))  # noqa: E731
    return measure_pair(model, Blocks(blocks, "selection", "made up"), protocol, base, caches).divergence.kl.value


def contributions(model, blocks: torch.Tensor, protocol: ProtocolConfig, plan: Plan):
    caches = lambda: LeanCache(model.config, plan, sinks=protocol.sinks, window=exact_window(protocol))  # noqa: E731
    feeding = feeding_of(protocol, blocks.shape[1])
    return site_contributions(model, blocks, feeding, caches, protocol.coded_after)


@pytest.mark.parametrize("kind", PROTOCOLS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_contributions_add_up_to_the_measured_divergence(name, kind):
    model, blocks, protocol = tiny.build(name), tiny.tokens(2, 40), PROTOCOLS[kind]
    plan = plan_of(model, PlanSpec.uniform("int:6"))
    found = contributions(model, blocks, protocol, plan)
    assert set(found) == set(plan)
    assert sum(found.values()) == pytest.approx(measured(model, blocks, protocol, plan), rel=0.2)


def test_a_coarser_site_contributes_more():
    model, blocks, protocol = tiny.build("llama"), tiny.tokens(3, 40), PROTOCOLS["strict"]
    fine = contributions(model, blocks, protocol, plan_of(model, PlanSpec.uniform("int:7")))
    coarse_at = PlanSpec.uniform("int:7").with_layers([2], v="int:5")
    coarse = contributions(model, blocks, protocol, plan_of(model, coarse_at))
    # A step four times as long makes errors of sixteen times the energy.
    assert coarse[2, "v"] == pytest.approx(16 * fine[2, "v"], rel=0.4)
    assert coarse[1, "v"] == pytest.approx(fine[1, "v"], rel=0.5, abs=0.2 * fine[2, "v"])


def test_the_models_parameters_keep_no_gradients():
    model, protocol = tiny.build("llama"), PROTOCOLS["strict"]
    contributions(model, tiny.tokens(1, 12), protocol, plan_of(model, PlanSpec.uniform(parse_recipe("int:4"))))
    assert all(parameter.grad is None for parameter in model.parameters())

"""Certifying plans on documents: what is measured, what is kept, and what becomes of too few documents."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leankv.cache.plan import PlanSpec
from leankv.config.experiment import CertificationConfig
from leankv.config.loading import load_experiment
from leankv.data.given import GivenBlocks
from leankv.errors import UserError
from leankv.evaluation.perplexity import BlockNats
from leankv.models.loading import load_model
from leankv.progress import Silent
from leankv.search.betting import choose_clip, least_documents
from leankv.studies import plan_evaluator
from leankv.studies.certify import certify, certify_candidates, clip_for
from leankv.studies.plan_evaluator import EVERYTHING_EXACT, PlanEvaluator
from leankv.studies.workspace import Workspace
from tests import tiny
from tests.run_folders import evaluator_of, folder_of

pytestmark = pytest.mark.whole_runs

LENGTH = 48
SAFE, BOLD, BOLDER = (PlanSpec.uniform(recipe) for recipe in ("int:8", "int:2", "pca:1"))
SETTINGS = CertificationConfig(least_tokens=20, clip=0.2, max_documents=20)
BUDGET = 10.0  # percent


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents, every fifth shorter than a block, every twentieth next to nothing."""
    rng = random.Random(0)
    texts = [tiny.text(100, seed=number) for number in range(200)]
    texts[::5] = [text[: rng.randrange(20, LENGTH)] for text in texts[::5]]
    texts[::20] = ["short"] * 10
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def asked(settings: dict[str, Any], documents: Path) -> dict[str, Any]:
    return {**settings, "data.dataset": str(documents), "data.selection_blocks": 16}


@pytest.fixture
def evaluator(asked: dict[str, Any], tmp_path: Path) -> PlanEvaluator:
    return evaluator_of(asked, tmp_path / "run")


def cells(evaluator: PlanEvaluator) -> set[str]:
    return {path.name for path in folder_of(evaluator).glob("cells/nats-certification-*.json")}


# -- what is certified -------------------------------------------------------------------------------------------------


def test_the_last_plan_before_the_first_that_fails_is_named_and_none_behind_it_is_measured(
    evaluator: PlanEvaluator,
) -> None:
    place, certificates = certify(evaluator, [SAFE, BOLD, BOLDER], BUDGET, SETTINGS)
    assert place == 0
    assert [certificate.certified for certificate in certificates] == [True, False]
    passed, failed = certificates
    assert passed.wealth >= 20 > failed.wealth
    assert passed.cost_percent <= BUDGET
    assert passed.documents < passed.documents_available
    assert passed.documents_needed is None


def test_none_is_named_where_the_first_fails(evaluator: PlanEvaluator) -> None:
    place, certificates = certify(evaluator, [BOLD, SAFE], BUDGET, SETTINGS)
    assert place is None
    assert [certificate.certified for certificate in certificates] == [False]


def test_no_plans_no_certificates(evaluator: PlanEvaluator) -> None:
    assert certify(evaluator, [], BUDGET, SETTINGS) == (None, [])


def test_a_certificate_is_about_the_perplexity_of_all_documents_measured(evaluator: PlanEvaluator) -> None:
    """Nats over tokens, not the mean of the documents' own rates: they differ in length."""
    _, (certificate,) = certify(evaluator, [BOLD], 0.01, CertificationConfig(least_tokens=20, clip=0.001))
    available = evaluator.workspace.documents("certification", 20)
    measured = [
        block
        for block in available.blocks
        if evaluator.workspace.cells.has("nats-certification", evaluator.depends_on(BOLD, block))
    ]
    before, after = (
        [own.nats[0] for (own,) in evaluator.documents_nats([spec], measured)] for spec in (EVERYTHING_EXACT, BOLD)
    )
    tokens = sum(block.tokens.shape[1] - 1 for block in measured)
    assert len({block.tokens.shape[1] for block in measured}) > 1
    assert certificate.tokens == tokens
    assert certificate.documents == len(measured)
    assert certificate.cost_percent == pytest.approx(100 * math.expm1((sum(after) - sum(before)) / tokens))
    assert certificate.share_clipped > 0
    assert certificate.documents_left_out == available.left_out > 0


def test_a_prefix_is_certified_on_documents_that_hold_its_whole_continuation(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """Some of these documents reach the continuation and not its end."""
    prefix = {"protocol.kind": "prefix", "protocol.prefix_length": 24, "protocol.continuation": LENGTH - 24}
    evaluator = evaluator_of({**asked, **prefix}, tmp_path / "run")
    shorter = evaluator_of(asked, tmp_path / "stream").workspace.documents("certification", 20)
    assert any(24 < block.tokens.shape[1] < LENGTH for block in shorter.blocks)
    _, (certificate,) = certify(evaluator, [SAFE], BUDGET, SETTINGS)
    assert certificate.certified
    assert certificate.least_tokens == LENGTH
    assert certificate.documents_left_out > shorter.left_out
    assert certificate.tokens == certificate.documents * (LENGTH - 24 - 1)
    assert f"the 24 tokens behind the first 24 of documents of {certificate.source}" in certificate.sentence()
    assert certificate.protocol == {"kind": "prefix", "sinks": 0, "window": 0, "prefix_length": 24}


def test_a_cut_document_is_made_up_for_by_more_documents(
    evaluator: PlanEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test rejects before the mean of all is within the budget; it stays valid, so it goes on until it is."""
    typical = evaluator.base().tokens_per_block

    def documents_nats(specs: Any, blocks: Any) -> Any:
        for place, _ in enumerate(blocks):
            yield BlockNats((0.0,), typical, 0.0), BlockNats((3.0 * typical if place == 0 else 0.0,), typical, 0.0)

    monkeypatch.setattr(evaluator, "documents_nats", documents_nats)
    allowed = math.log1p(BUDGET / 100)
    _, (certificate,) = certify(evaluator, [SAFE], BUDGET, replace(SETTINGS, max_documents=100))
    assert certificate.wealth >= 20
    assert certificate.certified
    assert certificate.documents == math.ceil(3.0 / allowed)
    _, (certificate,) = certify(evaluator, [SAFE], BUDGET, replace(SETTINGS, max_documents=20))
    assert certificate.wealth >= 20
    assert not certificate.certified
    assert "no number of documents like these" in certificate.sentence()


def test_a_document_alone_has_the_nats_that_it_has_as_a_block_of_the_split(evaluator: PlanEvaluator) -> None:
    block = evaluator.workspace.blocks("certification").take([1])
    for spec in (EVERYTHING_EXACT, BOLD):
        ((own,),) = evaluator.documents_nats([spec], [block])
        assert own.nats[0] == evaluator.nats(spec, "certification").nats[1]


def test_unless_told_the_bound_is_what_selection_text_suggests_for_each_plan(evaluator: PlanEvaluator) -> None:
    settings = CertificationConfig(least_tokens=20)
    _, certificates = certify(evaluator, [SAFE, BOLD], BUDGET, settings)
    base = evaluator.base("selection")
    for spec, certificate in zip([SAFE, BOLD], certificates, strict=True):
        after = evaluator.nats(spec, "selection").nats
        differences = [(own - before) / base.tokens_per_block for own, before in zip(after, base.nats, strict=True)]
        assert certificate.clip == choose_clip(differences, math.log1p(BUDGET / 100))
        assert certificate.clip == clip_for(evaluator, spec, BUDGET)
    assert certify(evaluator, [SAFE], BUDGET, settings, clip=0.3)[1][0].clip == 0.3


def test_plans_may_have_windows_of_their_own(asked: dict[str, Any], tmp_path: Path) -> None:
    evaluator = evaluator_of({**asked, "protocol.kind": "stream", "protocol.chunk": 16}, tmp_path / "run")
    wide = evaluator.with_window(64)
    place, (within, beyond) = certify_candidates([(wide, BOLD), (evaluator, BOLD)], BUDGET, SETTINGS)
    assert place == 0
    assert within.cost_percent == pytest.approx(0, abs=1e-3), "all of it lies within the window"
    assert abs(beyond.cost_percent) > 0.1


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_twice_and_the_base_model_once_for_all_plans(
    evaluator: PlanEvaluator, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = certify(evaluator, [SAFE, BOLD], BUDGET, SETTINGS)
    used = [certificate.documents for certificate in first[1]]
    assert len(cells(evaluator)) == sum(used) + max(used)
    monkeypatch.setattr(plan_evaluator, "measure_nats", pytest.fail)
    assert certify(evaluator, [SAFE, BOLD], BUDGET, SETTINGS) == first
    assert certify(evaluator_of(asked, tmp_path / "run"), [SAFE, BOLD], BUDGET, SETTINGS) == first
    # Another budget or confidence reads the same documents.
    stricter = CertificationConfig(confidence=0.9, least_tokens=20, clip=0.2)
    assert certify(evaluator, [SAFE], BUDGET, stricter)[1][0].documents < used[0]


def test_a_run_that_was_stopped_goes_on_where_it_was(
    evaluator: PlanEvaluator, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = certify(evaluator, [SAFE], BUDGET, SETTINGS)
    n_cells, really = len(cells(evaluator)), plan_evaluator.measure_nats
    stopped = evaluator_of(asked, tmp_path / "stopped")
    stopped.base("selection")
    measured = 0

    def measure(*arguments: Any, **named: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured == 8:
            raise KeyboardInterrupt
        return really(*arguments, **named)

    monkeypatch.setattr(plan_evaluator, "measure_nats", measure)
    with pytest.raises(KeyboardInterrupt):
        certify(stopped, [SAFE], BUDGET, SETTINGS)
    assert len(cells(stopped)) == 7
    assert certify(evaluator_of(asked, tmp_path / "stopped"), [SAFE], BUDGET, SETTINGS) == expected
    assert measured == 8 + n_cells - 7


# -- too few -----------------------------------------------------------------------------------------------------------


def test_too_few_documents_for_any_plan_are_refused_with_the_number_needed(evaluator: PlanEvaluator) -> None:
    few = CertificationConfig(least_tokens=20, clip=0.5, max_documents=1000)
    what = r"takes at least 169 documents.*split of .* has \d+ of 20 tokens.*\.jsonl.*certification.least_tokens"
    with pytest.raises(UserError, match=what):
        certify(evaluator, [SAFE], 1.0, few)
    whole = replace(few, least_tokens=LENGTH)  # then a lower one alone lets nothing in that is not there already
    with pytest.raises(UserError, match=rf"has \d+ of {LENGTH} tokens.*data.block_length"):
        certify(evaluator, [SAFE], 1.0, whole)
    with pytest.raises(UserError, match=r"at least 169 documents.*certification.max_documents to more than 100"):
        certify(evaluator, [SAFE], 1.0, CertificationConfig(least_tokens=20, clip=0.5, max_documents=100))
    assert not cells(evaluator)


def test_where_the_bound_that_is_chosen_asks_for_more_documents_than_there_are_the_test_says_so(
    evaluator: PlanEvaluator,
) -> None:
    """It is known after a search only, whose plan would be lost by a refusal."""
    auto = CertificationConfig(least_tokens=20, max_documents=6)
    place, (certificate,) = certify(evaluator, [SAFE], 1.0, auto)
    assert place is None
    assert not certificate.certified
    assert least_documents(math.log1p(0.01), certificate.clip, 0.05) > 6


def test_a_plan_that_runs_out_of_documents_is_told_how_many_it_would_take(evaluator: PlanEvaluator) -> None:
    enough = certify(evaluator, [SAFE], BUDGET, SETTINGS)[1][0].documents
    few = CertificationConfig(least_tokens=20, clip=0.25, max_documents=enough + 1)
    place, (certificate,) = certify(evaluator, [SAFE], BUDGET, few)
    assert place is None
    assert certificate.documents_needed is not None
    assert enough < certificate.documents_needed < 3 * enough
    more = CertificationConfig(least_tokens=20, clip=0.25)
    assert certify(evaluator, [SAFE], BUDGET, more)[1][0].documents == pytest.approx(
        certificate.documents_needed, abs=3
    )


def test_one_selection_block_suggests_no_bound(asked: dict[str, Any], tmp_path: Path) -> None:
    evaluator = evaluator_of({**asked, "data.selection_blocks": 1}, tmp_path / "run")
    with pytest.raises(UserError, match=r"data.selection_blocks to 2 or more"):
        certify(evaluator, [SAFE], BUDGET, CertificationConfig(least_tokens=20))


def test_text_that_was_given_in_blocks_has_no_documents(asked: dict[str, Any]) -> None:
    experiment = load_experiment(None, asked)
    source = GivenBlocks({"calibration": tiny.tokens(4, LENGTH), "selection": tiny.tokens(4, LENGTH)})
    evaluator = PlanEvaluator(Workspace(experiment, load_model(experiment.model), source, Silent()))
    with pytest.raises(UserError, match="documents one by one"):
        certify(evaluator, [SAFE], BUDGET, SETTINGS)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("confidence", 1, "below 1, such as 0.95, not 1"),
        ("confidence", 0.05, "at least 0.5"),
        ("max_documents", 0, "at least 1"),
        ("least_tokens", 1, "at least 2"),
        ("clip", "much", "must be auto"),
        ("clip", 0, "above 0"),
        ("clip", -0.1, "above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(key: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_experiment(None, {f"certification.{key}": value})


def test_a_bound_is_a_number_or_auto() -> None:
    assert load_experiment(None, {"certification.clip": "0.1"}).certification.clip == 0.1
    assert load_experiment(None, {}).certification.clip == "auto"


def test_a_folder_begun_without_these_settings_goes_on_with_any(
    evaluator: PlanEvaluator, asked: dict[str, Any], tmp_path: Path
) -> None:
    path = folder_of(evaluator) / "experiment.yaml"
    head, _, rest = path.read_text().partition("certification:\n")
    path.write_text(head + rest[rest.index("layers:") :])
    assert "certification:" not in path.read_text()
    key = evaluator.key(SAFE, "selection")
    again = evaluator_of({**asked, "certification.confidence": 0.9}, tmp_path / "run")
    assert again.key(SAFE, "selection") == key

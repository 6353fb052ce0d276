"""What the documentation shows does what it says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from leankv.codecs import FAMILIES, fraction_of_variance_unexplained
from tests import codec_vectors, test_codecs

ADDING = (Path(__file__).parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")


@pytest.fixture
def added() -> Iterator[str]:
    """The recipe of the codec that the first section adds, known as if its file were there."""
    section = ADDING.split("\n## ")[1]
    assert section.startswith("A codec")
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(source.splitlines()) <= 36
    known, names = set(FAMILIES), {"__name__": "leankv.codecs.added"}
    exec(compile(source, "adding.md", "exec"), names)
    (family,) = set(FAMILIES) - known
    yield family
    del FAMILIES[family]


def test_the_codec_that_the_docs_add_passes_the_shared_matrix(added: str) -> None:
    """All of it that takes a spec alone."""
    test_codecs.test_fitting_three_problems_gives_three_codecs(added)
    test_codecs.test_a_code_has_one_row_a_token_and_decodes_to_the_shape_that_went_in(added, 5)
    test_codecs.test_bits_per_token_are_the_bits_really_stored(added, torch.float32)
    test_codecs.test_a_serialized_code_comes_back_bit_for_bit(added)
    test_codecs.test_claimed_bits_hold_for_vectors_that_nothing_was_fitted_to(added, 1000)
    test_codecs.test_a_recipe_is_a_value_and_reads_back_from_its_text(added)
    test_codecs.test_a_saved_codec_decodes_bit_for_bit_as_before(added, torch.float32)
    test_codecs.test_tensors_that_do_not_fit_the_spec_are_refused_by_name(added)
    test_codecs.test_a_codec_does_not_depend_on_which_others_are_fitted_with_it(added)
    test_codecs.test_each_token_is_encoded_on_its_own(added)
    test_codecs.test_codes_may_be_joined_and_put_in_another_order(added)
    test_codecs.test_codes_of_a_batch_are_cut_indexed_and_appended_as_their_rows_are(added)
    test_codecs.test_fitting_to_text_with_outliers_stays_finite(added)


def test_the_codec_that_the_docs_add_beats_the_mean(added: str) -> None:
    x = codec_vectors.vectors(sites=1)
    (codec,) = codec_vectors.fit(added, x)
    assert fraction_of_variance_unexplained(x[0], codec_vectors.through(codec, x[0])) < 0.6

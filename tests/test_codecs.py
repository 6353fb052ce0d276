"""What every codec must do, whatever its family; and the reading of recipes."""

import pytest
import safetensors.torch
import torch

from leankv.codecs import FAMILIES, codec_from_tensors, fraction_of_variance_unexplained, parse_recipe
from leankv.codecs.coding.ragged import Ragged
from leankv.errors import UserError
from leankv.evaluation.cache_bytes import codec_memory
from tests.codec_vectors import (
    PARAMETER_DTYPES,
    WIDTH,
    cast_parameters,
    fit,
    fitted,
    fvu,
    rows_of,
    stored_bits,
    through,
    vectors,
)

SPECS = (
    *("identity", "mean", "pca:1", "pca:4", "ae:2x8", "ae:4"),
    *("int:1", "int:3g8", "int:8g12", "int:4c"),
    *("nuq:1", "nuq:3", "nuq:2+1", "nuq:4+12.5", "nuq:1+100"),
    *("rot:1", "rot:4", "rot:2+qjl"),
    *("pq:1x6", "pq:6x3", "pq:24x4"),
    *("sparse:1", "sparse:50", "sparse:100"),
    *("ortho:1", "ortho:4"),
    *("transform:0.3", "transform:2", "transform:s0.5", "share:-1", "resid(share:-2,transform:1)"),
    *("share:-2q8", "share:-1r4", "share:-4r6q4", "resid(share:-2q4,transform:s0.5)"),
    *("resid(pca:2,int:2g8)", "resid(mean,nuq:2+5)", "resid(rot:1,resid(ortho:1,pq:6x2))", "resid(pca:1,identity)"),
)

every_spec = pytest.mark.parametrize("spec", SPECS)


# -- what every family does ------------------------------------------------------------------------------------------


@every_spec
def test_fitting_three_problems_gives_three_codecs(spec: str) -> None:
    codecs = fit(spec, vectors())
    assert len(codecs) == 3
    assert all(codec.recipe == parse_recipe(spec) and codec.width == WIDTH for codec in codecs)


@every_spec
@pytest.mark.parametrize("tokens", [0, 1, 7, 256])
def test_a_code_has_one_row_a_token_and_decodes_to_the_shape_that_went_in(spec: str, tokens: int) -> None:
    codec = fitted(spec)[0]
    x = vectors(seed=1)[0, :tokens]
    code = codec.encode(x)
    assert code.shape == (tokens,)
    assert all(len(rows_of(column)) == tokens for column in code.columns.values())
    assert codec.decode(code).shape == (tokens, WIDTH)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_per_token_are_the_bits_really_stored(spec: str, dtype: torch.dtype) -> None:
    """To the bit on the held-out vectors that they are counted on; errors of a first stage are rounded once more."""
    train, heldout = vectors(tokens=512).to(dtype).split(256, dim=1)
    codec = fit(spec, train, heldout)[0]
    rounded = "resid" in spec and dtype == torch.bfloat16
    held_bits = stored_bits(codec, heldout[0])
    assert 256 * codec.bits_per_token == pytest.approx(held_bits, rel=1e-2 if rounded else 1e-6)
    one = codec.encode(train[0, :1]).tensors()
    held = sum(tensor.untyped_storage().nbytes() for tensor in one)
    assert held == sum(tensor.nbytes for tensor in one), "a view would keep more alive than it shows"


@every_spec
@pytest.mark.parametrize("tokens", [100, 1000], ids=["fewer vectors than are needed", "enough"])
def test_claimed_bits_hold_for_vectors_that_nothing_was_fitted_to(spec: str, tokens: int) -> None:
    """Ranges and frequencies flatter the vectors they were fitted to, the more so the fewer these were."""
    train, heldout, unseen = vectors(1, tokens + 4000).split([tokens, 2000, 2000], dim=1)
    codec = fit(spec, train, heldout)[0]
    overhead = 8 * 12 * (spec.count("(") + 1)  # lengths, and the end of a coder's stream
    assert 2000 * codec.bits_per_token == pytest.approx(stored_bits(codec, unseen[0]), rel=0.03)
    serialized = 8 * len(codec.serialize(codec.encode(unseen[0])))
    assert serialized == pytest.approx(2000 * codec.stored_bits_per_token, rel=0.03, abs=overhead)


@every_spec
def test_a_serialized_code_comes_back_bit_for_bit(spec: str) -> None:
    codec = fitted(spec)[0]
    x = vectors(seed=1)[0]
    x[3, 5], x[7] = 1e4, -300.0
    for rows in (x, x[:1], x[:0]):
        code = codec.encode(rows)
        serialized = codec.serialize(code)
        again = codec.deserialize(serialized, len(rows))
        assert {name: rows_of(c) for name, c in again.columns.items()} == {
            n: rows_of(c) for n, c in code.columns.items()
        }


@every_spec
def test_a_stream_of_more_or_fewer_bytes_is_refused(spec: str) -> None:
    codec = fitted(spec)[0]
    serialized = codec.serialize(codec.encode(vectors(seed=1)[0, :9]))
    for other in (serialized + b"\0", serialized[:-1]):
        if other:
            with pytest.raises(ValueError, match="stream"):
                codec.deserialize(other, 9)


@pytest.mark.parametrize(
    ("spec", "column", "words"), [("nuq:2+5", "index", "beyond the 24"), ("sparse:50", "bitmap", "does not mark 12")]
)
def test_a_stream_that_would_write_beside_its_vectors_is_refused(spec: str, column: str, words: str) -> None:
    codec = fitted(spec)[0]
    code = codec.encode(vectors(seed=1)[0, :9])
    code[column][5] = 255
    with pytest.raises(ValueError, match=words):
        codec.deserialize(codec.serialize(code), 9)
    with pytest.raises(ValueError, match=words):
        codec.deserialize_all([codec.serialize(code)], [9])


@every_spec
def test_a_recipe_is_a_value_and_reads_back_from_its_text(spec: str) -> None:
    recipe = parse_recipe(spec)
    again = parse_recipe(recipe.text)
    assert again == recipe == fitted(spec)[0].recipe
    assert {recipe: 1}[again] == 1
    assert recipe.text == again.text == spec
    assert recipe != parse_recipe("int:7")
    with pytest.raises(AttributeError):
        recipe.text = "mean"  # type: ignore[misc]


@every_spec
@pytest.mark.parametrize("dtype", PARAMETER_DTYPES)
def test_a_saved_codec_decodes_bit_for_bit_as_before(spec: str, dtype: torch.dtype) -> None:
    codec = cast_parameters(fitted(spec)[1], dtype)
    data = safetensors.torch.save(codec.state_dict())
    again = codec_from_tensors(codec.recipe.text, codec.width, safetensors.torch.load(data))
    x = vectors(seed=1)[1]
    assert type(again) is type(codec)
    assert again.bits_per_token == codec.bits_per_token
    assert torch.equal(through(again, x), through(codec, x))
    assert [p.dtype for p in again.parameters()] == [dtype for _ in codec.parameters()]


@every_spec
def test_the_memory_of_a_codec_does_not_depend_on_what_it_was_used_for(spec: str) -> None:
    own = fitted(spec)[1]
    read = codec_from_tensors(own.recipe.text, own.width, own.state_dict())
    before = codec_memory([read])
    through(read, vectors(seed=1)[1])
    read.deserialize(read.serialize(read.encode(vectors(seed=1)[1])), vectors().shape[1])
    assert codec_memory([read]) == codec_memory([own]) == before


@every_spec
def test_tensors_that_do_not_fit_the_spec_are_refused_by_name(spec: str) -> None:
    tensors = dict(fitted(spec)[0].state_dict())
    for name, tensor in tensors.items():
        wrong = {**tensors, name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)}
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            codec_from_tensors(spec, WIDTH, wrong)
        with pytest.raises(ValueError, match=f"^{name} is missing"):
            codec_from_tensors(spec, WIDTH, {other: t for other, t in tensors.items() if other != name})
    with pytest.raises(ValueError, match=r"^stray does not belong"):
        codec_from_tensors(spec, WIDTH, {**tensors, "stray": torch.zeros(1)})


@every_spec
def test_a_codec_does_not_depend_on_which_others_are_fitted_with_it(spec: str) -> None:
    train, heldout = vectors(), vectors(seed=1)
    together = fit(spec, train, heldout)
    for index, codec in enumerate(together):
        (alone,) = fit(spec, train[index : index + 1], heldout[index : index + 1])
        for name, tensor in codec.state_dict().items():
            assert torch.equal(alone.state_dict()[name], tensor), f"{name} of site {index}"


@every_spec
def test_each_token_is_encoded_on_its_own(spec: str) -> None:
    """A row's code follows the row wherever it stands, and needs none of the other rows."""
    codec = fitted(spec)[0]
    x = vectors(seed=1)[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    whole = codec.encode(x)
    for numbers in (order, torch.arange(5)):
        own, expected = codec.encode(x[numbers]), whole.index(numbers)
        for name, column in own.columns.items():
            if isinstance(column, Ragged):
                assert rows_of(column) == rows_of(expected.columns[name])
            else:
                torch.testing.assert_close(own[name], expected[name])


@every_spec
def test_codes_may_be_joined_and_put_in_another_order(spec: str) -> None:
    """As caches do when tokens come in, are cropped, or beams change places."""
    codec = fitted(spec)[0]
    x = vectors(seed=1)[0]
    pieces = [codec.encode(rows) for rows in x.split(100)]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:50]
    joined = pieces[0].unflatten(1)
    for piece in pieces[1:]:
        joined = joined.append(piece.unflatten(1))
    torch.testing.assert_close(codec.decode(joined.flatten().index(order)), through(codec, x)[order])


@every_spec
def test_codes_of_a_batch_are_cut_indexed_and_appended_as_their_rows_are(spec: str) -> None:
    codec = fitted(spec)[0]
    x = vectors(sites=2, tokens=40, seed=1)
    code = codec.encode(x.flatten(0, 1)).unflatten(2)
    rows, mask = torch.tensor([1, 0, 1]), torch.tensor([False, True])
    for got, expected in (
        (code.narrow(3, 9), x[:, 3:9]),
        (code.narrow(3, 9).clone(), x[:, 3:9]),
        (code.index(rows), x[rows]),
        (code.index(mask), x[mask]),
        (code.narrow(0, 7).append(code.narrow(20, 40)), torch.cat([x[:, :7], x[:, 20:]], dim=1)),
        (code.index(rows).narrow(1, 2).to(torch.device("cpu")), x[rows, 1:2]),
    ):
        assert got.shape == expected.shape[:2]
        torch.testing.assert_close(codec.decode(got.flatten()), through(codec, expected.flatten(0, 1)))
    assert code.nbytes == sum(tensor.nbytes for tensor in code.tensors())


@every_spec
def test_bfloat16_activations_lose_no_more_than_bfloat16_does(spec: str) -> None:
    train = vectors()
    codec, from_bfloat16 = fit(spec, train)[0], fit(spec, train.bfloat16())[0]
    decoded = through(from_bfloat16, train[0].bfloat16())
    error = fraction_of_variance_unexplained(train[0], decoded).item()
    assert error == pytest.approx(fvu(codec, train[0]), rel=0.1, abs=1e-4)


@every_spec
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_activations_that_never_vary_are_given_back(spec: str, value: float) -> None:
    train = torch.full((2, 64, WIDTH), value)
    for codec in fit(spec, train):
        torch.testing.assert_close(through(codec, train[0]), train[0], rtol=1e-3, atol=1e-3)


@every_spec
def test_a_codec_fitted_to_no_variance_stays_finite_on_other_vectors(spec: str) -> None:
    codec = fit(spec, torch.ones(1, 64, WIDTH))[0]
    assert torch.isfinite(through(codec, vectors()[0])).all()


@every_spec
def test_a_channel_that_never_varied_may_vary_later(spec: str) -> None:
    train = vectors()
    train[:, :, 0] = 1.0
    codec = fit(spec, train)[0]
    later = train[0].clone()
    later[:, 0] = 5.0
    assert torch.isfinite(through(codec, later)).all()


@every_spec
@pytest.mark.parametrize("dtype", PARAMETER_DTYPES)
@pytest.mark.parametrize("size", [1.0, 0.01], ids=["usual", "small"])
def test_outliers_do_not_spread_beyond_their_token(spec: str, dtype: torch.dtype, size: float) -> None:
    """One number of 1e4, or a whole vector of them, decodes to something finite, whatever the vectors' usual size."""
    train = size * vectors()
    codec = cast_parameters(fit(spec, train)[0], dtype)
    clean = train[0]
    dirty = clean.clone()
    dirty[3, 5] = 1e4
    dirty[9] = -1e4
    decoded = through(codec, dirty)
    assert torch.isfinite(decoded).all()
    others = [row for row in range(len(clean)) if row not in (3, 9)]
    torch.testing.assert_close(decoded[others], through(codec, clean)[others], rtol=1e-2, atol=1e-2 * size)


@every_spec
def test_fitting_to_text_with_outliers_stays_finite(spec: str) -> None:
    train = vectors()
    train[:, 0] = 1e4
    train[:, 40, 2] = -1e4
    for index, codec in enumerate(fit(spec, train)):
        assert all(torch.isfinite(tensor).all() for tensor in codec.state_dict().values())
        assert torch.isfinite(through(codec, train[index])).all()


@every_spec
def test_codecs_need_no_gradients_once_loaded(spec: str) -> None:
    codec = codec_from_tensors(spec, WIDTH, fitted(spec)[0].state_dict())
    assert not through(codec, vectors()[0]).requires_grad


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("ae", "ae:", "ae:0", "ae:-4", "ae:4.5", "ae:4x", "ae:4x0", "ae:x8", "ae:4x8x2"),
        *("pca", "pca:-1", "pca:0", "pca:4x8", "mean:2", "identity:", "foo:3", "none", ":", ""),
        *("int", "int:0", "int:9", "int:2.5", "int:4g", "int:4g0", "int:4c8", "int:4g8c", "int(mean,mean)"),
        *("nuq", "nuq:0", "nuq:9", "nuq:3+", "nuq:3+0", "nuq:3+101", "nuq:3+1e1", "nuq:3-1", "nuq:3+1.2345"),
        *("rot", "rot:0", "rot:9", "rot:2+", "rot:2+q", "rot:2qjl"),
        *("pq", "pq:4", "pq:4x", "pq:4x0", "pq:4x9", "pq:0x4", "pq:x4", "pq:4x4x4"),
        *("sparse", "sparse:0", "sparse:101", "sparse:1.5", "sparse:-5"),
        *("ortho", "ortho:0", "ortho:-1", "ortho:4x8"),
        *("share", "share:1", "share:-5", "share:-2q3", "share:-2r0", "share:-2q8r4", "share:-2r", "share:-2r4q"),
        *("resid", "resid:4", "resid()", "resid(mean)", "resid(mean,)", "resid(,mean)", "resid(mean,mean,mean)"),
        *("resid(mean,mean", "resid(mean,resid(mean,mean)", "resid(mean),mean", "resid(mean,mean))"),
    ],
)
def test_a_spec_that_is_not_understood_is_answered_with_the_grammar(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(text)
    assert repr(text) in str(refused.value)
    written = str(refused.value).partition("; write ")[2]
    named = FAMILIES.get(text.split(":")[0].split("(")[0])
    assert written == named.grammar if named else all(family.grammar in written for family in FAMILIES.values())


@pytest.mark.parametrize("text", ["int:2g5", "int:2g48", "pq:5x4", "pq:48x1"])
def test_groups_and_subvectors_that_do_not_divide_the_width_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"do(es)? not divide the width 24"):
        parse_recipe(text).require_width(WIDTH)


def test_a_codec_within_a_codec_is_refused_by_its_own_name() -> None:
    with pytest.raises(UserError, match=r"is not understood; write resid.*both from as many layers"):
        parse_recipe("resid(share:-1,share:-2)")
    with pytest.raises(UserError, match=r"codec 'int:9' is not understood; write int:B"):
        parse_recipe("resid(pca:4,resid(mean,int:9))")
    with pytest.raises(UserError, match=r"resid.* does not suit this model: D = 25 is more than the width 24"):
        parse_recipe("resid(mean,pca:25)").require_width(WIDTH)


@pytest.mark.parametrize("text", ["resid(" * 1000, "resid(" * 9 + "mean" + ",mean)" * 9], ids=["cut", "whole"])
def test_specs_nested_too_deep_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="nested more than 8 deep") as refused:
        parse_recipe(text)
    assert len(str(refused.value)) < 200


def test_specs_nested_as_deep_as_may_be_are_read() -> None:
    assert parse_recipe("resid(" * 8 + "mean" + ",mean)" * 8).family == "resid"


@pytest.mark.parametrize("step", ["1e-30", "1e-7", "1e7", "0", "-1", "nan", "inf"])
def test_steps_beyond_reason_are_answered_with_the_grammar(step: str) -> None:
    with pytest.raises(UserError, match="step X, 1e-6 to 1e6"):
        parse_recipe(f"transform:s{step}")


@pytest.mark.parametrize("step", ["1e-6", "1e6"])
def test_the_least_and_the_largest_step_can_be_fitted(step: str) -> None:
    x = 1000 * torch.randn(1, 300, WIDTH, generator=torch.Generator().manual_seed(0))
    (codec,) = fit(f"transform:s{step}", x, x)
    assert codec.recipe == parse_recipe(codec.recipe.text)
    assert torch.isfinite(codec.decode(codec.encode(x[0]))).all()


def test_specs_may_have_spaces_around_them() -> None:
    assert parse_recipe(" ae:4x8 ") == parse_recipe("ae:4x8")


def test_the_hidden_layer_has_128_units_unless_said() -> None:
    assert parse_recipe("ae:4") == parse_recipe("ae:4x128")
    assert parse_recipe("ae:4x128").text == "ae:4"


@pytest.mark.parametrize(
    ("written", "text"),
    [("transform:2.0", "transform:2"), ("transform:s0.020", "transform:s0.02"), ("nuq:3+5.00", "nuq:3+5")],
)
def test_equal_recipes_have_one_text(written: str, text: str) -> None:
    assert parse_recipe(written) == parse_recipe(text)
    assert parse_recipe(written).text == parse_recipe(f" {text} ").text == text
    assert parse_recipe(f"resid(mean, {written})").text == f"resid(mean,{text})"


@pytest.mark.parametrize("text", ["ae:25", "ae:25x8", "pca:25", "ortho:25", "share:-1r25", "share:-1r25q8"])
def test_more_dimensions_than_the_width_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"25 is more than the width 24"):
        parse_recipe(text).require_width(WIDTH)


@pytest.mark.parametrize("text", [*SPECS, "ae:24", "pca:24", "ortho:24", "ae:4x4096"])
def test_specs_that_suit_the_width_are_let_through(text: str) -> None:
    parse_recipe(text).require_width(WIDTH)

"""The batched fit against one autoencoder trained alone, the slow and obvious way."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from leankv.cache.plan import Site
from leankv.calibration import fit as fit_module
from leankv.calibration.activations import Activations, ActivationsInMemory
from leankv.calibration.capture import capture
from leankv.calibration.fit import FittedCodec, Fitting, fit_codecs, on_its_own
from leankv.codecs import FitData, TrainingSettings, fraction_of_variance_unexplained, parse_recipe
from leankv.codecs.autoencoder import Autoencoder
from leankv.codecs.base import fit_together
from leankv.config.experiment import FitConfig
from leankv.data.blocks import Blocks
from leankv.errors import UserError
from leankv.models.geometry import find_geometry
from leankv.models.loading import LoadedModel
from leankv.progress import Silent, Stage
from tests import tiny

BLOCKS, BLOCK_LENGTH = 10, 32
SITES = [Site(layer, part) for layer in range(4) for part in ("k", "v")]
MEMORY = 1 << 30
CLOSED_FORM = ("pca:4", "mean", "int:2c", "nuq:2+5", "rot:2", "pq:8x4", "sparse:20", "resid(pca:2,int:2g8)")
SETTINGS = FitConfig(epochs=3, batch_tokens=48, learning_rate=3e-3, heldout_fraction=0.2)


class Stages(Silent):
    """Remembers which stages were shown."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Stage]:
        self.titles.append(title)
        with super().stage(title, steps) as step:
            yield step


@pytest.fixture
def captured(tmp_path: Path) -> Activations:
    """What the cache of a tiny Llama holds over ten blocks."""
    model = tiny.build("llama")
    loaded = LoadedModel(model, tiny.tokenizer(), "tiny", find_geometry(model), "", {})
    blocks = Blocks(tiny.tokens(BLOCKS, BLOCK_LENGTH), "calibration", "random")
    return capture(loaded, blocks, tmp_path / "captured", range(4), 2, {}, Silent())


def changed(activations: Activations, change: Any) -> Activations:
    """The same activations after `change(tensor)`, `[tokens, W]` to `[tokens, W]`."""
    return ActivationsInMemory(activations.manifest, {site: change(activations.read(*site)) for site in SITES})


def fitting(
    settings: FitConfig = SETTINGS,
    dtype: torch.dtype = torch.float32,
    seed: int = 5,
    sinks: int = 0,
    memory_bytes: int = MEMORY,
) -> Fitting:
    return Fitting(settings, dtype, seed, sinks, torch.device("cpu"), memory_bytes)


def fit(
    activations: Activations,
    sites: list[Site] = SITES,
    spec: str = "ae:4x16",
    settings: FitConfig = SETTINGS,
    dtype: torch.dtype = torch.float32,
    progress: Silent | None = None,
    memory_bytes: int = MEMORY,
) -> dict[Site, FittedCodec]:
    fitted: dict[Site, FittedCodec] = {}
    fit_codecs(
        activations,
        {site: parse_recipe(spec) for site in sites},
        fitting(settings, dtype, memory_bytes=memory_bytes),
        {},
        fitted.__setitem__,
        progress or Silent(),
    )
    return fitted


def first_heldout(settings: FitConfig) -> int:
    return (BLOCKS - max(1, round(settings.heldout_fraction * BLOCKS))) * BLOCK_LENGTH


def trained_alone(x: torch.Tensor, start: Any, settings: FitConfig, seed: int) -> tuple[Any, Any]:
    """One autoencoder, trained with nothing but `torch.nn` and `torch.optim` on `x` `[tokens, W]`.

    Args:
        start: a codec whose parameters training begins with.

    Returns:
        A function from vectors to what decoding their codes gives, and the held-out error before training and after
        each epoch.
    """
    train, heldout = x[: first_heldout(settings)], x[first_heldout(settings) :]
    mean = train.mean(dim=0)
    scale = ((train - mean) ** 2).mean().sqrt()
    hidden, dimensions = start.hidden_weight.shape
    encoder = nn.Linear(x.shape[1], dimensions)
    decoder = nn.Sequential(nn.Linear(dimensions, hidden), nn.GELU(), nn.Linear(hidden, x.shape[1]))
    model = nn.Sequential(encoder, decoder)
    for name, layer in (("encoder", encoder), ("hidden", decoder[0]), ("output", decoder[2])):
        layer.load_state_dict({kind: getattr(start, f"{name}_{kind}") for kind in ("weight", "bias")})

    def heldout_error() -> float:
        with torch.no_grad():
            u = (heldout - mean) / scale
            error = ((model(u) - u) ** 2).sum() / ((u - u.mean(dim=0)) ** 2).sum()
        return error.item()

    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    shuffle = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(len(train) / settings.batch_tokens)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs * steps_per_epoch)
    errors = [heldout_error()]
    best: Any = copy.deepcopy(model.state_dict())
    for _ in range(settings.epochs):
        order = torch.randperm(len(train), generator=shuffle)
        for start in range(0, len(train), settings.batch_tokens):
            u = (train[order[start : start + settings.batch_tokens]] - mean) / scale
            loss = nn.functional.mse_loss(model(u), u)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        error = heldout_error()
        if error < min(errors):
            best = copy.deepcopy(model.state_dict())
        errors.append(error)
    model.load_state_dict(best)

    @torch.no_grad()
    def reconstruct(vectors: torch.Tensor) -> torch.Tensor:
        code = encoder((vectors - mean) / scale).half()
        return mean + scale * decoder(code.float())

    return reconstruct, errors


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_batched_fit_gives_what_training_alone_gives(captured: Activations, epochs: int) -> None:
    settings = replace(SETTINGS, epochs=epochs)
    starts = fit(captured, settings=replace(settings, epochs=0))
    for site, fitted in fit(captured, settings=settings).items():
        x = captured.read(*site)
        reconstruct, errors = trained_alone(x, starts[site].codec, settings, seed=5)
        assert fitted.fvu_by_epoch == pytest.approx(errors[1:], rel=1e-4)
        expected = reconstruct(x)
        decoded = fitted.codec.decode(fitted.codec.encode(x))
        assert (decoded - expected).norm() <= 1e-4 * expected.norm()


def test_the_best_epoch_is_kept_where_later_ones_are_worse(captured: Activations) -> None:
    """Fitted long and fast to a single block, codecs do worse and worse on the other nine."""
    settings = replace(SETTINGS, epochs=20, batch_tokens=8, learning_rate=3e-2, heldout_fraction=0.9)
    starts = fit(captured, settings=replace(settings, epochs=0))
    before_the_last = 0
    for site, fitted in fit(captured, settings=settings).items():
        x = captured.read(*site)
        reconstruct, errors = trained_alone(x, starts[site].codec, settings, seed=5)
        before_the_last += errors.index(min(errors)) < settings.epochs
        expected = reconstruct(x)
        decoded = fitted.codec.decode(fitted.codec.encode(x))
        # Twenty epochs of such steps carry differences of rounding far.
        assert (decoded - expected).norm() <= 1e-3 * expected.norm()
        assert fitted.fvu == pytest.approx(min(errors), rel=1e-3)
    assert before_the_last, "the case shows nothing if every site's last epoch is its best"


@pytest.mark.parametrize("hidden", [16, 5])
def test_the_start_is_a_regression_on_principal_components(captured: Activations, hidden: int) -> None:
    """Nearly the subspace that holds most variance; its output is where the squared error is flat."""
    for site, fitted in fit(captured, spec=f"ae:4x{hidden}", settings=replace(SETTINGS, epochs=0)).items():
        codec: Any = fitted.codec
        x = captured.read(*site)[: first_heldout(SETTINGS)]
        u = (x - codec.mean) / codec.scale
        basis = torch.linalg.qr(codec.encoder_weight.T).Q
        best = torch.linalg.svdvals(u)[:4].square().sum()
        assert (u @ basis).square().sum() >= 0.99 * best
        features = nn.functional.gelu(codec.hidden_weight @ codec.encoder_weight @ u.T + codec.hidden_bias[:, None])
        features = torch.cat([features, torch.ones(1, len(u))])
        residual = u - (codec.output_weight @ features[:-1]).T - codec.output_bias
        assert (features @ residual).abs().max() <= 1e-3 * (features.norm(dim=1).max() * u.norm())
        if hidden >= 8:  # room for a pair of units to each component: the regression holds pca:4 in it
            assert residual.square().sum() <= (u - u @ basis @ basis.T).square().sum() * (1 + 1e-4)


@pytest.mark.parametrize("spec", [*CLOSED_FORM, "ae:4x16", "ortho:4", "resid(ae:2x8,nuq:2+5)"])
def test_heldout_blocks_change_no_parameter(captured: Activations, spec: str) -> None:
    """Where there is no epoch to choose, nothing of the held-out blocks may show."""
    settings = replace(SETTINGS, epochs=0)
    heldout = first_heldout(settings)
    other = changed(captured, lambda x: torch.cat([x[:heldout], 7 * x[heldout:] + 1]))
    before, after = fit(captured, spec=spec, settings=settings), fit(other, spec=spec, settings=settings)
    for site in SITES:
        for name, tensor in before[site].codec.state_dict().items():
            assert torch.equal(after[site].codec.state_dict()[name], tensor)
        assert after[site].fvu != before[site].fvu


@pytest.mark.parametrize(("fraction", "blocks"), [(0.01, 1), (0.1, 1), (0.3, 3), (0.99, 9)])
def test_whole_blocks_are_held_out_and_some_are_left_to_fit_to(
    captured: Activations, fraction: float, blocks: int
) -> None:
    marked = changed(captured, lambda x: torch.arange(len(x)).float()[:, None].expand(x.shape))
    fitted = fit(marked, [Site(0, "k")], "mean", replace(SETTINGS, heldout_fraction=fraction))[Site(0, "k")]
    last = (BLOCKS - blocks) * BLOCK_LENGTH - 1
    torch.testing.assert_close(fitted.codec.state_dict()["mean"], torch.full((32,), last / 2))


def test_there_is_one_error_an_epoch_for_trained_codecs_and_none_for_others(captured: Activations) -> None:
    for epochs in (0, 1, 4):
        settings = replace(SETTINGS, epochs=epochs)
        assert {len(f.fvu_by_epoch) for f in fit(captured, settings=settings).values()} == {epochs}
        for spec, reports in (
            ("ortho:2", epochs),
            ("resid(ae:2x8,pca:1)", epochs),
            ("resid(ae:2x8,ae:2x8)", 2 * epochs),
        ):
            assert {len(f.fvu_by_epoch) for f in fit(captured, [Site(0, "k")], spec, settings).values()} == {reports}
    for spec in CLOSED_FORM:
        assert {len(fitted.fvu_by_epoch) for fitted in fit(captured, [Site(0, "k")], spec).values()} == {0}


def test_the_error_is_that_of_the_heldout_blocks_through_the_finished_codec(captured: Activations) -> None:
    for site, fitted in fit(captured, dtype=torch.float16).items():
        heldout = captured.read(*site)[first_heldout(SETTINGS) :]
        decoded = fitted.codec.decode(fitted.codec.encode(heldout))
        assert fitted.fvu == fraction_of_variance_unexplained(heldout, decoded).item()
        assert fitted.fvu > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_take_the_precision_asked_for_and_statistics_keep_theirs(
    captured: Activations, dtype: torch.dtype
) -> None:
    codec = fit(captured, [Site(1, "v")], dtype=dtype)[Site(1, "v")].codec
    assert isinstance(codec, Autoencoder)
    assert {parameter.dtype for parameter in codec.parameters()} == {dtype}
    assert codec.mean.dtype == codec.scale.dtype == torch.float32


def least_memory(activations: Activations, spec: str) -> int:
    """What the refusal of a budget that is too small names as the least that works, in bytes."""
    with pytest.raises(UserError) as refusal:
        fit(activations, spec=spec, memory_bytes=1)
    return round(float(str(refusal.value).split()[-1]) * 1e9)


@pytest.mark.parametrize("spec", [*CLOSED_FORM, "ae:4x16", "ortho:4", "resid(ae:2x8,nuq:2+5)"])
def test_fitting_in_groups_changes_nothing(captured: Activations, spec: str) -> None:
    together, apart = Stages(), Stages()
    whole = fit(captured, spec=spec, progress=together)
    in_groups = fit(captured, spec=spec, progress=apart, memory_bytes=least_memory(captured, spec))
    assert len(together.titles) == 1
    assert len(apart.titles) > 1
    for site in SITES:
        assert in_groups[site].fvu_by_epoch == whole[site].fvu_by_epoch
        for name, tensor in whole[site].codec.state_dict().items():
            assert torch.equal(in_groups[site].codec.state_dict()[name], tensor), f"{name} of {site}"


@pytest.mark.parametrize("spec", ["pca:4", "ae:4x16", "resid(ae:2x8,nuq:2+5)"])
def test_a_group_s_vectors_are_gone_when_the_next_ones_are_read(
    captured: Activations, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked, held = fit_module._stacked, list[StorageWeakRef]()

    def watched(*arguments: Any) -> torch.Tensor:
        assert all(one.expired() for one in held)
        x = stacked(*arguments)
        held.append(StorageWeakRef(x.untyped_storage()))
        return x

    monkeypatch.setattr(fit_module, "_stacked", watched)
    fit(captured, spec=spec, memory_bytes=least_memory(captured, spec))
    assert len(held) > 1


def test_what_codecs_have_in_common_stays_where_it_is_when_one_of_them_leaves() -> None:
    """Fitted on another device: the first that is done is brought to the CPU, the others still have to encode there."""
    x = torch.randn(1, 64, 16)
    recipes = [parse_recipe(text) for text in ("resid(pca:4,int:4)", "resid(pca:4,int:2)")]
    (one,), (other,) = fit_together(recipes, FitData(x, x[:, :8], training=TrainingSettings(1, 32, 1e-2, 0)))
    assert one.first is other.first
    kept = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    own = on_its_own(one)
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == kept
    assert not set(kept.values()) & {tensor.data_ptr() for tensor in own.state_dict().values()}
    assert torch.equal(own.decode(own.encode(x[0])), one.decode(one.encode(x[0])))


def test_a_budget_that_holds_no_layer_is_refused_with_the_least_that_does(captured: Activations) -> None:
    least = least_memory(captured, "ae:4x16")
    with pytest.raises(UserError, match="--memory-budget"):
        fit(captured, memory_bytes=least - 2_000)
    assert set(fit(captured, memory_bytes=least)) == set(SITES)


def test_each_part_may_have_a_codec_of_its_own(captured: Activations) -> None:
    fitted: dict[Site, FittedCodec] = {}
    sites = {
        Site(2, "k"): parse_recipe("pca:3"),
        Site(2, "v"): parse_recipe("ae:2x8"),
        Site(0, "k"): parse_recipe("mean"),
    }
    fit_codecs(captured, sites, fitting(), {}, fitted.__setitem__, Silent())
    assert {site: f.codec.recipe.text for site, f in fitted.items()} == {
        Site(2, "k"): "pca:3",
        Site(2, "v"): "ae:2x8",
        Site(0, "k"): "mean",
    }


def test_the_seed_decides_the_weights(captured: Activations) -> None:
    site = {Site(0, "k"): parse_recipe("ae:4x16")}
    codecs: list[Any] = []
    for seed in (1, 1, 2):
        fit_codecs(captured, site, fitting(seed=seed), {}, lambda _, own: codecs.append(own.codec), Silent())
    assert torch.equal(codecs[0].encoder_weight, codecs[1].encoder_weight)
    assert not torch.equal(codecs[0].encoder_weight, codecs[2].encoder_weight)


@pytest.mark.parametrize("sinks", [3, BLOCK_LENGTH])
def test_tokens_that_are_kept_exact_are_not_fitted_to(captured: Activations, sinks: int) -> None:
    """Unless that leaves none."""
    fitted: dict[Site, FittedCodec] = {}
    fit_codecs(captured, {Site(1, "k"): parse_recipe("mean")}, fitting(sinks=sinks), {}, fitted.__setitem__, Silent())
    x = captured.read(1, "k")[: first_heldout(SETTINGS)].unflatten(0, (-1, BLOCK_LENGTH))
    expected = x[:, sinks % BLOCK_LENGTH :].flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(fitted[Site(1, "k")].codec.state_dict()["mean"], expected)

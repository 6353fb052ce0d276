"""`ae:D`, `ae:DxH`: the LeanLlama autoencoder, and its training, many at once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, linear

from leankv.codecs.base import (
    Codec,
    Context,
    FitData,
    Recipe,
    TrainingSettings,
    Vectors,
    as_float16,
    within_float16,
)
from leankv.codecs.code import Code
from leankv.codecs.registry import register
from leankv.codecs.statistics import ROWS, mean_of, sum_of_squares

DEFAULT_HIDDEN = 128  # LeanLlama's

OVERSAMPLED, POWER_ITERATIONS = 8, 4  # Halko et al. use 5 to 10, and 1 or 2 where the spectrum falls faster than here
RIDGE = 1e-5  # assumption: of the mean squared feature; keeps alike random features from cancelling large weights
SMOOTHNESS = 0.75  # deviation of the hidden units' random weights; see the log, 2026-11-24

Stack = dict[str, torch.Tensor]
"""Parameters of P autoencoders, each tensor `[P, ...]`."""


@register
@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """`latent` numbers a token, and a decoder with `hidden` units."""

    latent: int
    hidden: int = DEFAULT_HIDDEN

    family = "ae"
    revision = 1
    grammar = "ae:D or ae:DxH (D from 1 to the width, H from 1)"

    @classmethod
    def parse(cls, arguments: str) -> "AutoencoderRecipe":
        latent, times, hidden = arguments.partition("x")
        recipe = cls(int(latent), int(hidden) if times else DEFAULT_HIDDEN)
        if min(recipe.latent, recipe.hidden) < 1:
            raise ValueError
        return recipe

    @property
    def arguments(self) -> str:
        return f"{self.latent}" if self.hidden == DEFAULT_HIDDEN else f"{self.latent}x{self.hidden}"

    def check_width(self, width: int) -> None:
        if self.latent > width:
            raise ValueError(f"D = {self.latent} is more than the width {width}")

    def fit(self, data: FitData) -> list[Codec]:
        """Train P autoencoders in one batched optimisation, from a closed-form start.

        Mean squared error, Adam (Kingma and Ba, 2015, arXiv 1412.6980), a cosine schedule to zero; each site keeps the
        parameters of the epoch with its lowest held-out error, the start being epoch 0. The parameters are stacked and
        the products batched; no term couples two sites, so each ends where it would alone.
        """
        stack = train_stack(_start(self, data.train, data.training.seed), data)
        sites = range(len(data.train))
        return [Autoencoder(self, {name: tensor[p].clone() for name, tensor in stack.items()}) for p in sites]

    def unfitted(self, width: int) -> Codec:
        stack = {"mean": torch.zeros(width), "scale": torch.ones(1)}
        for name, inputs, outputs in (
            ("encoder", width, self.latent),
            ("hidden", self.latent, self.hidden),
            ("output", self.hidden, width),
        ):
            stack |= {f"{name}_weight": torch.zeros(outputs, inputs), f"{name}_bias": torch.zeros(outputs)}
        return Autoencoder(self, stack)

    def working_bytes(self, width: int, training: TrainingSettings) -> int:
        parameters = width * self.latent + self.latent * self.hidden + self.hidden * width
        # Weights, gradients, Adam's two moments, the best so far; and one step's vectors and their gradients, or the
        # pieces in which the held-out error is summed.
        vectors = max(training.batch_tokens * (8 * width + 6 * self.hidden), ROWS * (4 * width + 2 * self.hidden))
        return 4 * (6 * parameters + vectors)


class Autoencoder(Codec):
    """A linear encoder and a decoder with one hidden layer (LeanLlama).

    With `u = (x - mean) / scale`:

        z = W_e u + b_e                              `Linear(W, D)`
        x_hat = mean + scale * (W_2 gelu(W_1 z + b_1) + b_2)      `Linear(D, H) -> GELU -> Linear(H, W)`

    `mean` is the channel-wise mean of the calibration vectors and `scale` their root mean square deviation, one number
    for all channels: so the squared error in `u` is proportional to that in `x`.

    Storage: D float16 numbers a token. What it does not do: use more bits for some tokens than for others, or look at
    neighbouring tokens.
    """

    def __init__(self, recipe: AutoencoderRecipe, stack: Stack):
        """
        Args:
            recipe: what it was fitted as.
            stack: one autoencoder's tensors, without the leading P; see `AutoencoderRecipe.unfitted`.
        """
        super().__init__(recipe, stack["encoder_weight"].shape[1])
        for name, tensor in stack.items():
            if name in ("mean", "scale"):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.encoder_weight: torch.Tensor
        self.encoder_bias: torch.Tensor
        self.hidden_weight: torch.Tensor
        self.hidden_bias: torch.Tensor
        self.output_weight: torch.Tensor
        self.output_bias: torch.Tensor

    @property
    def bits_per_token(self) -> int:
        return self.encoder_weight.shape[0] * 16

    def encode(self, x: Vectors, context: Context = None) -> Code:
        u = within_float16((x.float() - self.mean) / self.scale).to(self.encoder_weight.dtype)
        z = linear(u, self.encoder_weight, self.encoder_bias)
        return Code({"z": as_float16(z)})

    def decode(self, code: Code, context: Context = None) -> Vectors:
        z = code["z"].to(self.hidden_weight.dtype)
        # With float16 parameters an outlier overflows in the hidden layer first, and infinity less infinity is NaN.
        hidden = within_float16(linear(z, self.hidden_weight, self.hidden_bias)).to(z.dtype)
        u = linear(gelu(hidden), self.output_weight, self.output_bias)
        return torch.addcmul(self.mean, within_float16(u), self.scale)


def _start(recipe: AutoencoderRecipe, train: torch.Tensor, seed: int) -> Stack:
    """Closed-form starts for `train` `[P, N, W]`: principal components in, least squares out.

    The encoder is the first D principal components, scaled to unit variance. Of the hidden units the first 2 D are
    pairs `gelu(z_d), gelu(-z_d)`, whose difference is `z_d` itself, so the start is never worse than `pca:D` on its own
    data; the others have random weights, and the output is the ridge regression of `u` on all of them (random features:
    Huang et al., Extreme Learning Machines, 2006).
    """
    dimensions, hidden = recipe.latent, recipe.hidden
    width = train.shape[2]
    mean = mean_of(train)
    deviation = (sum_of_squares(train, mean[:, None]) / train[0].numel()).sqrt().float()
    # Where nothing varies the scale is next to nothing, so that decoding gives the mean whatever the weights are.
    scale = deviation.clamp_min(1e-12)[:, None]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, min(width, 2 * dimensions + OVERSAMPLED), generator=generator)
    signs = torch.tensor([[1.0], [-1.0]])
    pairs = (signs * torch.eye(dimensions)[:, None]).flatten(0, 1)[:hidden]
    rest = hidden - len(pairs)
    drawn_weight = SMOOTHNESS * torch.randn(rest, dimensions, generator=generator)
    hidden_weight = torch.cat([pairs, drawn_weight]).to(train.device)
    hidden_bias = torch.cat([torch.zeros(len(pairs)), torch.randn(rest, generator=generator)]).to(train.device)
    starts = []
    for x, own_mean, own_scale in zip(train, mean, scale, strict=True):  # in turn, so none depends on the others

        def pieces(
            x: torch.Tensor = x, m: torch.Tensor = own_mean, s: torch.Tensor = own_scale
        ) -> Iterator[torch.Tensor]:
            return ((rows.float() - m) / s for rows in x.split(ROWS))

        encoder = _whitening_components(pieces, drawn.to(train.device), dimensions, len(x))
        encoder_bias = torch.zeros(dimensions, device=train.device)
        gram = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64, device=train.device)
        cross = torch.zeros(hidden + 1, width, dtype=torch.float64, device=train.device)
        for u in pieces():
            features = torch.nn.functional.pad(gelu(linear(u @ encoder.T, hidden_weight, hidden_bias)), (0, 1), value=1)
            gram += features.T @ features
            cross += features.T @ u
        ridge = RIDGE * gram.diagonal().mean()
        output = torch.linalg.solve(gram + ridge * torch.eye(hidden + 1, device=train.device), cross).float()
        starts.append(
            {
                "mean": own_mean,
                "scale": own_scale,
                "encoder_weight": encoder,
                "encoder_bias": encoder_bias,
                "hidden_weight": hidden_weight,
                "hidden_bias": hidden_bias,
                "output_weight": output[:-1].T,
                "output_bias": output[-1],
            }
        )
    return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}


def _whitening_components(
    pieces: Callable[[], Iterator[torch.Tensor]], drawn: torch.Tensor, dimensions: int, count: int
) -> torch.Tensor:
    """`[D, W]`: the first D principal components of centred vectors, each over its standard deviation.

    Block power iteration (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061) from `drawn` `[W, more than D]`: at a
    width of 1024 a fraction of what the covariance and its eigenvectors cost.
    """

    def covariance_times(directions: torch.Tensor) -> torch.Tensor:
        return torch.stack([u.T @ (u @ directions) for u in pieces()]).sum(dim=0) / count

    directions = torch.linalg.qr(drawn).Q
    for _ in range(POWER_ITERATIONS):
        directions = torch.linalg.qr(covariance_times(directions)).Q
    inner = directions.T @ covariance_times(directions)
    variances, mix = torch.linalg.eigh((inner + inner.T) / 2)  # ascending order
    components = (directions @ mix)[:, -dimensions:].flip(1)
    deviations = variances[-dimensions:].flip(0).clamp_min(1e-12).sqrt()
    return (components / deviations).T.contiguous()


def _reconstruct(stack: Stack, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised vectors and their reconstructions, both `[P, N, W]`, for `x` `[P, N, W]`."""

    def affine(inputs: torch.Tensor, name: str) -> torch.Tensor:
        return torch.baddbmm(stack[f"{name}_bias"][:, None], inputs, stack[f"{name}_weight"].mT)

    u = (x.float() - stack["mean"][:, None]) / stack["scale"][:, None]
    return u, affine(gelu(affine(affine(u, "encoder"), "hidden")), "output")


@torch.enable_grad()  # whatever holds where a notebook calls it
def train_stack(stack: Stack, data: FitData) -> Stack:
    """Train every autoencoder of `stack`; returns the parameters of each one's best epoch."""
    train, heldout, training = data.train, data.heldout, data.training
    parameters = [t.requires_grad_() for name, t in stack.items() if name not in ("mean", "scale")]
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    tokens = train.shape[1]
    steps = max(1, training.epochs * math.ceil(tokens / training.batch_tokens))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    shuffle = torch.Generator().manual_seed(training.seed)
    best = {name: tensor.detach().clone() for name, tensor in stack.items()}
    lowest = _heldout_error(stack, heldout)
    for epoch in range(1, training.epochs + 1):
        for rows in torch.randperm(tokens, generator=shuffle).to(train.device).split(training.batch_tokens):
            u, reconstructed = _reconstruct(stack, train[:, rows])
            # The sum over sites keeps them apart: each parameter sees only its own site's mean error.
            loss = (reconstructed - u).square().mean(dim=(1, 2)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        error = _heldout_error(stack, heldout)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        for name, tensor in stack.items():
            best[name][better] = tensor.detach()[better]
        data.on_epoch(epoch, error)
    return best


@torch.no_grad()
def _heldout_error(stack: Stack, heldout: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained `[P]` on `heldout` `[P, M, W]`; infinite where nothing varies."""
    mean, scale = stack["mean"][:, None], stack["scale"][:, None]
    errors = [
        sum_of_squares(rows, torch.addcmul(mean, _reconstruct(stack, rows)[1], scale))
        for rows in heldout.split(ROWS, dim=1)  # so that no whole reconstruction is held
    ]
    variance = sum_of_squares(heldout, mean_of(heldout)[:, None])
    return (torch.stack(errors).sum(dim=0) / variance).nan_to_num(math.inf)

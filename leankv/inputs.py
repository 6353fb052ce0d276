"""What Python callers hand in, read and checked: plans, layers, text, bundles, and the settings they come to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from leankv.cache.bundle import Bundle
from leankv.cache.plan import PlanSpec
from leankv.config.experiment import CodecConfig, DataConfig, Experiment, FitConfig, ModelConfig, ProtocolConfig
from leankv.data.given import GivenBlocks, Text, blocks_of
from leankv.errors import UserError
from leankv.models.fingerprint import fingerprint
from leankv.models.loading import LoadedModel
from leankv.models.structure import max_positions, text_config

LEAST_CALIBRATION_BLOCKS = 2  # one to fit to, one to hold out


def plan_of(plan: Any) -> PlanSpec:
    """A plan from what may stand for one: a recipe of all layers, or a table as YAML and JSON have it.

    Raises:
        UserError: it is none.
    """
    if isinstance(plan, PlanSpec):
        return plan
    return PlanSpec.parse(plan) if isinstance(plan, Mapping) else PlanSpec.uniform(plan)


def layers_text(layers: str | Sequence[int]) -> str:
    """Layers as an experiment writes them.

    Raises:
        UserError: they are no numbers.
    """
    if isinstance(layers, str):
        return layers
    if not layers or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
        raise UserError(f"layers must be numbers from 0 on, or text such as 'all' or '0,4,40-63', not {layers!r}")
    return ",".join(map(str, layers))


def blocks_for(model: Any, text: Text, tokenizer: Any, block_length: int, least: int = 1) -> torch.Tensor:
    """Blocks of a text that a model can read, `[blocks, block_length]`; see `leankv.data.given.blocks_of`.

    Raises:
        UserError: there are too few, or the model cannot read them.
    """
    tokens = blocks_of(text, tokenizer, block_length, least)
    vocabulary, limit = text_config(model.config).vocab_size, max_positions(model.config)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(f"the text has token ids beyond the {vocabulary} that the model knows; give its own tokenizer")
    if limit is not None and tokens.shape[1] > limit:
        raise UserError(f"blocks of {tokens.shape[1]} tokens are longer than the model's {limit} positions")
    return tokens


def check_made_for(bundle: Bundle, model: Any) -> None:
    """Refuse what is no bundle, or another model's.

    Raises:
        UserError: it is.
    """
    if not isinstance(bundle, Bundle):
        raise UserError(f"{bundle!r} is no bundle; leankv.load reads one from a folder")
    if bundle.made_for["fingerprint"] != fingerprint(model):
        raise UserError(
            f"the bundle was made for {bundle.made_for['name']} with other weights than this model's; give the model "
            "that it was made for"
        )


def settings_of(
    loaded: LoadedModel,
    tokens: torch.Tensor,
    plan: Any,
    protocol: ProtocolConfig,
    key_space: str,
    error_metric: str,
    seed: int,
    selection_blocks: int = DataConfig.selection_blocks,
) -> Experiment:
    """The settings that a command would have, for what is given from Python."""
    return Experiment(
        model=ModelConfig(name=loaded.name),
        data=DataConfig(
            dataset=GivenBlocks.name,
            block_length=tokens.shape[1],
            calibration_blocks=max(len(tokens), LEAST_CALIBRATION_BLOCKS),
            selection_blocks=selection_blocks,
        ),
        plan=plan_of(plan).table(),
        codec=CodecConfig(key_space=key_space),
        fit=FitConfig(error_metric=error_metric),
        protocol=protocol,
        seed=seed,
    )

"""The configuration of a model whose `generate` uses a compressed KV cache."""

from typing import Any

from transformers import PreTrainedConfig


class LeanKVConfig(PreTrainedConfig):
    """Which model it is, and where its weights lie; the codecs stand in `leankv_config.json` beside it.

    Args:
        base_model: name of the base model on the hub, or its folder.
        base_revision: of it; None for the latest.
        base_config: the base model's own configuration, where its weights lie in this repository; else None.
        leankv_version: that wrote it.
        **others: as every configuration takes.
    """

    model_type = "leankv"

    def __init__(
        self,
        base_model: str | None = None,
        base_revision: str | None = None,
        base_config: dict[str, Any] | None = None,
        leankv_version: str | None = None,
        **others: Any,
    ):
        self.base_model = base_model
        self.base_revision = base_revision
        self.base_config = base_config
        self.leankv_version = leankv_version
        super().__init__(**others)

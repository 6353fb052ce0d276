"""Suffix replay: measuring a plan from its first changed layer on. Exact, bit for bit.

A codec in layer i changes nothing that happens before layer i. So the hidden states that enter each layer are recorded
in one pass, and a plan that differs from the recorded one at layer i first is measured by running layers i to L only:
the layers before it are skipped (`leankv.models.skipping`), and what enters layer i is what was recorded.

Where neither memory nor disk hold the states of all layers, those of every k-th are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan, codecs_by_layer
from leankv.config.experiment import ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.evaluation.hidden_states import Chunk, HiddenStates, Recording
from leankv.evaluation.perplexity import BlockNats, LogitsRun, exact_window, measure_runs, run_through
from leankv.models.observers import attention_windows, layer_inputs
from leankv.models.rope import KeyRotation
from leankv.models.skipping import skipping
from leankv.models.structure import earlier_layers, find_decoder_layers, text_config
from leankv.storage.memory_budget import MemoryBudget


class Replay:
    """Measures plans on one set of blocks, each from its first changed layer on.

    A model whose decoder layers are not found is run whole for every plan.

    Args:
        model: the transformers model.
        blocks: what to measure on.
        protocol: how.
        memory: hidden states beyond this go to files in `folder`, memory-mapped.
        folder: for those.
        rotation: given, keys are encoded pre-RoPE.
    """

    def __init__(
        self,
        model: Any,
        blocks: Blocks,
        protocol: ProtocolConfig,
        memory: MemoryBudget,
        folder: Path,
        rotation: KeyRotation | None = None,
    ):
        self.model = model
        self.rotation = rotation
        self.blocks = blocks
        self.protocol = protocol
        self.windows = attention_windows(model.config) or []
        layers = find_decoder_layers(model)
        self.can_skip = layers is not None
        self.layers = torch.nn.ModuleList() if layers is None else layers
        self.states = HiddenStates(blocks.tokens.shape[1], memory, folder)
        layer_bytes = blocks.tokens.numel() * text_config(model.config).hidden_size * model.dtype.itemsize
        self.every = self.states.recorded_every(layer_bytes, len(self.layers))

    def measure(
        self,
        plan: Plan,
        on_block: Callable[[], None] = lambda: None,
        block_ids: Sequence[int] | None = None,
        extends_to_supersets: bool = False,
    ) -> BlockNats:
        """Nats of the blocks under `plan`; the same numbers as a full pass.

        Args:
            plan: site -> codec.
            on_block: called after each block.
            block_ids: numbers of the blocks to measure, in this order; all of them unless given.
            extends_to_supersets: plans to come may add to this one, so what enters its layers is recorded too (as it
                always is for the base). Needs all blocks.
        """
        assert block_ids is None or not extends_to_supersets
        if plan and self.can_skip and all(recording.plan for recording in self.states.recordings):
            self.measure({})
        known = self._nearest(plan)
        first = 0 if known is None else self._first_to_run(known, plan)
        into = None
        if self.can_skip and block_ids is None and (extends_to_supersets or not plan):
            into = Recording(plan) if known is None else known.up_to(first, plan)
        numbers = range(len(self.blocks)) if block_ids is None else block_ids
        nats = self._run(plan, list(numbers), known, first, into, on_block)
        if into is not None and (known is None or known.plan != plan):
            self.states.recordings.append(into)
        return nats

    def _run(
        self,
        plan: Plan,
        numbers: list[int],
        known: Recording | None,
        first: int,
        into: Recording | None,
        on_block: Callable[[], None],
    ) -> BlockNats:
        """Measure blocks from layer `first` on, beginning with what is `known`, and record what enters the others."""
        chunk = Chunk()

        def begin(places: Sequence[int]) -> LogitsRun:
            chunk.begin(tuple(numbers[place] for place in places))
            through_cache = run_through(self.model, self._cache(plan, first), self.protocol.coded_after)

            def run(inputs: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
                chunk.advance(inputs.shape[1])
                return through_cache(inputs, count)

            return run

        def read(like: torch.Tensor) -> torch.Tensor:
            assert known is not None, "without a recording every layer is run"
            return known.read(first, chunk).to(like.device)

        def record(layer: int, hidden: torch.Tensor) -> None:
            assert into is not None, "without a recording no layer is watched"
            self.states.record(into, layer, chunk, hidden)

        watched = [] if into is None else [n for n in range(first + 1, len(self.layers)) if n % self.every == 0]
        with layer_inputs(self.layers, watched, record), skipping(self.layers, first, read):
            return measure_runs(self.model, self.blocks.take(numbers), self.protocol, begin, on_block)

    def _nearest(self, plan: Plan) -> Recording | None:
        """The recording from which the fewest layers have to run; those that serve no later plan are dropped.

        A recorded plan that is no part of this one was a candidate that was left out; one that is a smaller part than
        another serves no more.
        """
        base = [recording for recording in self.states.recordings if not recording.plan]
        parts = [
            recording
            for recording in self.states.recordings
            if recording.plan and all(plan.get(site) == own for site, own in recording.plan.items())
        ]
        nearest = max(base + parts, key=lambda recording: self._first_change(recording.plan, plan), default=None)
        self.states.recordings = base + [recording for recording in parts if recording is nearest]
        return nearest

    def _first_to_run(self, known: Recording, plan: Plan) -> int:
        """The layer that a pass of `plan` begins at: one whose input was recorded."""
        first = min(self._first_change(known.plan, plan), len(self.layers) - 1)  # the head is always run
        return first - first % self.every

    def _first_change(self, recorded: Plan, plan: Plan) -> int:
        """The first layer that has to run when `plan` differs from what was recorded; the number of layers if none."""
        changed = (site for site in {*recorded, *plan} if recorded.get(site) != plan.get(site))
        first = min((layer for layer, _ in changed), default=len(self.layers))
        # Codecs that predict from layers before theirs need those to run, and what those predict from in turn.
        for layer, codecs in sorted(codecs_by_layer(plan).items(), reverse=True):
            if layer >= first:
                back = max(codec.n_context_layers for codec in codecs.values())
                first = min([first, *earlier_layers(self.windows, layer, back)])
        return first

    def _cache(self, plan: Plan, first: int) -> LeanCache:
        return LeanCache(
            self.model.config,
            plan,
            sinks=self.protocol.sinks,
            window=exact_window(self.protocol),
            first_layer=first,
            rotation=self.rotation,
            decode_once=True,
        )

"""Suffix replay: measuring a plan from its first changed layer on. Exact, bit for bit.

A codec in layer i changes nothing that happens before layer i. So the hidden states that enter each layer are recorded
in one pass, and a plan that differs from the recorded one at layer i first is measured by running layers i to L only.
The layers before it are replaced, for the time of the pass, by stand-ins, the last of which gives what was recorded;
masks, positions, the final norm and the head remain the model's own.

Where neither memory nor disk hold the states of all layers, those of every k-th are kept.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leankv.cache import LeanCache, Plan, attention_windows, earlier_layers
from leankv.capture import DISK_SHARE
from leankv.data import Blocks
from leankv.experiment import ProtocolConfig
from leankv.perplexity import BlockNats, measure_nats
from leankv.rope import KeyRotation
from leankv.store import cannot_write


@dataclass
class _Recording:
    """Hidden states entering layers, under one plan: (layer, block) -> `[T, hidden]`."""

    plan: Plan
    states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


class Replay:
    """Measures plans on one set of blocks, each from its first changed layer on.

    Args:
        model: the transformers model.
        blocks: what to measure on.
        protocol: how.
        memory_bytes: hidden states beyond this go to files in `folder`, memory-mapped.
        folder: for those.
        rotation: given, keys are encoded un-rotated.
    """

    def __init__(
        self,
        model: Any,
        blocks: Blocks,
        protocol: ProtocolConfig,
        memory_bytes: int,
        folder: Path,
        rotation: KeyRotation | None = None,
    ):
        self.model = model
        self.rotation = rotation
        self.blocks = blocks
        self.protocol = protocol
        self.memory_bytes = memory_bytes
        self.folder = folder
        self.layers = find_decoder_layers(model)
        self.windows = attention_windows(model.config) or []
        self.every = self._recorded_every()
        self._recordings: list[_Recording] = []
        self._waiting: list[torch.Tensor] = []  # numbers of the blocks to come, a batch each
        self._batch: list[int] = []  # those of the batch under way

    def measure(
        self,
        plan: Plan,
        on_block: Callable[[], None] = lambda: None,
        only: Sequence[int] | None = None,
        may_grow: bool = False,
    ) -> BlockNats:
        """Nats of the blocks under `plan`; the same numbers as a full pass.

        Args:
            plan: layer -> part -> codec.
            on_block: called after each block.
            only: numbers of the blocks to measure, in this order; all of them unless given.
            may_grow: plans to come may add to this one, so what enters its layers is recorded too (as it always is for
                the base). Needs all blocks.
        """
        if self.layers is None:
            measured = self.blocks if only is None else self.blocks.take(only)
            return measure_nats(self.model, measured, self.protocol, lambda: self._cache(plan, 0), on_block)
        if plan and not any(not recording.plan for recording in self._recordings):
            self.measure({})
        # A recorded plan that is no part of this one was a candidate that was left out; one that is a smaller part than
        # another serves no more.
        base = [recording for recording in self._recordings if not recording.plan]
        parts = [r for r in self._recordings if r.plan and all(plan.get(layer) == r.plan[layer] for layer in r.plan)]
        best = max(base + parts, key=lambda recording: self._first_change(recording.plan, plan), default=None)
        self._recordings = base + [recording for recording in parts if recording is best]
        first = 0
        assert only is None or not may_grow
        new = _Recording(plan) if only is None and (may_grow or not plan) else None
        if best is not None:
            first = min(self._first_change(best.plan, plan), len(self.layers) - 1)  # the head is always run
            first -= first % self.every
            if new is not None:
                new.states = {key: states for key, states in best.states.items() if key[0] <= first}
        numbers = torch.arange(len(self.blocks)) if only is None else torch.tensor(only)
        self._waiting = list(numbers.split(self.protocol.batch_size))
        with self._recorded(new, first), self._replaced(best, first):
            nats = measure_nats(
                self.model,
                self.blocks.take(numbers.tolist()),
                self.protocol,
                lambda: self._begin(plan, first),
                on_block,
            )
        if new is not None and (best is None or best.plan != plan):
            self._recordings.append(new)
        return nats

    def _recorded_every(self) -> int:
        """1 where memory and disk hold the states entering every layer; else the step between layers that are recorded.

        A pass then begins at the last recorded layer before the one that it needs.
        """
        config = self.model.config.get_text_config(decoder=True)
        state = self.blocks.tokens.numel() * config.hidden_size * self.model.dtype.itemsize
        room = self.memory_bytes + DISK_SHARE * shutil.disk_usage(self.folder).free
        return max(1, math.ceil(len(self.layers or []) * state / room))

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, into: _Recording) -> torch.Tensor:
        """An empty tensor: in memory while all that is recorded fits the limit, else in a mapped file."""
        held = {id(states): states for recording in (*self._recordings, into) for states in recording.states.values()}
        if sum(states.nbytes for states in held.values()) + math.prod(shape) * dtype.itemsize <= self.memory_bytes:
            return torch.empty(shape, dtype=dtype)
        return _mapped(shape, dtype, self.folder)

    def _first_change(self, recorded: Plan, plan: Plan) -> int:
        """The first layer that has to run when `plan` differs from what was recorded; the number of layers if none."""
        assert self.layers is not None
        first = min((n for n in {*recorded, *plan} if recorded.get(n) != plan.get(n)), default=len(self.layers))
        # Codecs that predict from layers before theirs need those to run, and what those predict from in turn.
        for layer in sorted(plan, reverse=True):
            if layer >= first:
                looks_back = max(codec.looks_back for codec in plan[layer].values())
                first = min([first, *earlier_layers(self.windows, layer, looks_back)])
        return first

    def _cache(self, plan: Plan, first: int) -> LeanCache:
        sinks, window = self.protocol.sinks, self.protocol.window
        return LeanCache(self.model.config, plan, sinks, window, first_layer=first, rotation=self.rotation)

    def _begin(self, plan: Plan, first: int) -> LeanCache:
        """A cache for the next batch of blocks."""
        self._batch = self._waiting.pop(0).tolist()
        return self._cache(plan, first)

    @contextmanager
    def _recorded(self, into: _Recording | None, first: int) -> Iterator[None]:
        """Record what enters the layers behind `first`."""
        assert self.layers is not None
        length = self.blocks.tokens.shape[1]
        filled: dict[tuple[int, int], int] = {}

        def recorder(into: _Recording, layer: int) -> Callable[..., None]:
            def record(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                for block, rows in zip(self._batch, hidden, strict=True):
                    key = (layer, block)
                    if key not in filled:
                        into.states[key] = self._allocate((length, hidden.shape[2]), hidden.dtype, into)
                    at = filled.get(key, 0)
                    filled[key] = at + len(rows)
                    into.states[key][at : filled[key]] = rows

            return record

        hooks = []
        if into is not None:
            hooks = [
                self.layers[layer].register_forward_pre_hook(recorder(into, layer), with_kwargs=True)
                for layer in range(first + 1, len(self.layers))
                if layer % self.every == 0
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _replaced(self, recording: _Recording | None, first: int) -> Iterator[None]:
        """Put stand-ins in place of the layers before `first`."""
        assert self.layers is not None
        originals = list(self.layers)
        try:
            for layer in range(first):
                self.layers[layer] = _StandIn(originals[layer])
            if first and recording is not None:
                self.layers[first - 1] = _StandIn(originals[first - 1], self._reader(recording, first))
            yield
        finally:
            for layer, original in enumerate(originals):
                self.layers[layer] = original

    def _reader(self, recording: _Recording, first: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gives the recorded hidden states of the batch under way, chunk after chunk."""
        batch: list[int] = []
        at = 0

        def read(like: torch.Tensor) -> torch.Tensor:
            nonlocal batch, at
            if batch is not self._batch:
                batch, at = self._batch, 0
            states = torch.stack([recording.states[first, block][at : at + like.shape[1]] for block in batch])
            at += like.shape[1]
            return states.to(like.device)

        return read


def find_decoder_layers(model: Any) -> torch.nn.ModuleList | None:
    """The list of a model's decoder layers; None where there is no single one of the right length."""
    length = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == length]
    # Lists inside a layer (experts, say) may happen to be as long; the decoder's is the outermost.
    return lists[0] if lists else None


class _StandIn(torch.nn.Module):
    """Stands in for a decoder layer: gives its input, or what `read` says; looks like the layer to the model's loop."""

    def __init__(self, original: torch.nn.Module, read: Callable[[torch.Tensor], torch.Tensor] | None = None):
        super().__init__()
        self.__dict__["original"] = original  # not registered: it is no part of this module
        self.__dict__["read"] = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.read is None else self.read(hidden_states)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """An empty tensor in a file of its own, which vanishes with the tensor.

    Raises:
        UserError: the disk has no room for it.
    """
    size = math.prod(shape)
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".hidden-states-", suffix=".tmp")
        try:
            # Space is claimed now: a full disk is an error here, and would be a crash when the pages are written.
            os.posix_fallocate(handle, 0, size * dtype.itemsize)
            return torch.from_file(name, shared=True, size=size, dtype=dtype).reshape(shape)
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error

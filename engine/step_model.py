"""How a step's tokens become hidden states and logits: what a runner needs of a model and its KV cache."""

import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.dispatch import Target
from ..kernels.paged import AttentionPlan, PagedSequence, PlanOptions, plan_attention
from .model.decoder import Decoder
from .records import KVSpec
from .sampler import Logits, finite_rows

TAPE_KERNELS = frozenset({"cpu-int8-24", "cpu-int8", "cpu-bf16", "cpu-fp32", "cpu-dense"})
_GATHER_BYTES = 64 << 20  # one padded batch of gathered pages of one layer


class StepModel(Protocol):
    """A model with its KV cache. Implementations: ``EagerModel``, and ``tape_model.TapeModel`` on a CPU."""

    vocab_size: int
    logit_rows: int  # so many rows' logits are found at once; of more, copies are made

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, touched or not."""

    def forward(self, token_ids: Sequence[int], groups: Sequence[Sequence[PagedSequence]]) -> None:
        """Compute a step's tokens, a row each: their K and V are cached, their final hidden states are kept.

        ``groups``: for each KV group, which rows belong to which sequence and its block table.
        """

    def finite(self) -> list[bool]:
        """Of each row of the latest ``forward``: whether its hidden state is free of NaN and infinity."""

    def logits(self, rows: Sequence[int]) -> Logits:
        """Of at least one row of the latest ``forward``; the values are valid until the next call."""

    def erase(self, first: int, last: int) -> None:
        """Zero the K and V that rows [first, last) of the latest ``forward`` wrote: they are not finite."""

    def close(self) -> None:
        """Let go of threads."""


def kv_cache_dtype(target: Target, compiled: bool = False) -> str:
    """The dtype the KV cache should have: what attention computes in.

    On a CPU torch's attention would first convert fp16 pages, which costs more than the bytes it saves at the
    batch sizes that fit a CPU; the compiled one converts in registers. Both are fp32 for ``--dtype float32``.
    """
    if compiled:
        return "float32" if target.dtype == torch.float32 else "float16"
    return str(target.activation_dtype).removeprefix("torch.")


def tape_refusal(kernels: Iterable[str], block_size: int, head_dim: int) -> str | None:
    """Why a model whose linears got ``kernels`` cannot run as a tape, or None."""
    others = set(kernels) - TAPE_KERNELS
    if others:
        return f"{', '.join(sorted(others))} cannot be recorded"
    if block_size < 16:
        return f"--block-size {block_size}: the compiled attention needs 16 or more"
    if head_dim % 16 != 0:
        return f"heads of {head_dim}: the compiled attention needs a multiple of 16"
    return None


def allocate_kv_cache(spec: KVSpec, num_blocks: int, block_size: int, device: str = "cpu") -> Tensor:
    """[layers, blocks, block_size, 2 (K, V), Hkv, D] of zeros. A CPU's memory is taken when first written."""
    shape = (len(spec.layers), num_blocks, block_size, 2, spec.num_kv_heads, spec.head_dim)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class EagerModel:
    """A decoder over torch's ops, on any device: the oracle of faster step models."""

    def __init__(
        self, decoder: Decoder, kv_specs: Sequence[KVSpec], num_blocks: int, block_size: int
    ) -> None:
        self.vocab_size = decoder.config.vocab_size
        self.logit_rows = sys.maxsize
        self._decoder = decoder
        self._device = str(decoder.embed_tokens.device)
        self._block_size = block_size
        self._specs = tuple(kv_specs)
        self._caches = [allocate_kv_cache(spec, num_blocks, block_size, self._device) for spec in kv_specs]
        # Layer -> (its group's index, its own cache [blocks, block_size, 2, Hkv, D]).
        self._layers = {
            layer: (group, self._caches[group][place])
            for group, spec in enumerate(kv_specs)
            for place, layer in enumerate(spec.layers)
        }
        assert sorted(self._layers) == list(range(decoder.config.num_layers))
        self._scale = 1 / math.sqrt(decoder.config.head_dim)
        self._plans: list[AttentionPlan] = []
        self._hidden = torch.empty(0, decoder.config.hidden_size)

    @property
    def kv_bytes(self) -> int:
        """See StepModel."""
        return sum(cache.numel() * cache.element_size() for cache in self._caches)

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], groups: Sequence[Sequence[PagedSequence]]) -> None:
        """See StepModel."""
        plans = self._plans = [self._plan_group(group, s) for group, s in enumerate(groups)]
        ops = self._decoder.ops

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group, cache = self._layers[layer]
            ops.kv_write(k, v, cache, plans[group].slot_mapping)
            out: Tensor = ops.paged_attention(q, cache, plans[group], self._scale)
            return out

        positions = [p for s in groups[0] for p in range(s.start, s.start + s.count)]
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        places = torch.tensor(positions, dtype=torch.int64, device=self._device)
        self._hidden = self._decoder(ids, places, attend)

    @torch.inference_mode()
    def finite(self) -> list[bool]:
        """See StepModel."""
        return finite_rows(self._hidden)

    @torch.inference_mode()
    def logits(self, rows: Sequence[int]) -> Logits:
        """See StepModel."""
        first, end = rows[0], rows[0] + len(rows)
        neighbours = list(rows) == list(range(first, end))  # then nothing is copied
        hidden = self._hidden[first:end] if neighbours else self._hidden[list(rows)]
        return Logits.of(self._decoder.logits(hidden))

    @torch.inference_mode()
    def erase(self, first: int, last: int) -> None:
        """See StepModel. A masked slot takes part in attention times zero, and zero times NaN is NaN."""
        for cache, plan in zip(self._caches, self._plans, strict=True):
            cache.flatten(1, 2)[:, plan.slot_mapping[first:last]] = 0

    def close(self) -> None:
        """Nothing to let go of."""

    def _plan_group(self, group: int, sequences: Sequence[PagedSequence]) -> AttentionPlan:
        spec = self._specs[group]
        token_bytes = 2 * spec.num_kv_heads * spec.head_dim * self._caches[group].element_size()
        options = PlanOptions(
            self._block_size, spec.window, self._device, self._decoder.dtype, _GATHER_BYTES // token_bytes
        )
        return plan_attention(sequences, options)

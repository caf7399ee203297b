"""A decoder's forward as a tape of compiled CPU kernels: the same decoder code, recorded once.

Imports numba: reached from ``build`` only where the compiled kernels can run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cpu.abi import use_cache
from ..kernels.cpu.compiled import CompiledLinear, kernels_for
from ..kernels.cpu.paged_attention import SPAN_ROWS
from ..kernels.cpu.pool import Pool
from ..kernels.cpu.recorder import PagedCache, Recorder
from ..kernels.cpu.row_results import decoded
from ..kernels.cpu.self_test import wrong_kernels
from ..kernels.cpu.tape import GroupInputs, Inputs, Tape
from ..kernels.cpu.weights import DenseWeight
from ..kernels.dispatch import Ops
from ..kernels.paged import PagedSequence
from .config import EngineConfig
from .errors import ConfigError
from .hardware import cache_folder
from .model.config import ModelConfig
from .model.decoder import Decoder
from .model.layers import Linear, RotaryEmbedding
from .model.loader import LoadedModel
from .records import KVSpec
from .sampler import Logits

_HEAD_ROWS = 64  # rows that go through the output head at once
_ROTARY_CHUNK = 4096  # positions whose angles are computed when the first of them is needed
# A block table by its identity: itself, as an array of int32, the array's address.
_Tables = dict[int, tuple[tuple[int, ...], np.ndarray, int]]


def build_tape_model(
    loaded: LoadedModel, specs: Sequence[KVSpec], num_blocks: int, config: EngineConfig, num_threads: int
) -> "TapeModel":
    """Record the decoder of a loaded model. Machine code is kept in the user's cache folder.

    ConfigError: a kernel gives a wrong answer to a known question.
    """
    use_cache(cache_folder())
    linears = [weight for weight in loaded.weights.values() if isinstance(weight, Linear)]
    wrong = wrong_kernels(p for linear in linears for p in linear.parts if isinstance(p, CompiledLinear))
    if wrong:
        raise ConfigError(
            f"--cpu-kernels {config.cpu_kernels}: wrong results on this CPU from {', '.join(wrong)}; use "
            "--cpu-kernels torch"
        )
    shape = (num_blocks, config.block_size)
    limits = (config.max_num_batched_tokens, config.max_model_len or loaded.config.max_position_embeddings)
    return TapeModel(loaded.config, loaded.weights, specs, shape, num_threads, limits)


def tell_of_compilation(progress: Callable[[str, int, int, str], None]) -> None:
    """To who waits at a first start: nothing where kernels of these sources were compiled before."""
    if not any(use_cache(cache_folder()).iterdir()):
        progress("kernels", 0, 1, "compiling kernels for this CPU: some seconds, once")


class _Recorded:
    """Parts of a Linear while the decoder is recorded: a PackedLinear over meta tensors."""

    def __init__(self, recorder: Recorder, parts: Sequence[CompiledLinear]) -> None:
        self._recorder = recorder
        self._parts = parts

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.nbytes for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        # Dense parts say "fp32" and do not mind what low-bit ones beside them meet.
        rounded = (part.activations for part in self._parts if part.activations != "fp32")
        return self._recorder.linear([part.weight for part in self._parts], x, next(rounded, "fp32"))


def _compiled_parts(linear: Linear) -> list[CompiledLinear]:
    parts = [part for part in linear.parts if isinstance(part, CompiledLinear)]
    assert len(parts) == len(linear.parts)
    return parts


def _recording_ops(recorder: Recorder) -> Ops:
    """The decoder's own ops; attention goes through ``attend``."""

    def elsewhere(*args: object) -> Any:
        raise AssertionError("attention is recorded by Recorder.attend")

    return Ops(
        embedding=recorder.embedding,
        rms_norm=recorder.rms_norm,
        add_rms_norm=recorder.add_rms_norm,
        rope=recorder.rope,
        silu_and_mul=recorder.silu_and_mul,
        kv_write=elsewhere,
        paged_attention=elsewhere,
        causal_attention=elsewhere,
    )


def _dense_head(head: Linear | Tensor) -> DenseWeight | None:
    """The head's weight if it is dense: embeddings can then be read from it."""
    assert isinstance(head, Linear)
    (part,) = _compiled_parts(head)
    return part.weight if isinstance(part.weight, DenseWeight) else None


class _RotaryTable:
    """cos, sin: fp32 [max_positions, head_dim / 2], filled in pieces as sequences grow."""

    def __init__(self, config: ModelConfig, max_positions: int) -> None:
        self._rotary = RotaryEmbedding(config)
        self._half = config.head_dim // 2
        self._filled = 0
        self.cos, self.sin = (_lazy_zeros((max_positions, self._half), torch.float32) for _ in range(2))

    def reach(self, position: int) -> None:
        """Make sure that ``position`` is filled."""
        while self._filled <= position:
            stop = min(self._filled + _ROTARY_CHUNK, len(self.cos))
            cos, sin = self._rotary(torch.arange(self._filled, stop))
            self.cos[self._filled : stop] = cos[:, 0, self._half :]
            self.sin[self._filled : stop] = sin[:, 0, self._half :]
            self._filled = stop


class TapeModel:
    """A step model: token ids and pages in, hidden states and logits out; holds the KV cache.

    Pages are laid out for the compiled attention, see ``kernels/cpu/paged_attention.py``. A step whose rows
    are all plain calls no torch, but at every 4096th position: see ``Sampler.sample``.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Linear | Tensor],
        specs: Sequence[KVSpec],
        cache_shape: tuple[int, int],
        num_threads: int,
        limits: tuple[int, int],
    ) -> None:
        """cache_shape: (blocks, tokens in a block); limits: tokens of one step, of one sequence."""
        num_blocks, block_size = cache_shape
        max_tokens, max_positions = limits
        self.vocab_size = config.vocab_size
        self.logit_rows = _HEAD_ROWS
        head = weights["lm_head"]
        assert isinstance(head, Linear)
        isa = _compiled_parts(head)[0].isa
        self._config = config
        self._block_size = block_size
        self._inputs = Inputs(max_tokens, len(specs))
        self._pool = Pool(num_threads)
        self._caches = _allocate(specs, num_blocks, block_size)
        self._rotary = _RotaryTable(config, max_positions)
        self._tables: _Tables = {}
        self._num_rows = 0  # of the latest step
        self._finite = np.zeros(max_tokens, np.bool_)
        kernels = kernels_for(isa)
        tied = _dense_head(weights["lm_head"]) if config.tie_word_embeddings else None
        self._body = self._record_body(Recorder(kernels, self._inputs, num_threads, tied), weights)
        self._head_inputs = Inputs(_HEAD_ROWS)  # its token ids are rows of the body's output
        self._keys = np.zeros(_HEAD_ROWS, np.int64)
        self._head = self._record_head(Recorder(kernels, self._head_inputs, num_threads), head)
        self._values = [self._head.output[:count] for count in range(_HEAD_ROWS + 1)]

    def _record_body(self, recorder: Recorder, weights: Mapping[str, Linear | Tensor]) -> Tape:
        recorded = {
            name: Linear([_Recorded(recorder, _compiled_parts(weight))])
            if isinstance(weight, Linear)
            else weight
            for name, weight in weights.items()
        }
        decoder = Decoder(self._config, recorded, _recording_ops(recorder))
        decoder.rotary = lambda positions, dtype: (self._rotary.cos, self._rotary.sin)
        nothing = torch.empty(0, dtype=torch.int64)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return recorder.attend(self._caches[layer], q, k, v)

        hidden = decoder(nothing, nothing, attend)
        recorder.finite(hidden, self._finite)
        return recorder.finish(hidden)

    def _record_head(self, recorder: Recorder, head: Linear) -> Tape:
        parts = _compiled_parts(head)
        logits = _Recorded(recorder, parts)(recorder.choose(self._body.output, self._keys))
        recorder.largest(logits, self._keys, follows=len(parts) == 1)
        return recorder.finish(logits)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, touched or not."""
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self._caches)

    def forward(self, token_ids: Sequence[int], groups: Sequence[Sequence[PagedSequence]]) -> None:
        """See StepModel."""
        inputs, count = self._inputs, len(token_ids)
        inputs.tokens[0] = self._num_rows = count
        inputs.token_ids[:count] = token_ids
        for s in groups[0]:
            if s.count == 1:
                inputs.positions[s.first] = s.start
            else:
                inputs.positions[s.first : s.first + s.count] = np.arange(s.start, s.start + s.count)
            self._rotary.reach(s.start + s.count - 1)
        tables: _Tables = {}
        for group, sequences in zip(inputs.groups, groups, strict=True):
            tables.update(self._fill(group, sequences))
        self._tables = tables
        self._body.run(self._pool)

    def _fill(self, group: GroupInputs, sequences: Sequence[PagedSequence]) -> _Tables:
        """Slots and spans of one KV group. Returns the block tables as arrays: their addresses are in use."""
        used: _Tables = {}
        size, num_spans = self._block_size, 0
        for s in sequences:
            # The scheduler hands out the same tuple until a table grows.
            known = self._tables.get(id(s.block_table))
            if known is None or known[0] is not s.block_table:
                array = np.array(s.block_table, np.int32)
                known = (s.block_table, array, array.ctypes.data)
            used[id(s.block_table)] = known
            _, table, address = known
            if s.count == 1:
                group.slots[s.first] = s.block_table[s.start // size] * size + s.start % size
            else:
                positions = np.arange(s.start, s.start + s.count)
                group.slots[s.first : s.first + s.count] = table[positions // size] * size + positions % size
            for row in range(0, s.count, SPAN_ROWS):
                rows = min(SPAN_ROWS, s.count - row)
                group.spans[num_spans] = s.first + row, rows, s.start + row, address
                num_spans += 1
        group.num_spans[0] = num_spans
        return used

    def finite(self) -> list[bool]:
        """See StepModel."""
        rows: list[bool] = self._finite[: self._num_rows].tolist()
        return rows

    def logits(self, rows: Sequence[int]) -> Logits:
        """See StepModel."""
        if len(rows) <= _HEAD_ROWS:
            return self._few_logits(rows)
        pieces = []
        for begin in range(0, len(rows), _HEAD_ROWS):
            piece = self._few_logits(rows[begin : begin + _HEAD_ROWS])
            pieces.append(replace(piece, values=piece.values.clone()))
        finite, largest = [f for p in pieces for f in p.finite], [i for p in pieces for i in p.largest]
        return Logits(torch.cat([piece.values for piece in pieces]), finite, largest)

    def _few_logits(self, rows: Sequence[int]) -> Logits:
        count = len(rows)
        self._head_inputs.tokens[0] = count
        self._head_inputs.token_ids[:count] = rows
        self._head.run(self._pool)
        largest, finite = decoded(self._keys[:count].tolist())
        return Logits(self._values[count], finite, largest)

    def erase(self, first: int, last: int) -> None:
        """See StepModel."""
        for cache in self._caches:
            slots = torch.from_numpy(self._inputs.groups[cache.group].slots[first:last])
            block, token = slots // self._block_size, slots % self._block_size
            cache.keys[block, :, token // 16, :, token % 16] = 0
            cache.values[block, :, token] = 0

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def _allocate(specs: Sequence[KVSpec], num_blocks: int, block_size: int) -> list[PagedCache]:
    """One cache per layer, in the order of layers. Zeros that take memory when first written."""
    caches: dict[int, PagedCache] = {}
    for index, spec in enumerate(specs):
        dtype: torch.dtype = getattr(torch, spec.dtype)
        for layer in spec.layers:
            shape = (num_blocks, spec.num_kv_heads, block_size // 16, spec.head_dim, 16)
            keys = _lazy_zeros(shape, dtype)
            values = _lazy_zeros((num_blocks, spec.num_kv_heads, block_size, spec.head_dim), dtype)
            caches[layer] = PagedCache(keys, values, block_size, index, spec.window)
    return [caches[layer] for layer in sorted(caches)]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is taken when first written (torch's own are written at once)."""
    kind = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    return torch.from_numpy(np.zeros(shape, kind))

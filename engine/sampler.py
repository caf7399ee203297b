"""From logits to tokens: one batch of rows at a time, each row by its own parameters.

A row's randomness is a function of (its seed, how many tokens it has sampled), so a sequence's tokens do not
depend on what else is in the batch, on lag or on preemption.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .records import SamplingParams, TokenLogprobs

_PREFIX = 1024  # how many of a row's largest logits are sorted before all of them are
_MIN_TEMPERATURE = 1e-8  # below it a float32 quotient would be 0 / 0; the choice is the argmax long before
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Logits:
    """values: [R, vocab] fp32. Of each row: whether all of it is finite, and the first of its largest.

    Where a row is not finite, its ``largest`` means nothing.
    """

    values: Tensor
    finite: list[bool]
    largest: list[int]

    @classmethod
    def of(cls, values: Tensor) -> "Logits":
        """Look at [R, vocab] fp32 with torch, on any device."""
        return cls(values, finite_rows(values), _largest(values))

    def rows(self, rows: Sequence[int]) -> "Logits":
        """Some of the rows, in their order, none twice."""
        if len(rows) == len(self.finite):
            return self
        finite, largest = [self.finite[row] for row in rows], [self.largest[row] for row in rows]
        return Logits(self.values[rows], finite, largest)


@dataclass(slots=True, eq=False)
class SamplingState:
    """What sampling knows of one sequence. ``seed``: drawn by the owner where the request has none."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    _counts: Tensor | None = None  # [vocab] fp32: how often each token was output; only for penalties
    _in_prompt: Tensor | None = None  # [vocab] bool
    _is_plain: bool = False

    def __post_init__(self) -> None:
        params = self.params
        ruled = params.temperature > 0 or params.logit_bias or _has_penalty(params)
        self._is_plain = not ruled and params.logprobs is None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the first of the largest logits, and nobody asks for more."""
        return self._is_plain and not self.min_tokens_left

    def append(self, token_id: int) -> None:
        """Book a sampled token."""
        self.output_token_ids.append(token_id)
        if self._counts is not None:
            self._count(token_id, 1)

    def truncate(self, num_tokens: int) -> None:
        """Forget all outputs but the first ``num_tokens``: the step that gave them was thrown away."""
        assert num_tokens <= len(self.output_token_ids)
        if self._counts is not None:
            for token_id in self.output_token_ids[num_tokens:]:
                self._count(token_id, -1)
        del self.output_token_ids[num_tokens:]

    @torch.inference_mode()
    def _count(self, token_id: int, times: int) -> None:
        assert self._counts is not None
        self._counts[token_id] += times

    def seen(self, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """([vocab] counts of the outputs, [vocab] whether in the prompt); built once, then kept."""
        if self._counts is None or self._in_prompt is None:
            outputs = torch.tensor(self.output_token_ids, dtype=torch.int64)
            self._counts = torch.bincount(outputs, minlength=vocab_size).to(device, torch.float32)
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
            self._in_prompt[torch.tensor(self.prompt_token_ids, dtype=torch.int64)] = True
            self._in_prompt = self._in_prompt.to(device)
        return self._counts, self._in_prompt

    @property
    def min_tokens_left(self) -> bool:
        """Whether the sequence may not end yet."""
        return len(self.output_token_ids) < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome. ``finite`` False: the logits hold a NaN or an infinity, there is no token."""

    token_id: int
    logprobs: TokenLogprobs | None
    finite: bool


class Sampler:
    """Samples one token per row. Holds no state of sequences; ``SamplingState`` does."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Logits, states: Sequence[SamplingState]) -> list[Sampled]:
        """logits: unchanged; one state per row. The tokens are not booked in the states.

        Plain rows touch no tensor: on a CPU every torch call of a small model's step takes 15 to 40 us,
        because weights have just swept its code out of the caches.
        """
        found: list[Sampled] = []
        ruled: list[int] = []
        for state, token_id, finite in zip(states, logits.largest, logits.finite, strict=True):
            if not state.is_plain:
                ruled.append(len(found))
            found.append(Sampled(token_id, None, finite))
        if ruled:
            sampled = self._by_rules(logits.rows(ruled), [states[row] for row in ruled])
            for row, own in zip(ruled, sampled, strict=True):
                found[row] = own
        return found

    @torch.inference_mode()
    def _by_rules(self, of: Logits, states: Sequence[SamplingState]) -> list[Sampled]:
        logits, finite = of.values, of.finite
        logprobs = _logprobs(logits, states)
        changed = self._biased(logits, states)
        token_ids = list(of.largest) if changed is logits else _largest(changed)
        random = [row for row, state in enumerate(states) if state.params.temperature > 0 and finite[row]]
        if random:
            chosen = _draw(
                changed[random] if len(random) < len(states) else changed, [states[r] for r in random]
            )
            for row, token_id in zip(random, chosen, strict=True):
                token_ids[row] = token_id
        found = [
            None if row is None else row.of(token_id)
            for row, token_id in zip(logprobs, token_ids, strict=True)
        ]
        return [Sampled(*row) for row in zip(token_ids, found, finite, strict=True)]

    def _biased(self, logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Logit bias, penalties and the mask of min_tokens: a new tensor, or ``logits`` if no row has any."""
        biased = [row for row, state in enumerate(states) if state.params.logit_bias]
        penalised = [row for row, state in enumerate(states) if _has_penalty(state.params)]
        held = [row for row, state in enumerate(states) if state.min_tokens_left]
        if not (biased or penalised or held):
            return logits
        changed, vocab_size = logits.clone(), logits.shape[1]
        if biased:
            cells = [
                (row, token_id, bias)
                for row in biased
                for token_id, bias in states[row].params.logit_bias.items()
                if 0 <= token_id < vocab_size
            ]
            rows, ids, values = _columns(cells, logits.device)
            changed.index_put_((rows, ids), values.float(), accumulate=True)
        if penalised:
            changed[penalised] = _penalise(changed[penalised], [states[row] for row in penalised])
        if held:
            cells = [
                (row, token_id, -math.inf)
                for row in held
                for token_id in {*self._eos_token_ids, *states[row].params.stop_token_ids}
                if 0 <= token_id < vocab_size
            ]
            rows, ids, values = _columns(cells, logits.device)
            changed.index_put_((rows, ids), values.float())
        return changed


def finite_rows(rows: Tensor) -> list[bool]:
    """Whether each row is free of NaN and infinity: by its sum, which is cheaper, unless that overflows."""
    sums: list[float] = rows.sum(-1).tolist()
    if all(map(math.isfinite, sums)):
        return [True] * len(sums)
    exact: list[bool] = rows.isfinite().all(-1).tolist()
    return exact


def _largest(logits: Tensor) -> list[int]:
    """Of each row the first of its largest.

    On a CPU by numpy, whose loop is vectorized: 3 us for 32,000 logits where torch takes 70 (Emerald Rapids).
    """
    largest = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    found: list[int] = largest.tolist()
    return found


def _columns(cells: list[tuple[int, int, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.tensor([cell[0] for cell in cells], dtype=torch.int64, device=device)
    ids = torch.tensor([cell[1] for cell in cells], dtype=torch.int64, device=device)
    return rows, ids, torch.tensor([cell[2] for cell in cells], dtype=torch.float64, device=device)


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _penalise(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Repetition over prompt and outputs, frequency and presence over outputs. [N, vocab] -> the same."""
    seen = [state.seen(logits.shape[1], logits.device) for state in states]
    counts, in_prompt = torch.stack([s[0] for s in seen]), torch.stack([s[1] for s in seen])
    repetition = _column([state.params.repetition_penalty for state in states], logits)
    frequency = _column([state.params.frequency_penalty for state in states], logits)
    presence = _column([state.params.presence_penalty for state in states], logits)
    output = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(output | in_prompt, repeated, logits)
    return (logits - frequency * counts - presence * output).clamp(-_LARGEST, _LARGEST)


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token per row by temperature, min_p, top_k, top_p, and the row's own uniform number."""
    params = [state.params for state in states]
    temperature = _column([max(p.temperature, _MIN_TEMPERATURE) for p in params], logits)
    # The largest becomes 0, so that no temperature can overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if any(p.min_p > 0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], logits)
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    narrow = [row for row, p in enumerate(params) if 0 < p.top_k < scaled.shape[1] or p.top_p < 1]
    if narrow:
        kept = _narrow(scaled[narrow], [params[row] for row in narrow])
        scaled = kept if len(narrow) == len(params) else scaled.index_copy(0, _index(narrow, logits), kept)
    # Inverse of the cumulated distribution, in float64: the smallest probabilities count.
    cumulated = scaled.softmax(-1).double().cumsum_(-1)
    uniform = torch.tensor([_uniform(state) for state in states], dtype=torch.float64, device=logits.device)
    point = uniform[:, None] * cumulated[:, -1:]
    drawn: list[int] = torch.searchsorted(cumulated, point, right=True)[:, 0].tolist()
    return drawn


def _narrow(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask all but the top_k largest, then but the smallest set of mass top_p. Ties with the last stay."""
    vocab_size = scaled.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    wanted = max((k for k in top_k if k < vocab_size), default=0)
    size = min(vocab_size, max(wanted, _PREFIX))
    top_p = _column([p.top_p for p in params], scaled).double()
    largest = scaled.topk(size, dim=-1).values
    if wanted:
        last = largest.gather(1, _index([min(k, size) - 1 for k in top_k], scaled)[:, None])
        limit = last.masked_fill(_index(top_k, scaled)[:, None] == vocab_size, -math.inf)
        scaled = scaled.masked_fill(scaled < limit, -math.inf)
        largest = largest.masked_fill(largest < limit, -math.inf)
    if not any(p.top_p < 1 for p in params):
        return scaled
    total = scaled.double().logsumexp(-1, keepdim=True)
    mass = (largest.double() - total).exp().cumsum(-1)
    if size < vocab_size and bool(((mass[:, -1:] < top_p) & (top_p < 1)).any()):
        largest = scaled.sort(-1, descending=True).values
        mass = (largest.double() - total).exp().cumsum(-1)
    # The first place where the mass reaches top_p is the last that stays.
    place = (mass < top_p).sum(-1, keepdim=True).clamp(max=largest.shape[1] - 1)
    limit = largest.gather(1, place).masked_fill(top_p >= 1, -math.inf)
    return scaled.masked_fill(scaled < limit, -math.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _uniform(state: SamplingState) -> float:
    """A number in [0, 1) with 52 bits, fixed by the seed and by how many tokens the sequence has."""
    key = f"{state.seed}:{len(state.output_token_ids)}".encode()
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 12) / 2.0**52


@dataclass(frozen=True, slots=True)
class _Row:
    """Log-probabilities of one row: all of them, and the most likely ones."""

    values: Tensor
    top_ids: list[int]
    top_logprobs: list[float]

    def of(self, token_id: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, float(self.values[token_id]), self.top_ids, self.top_logprobs)


def _logprobs(logits: Tensor, states: Sequence[SamplingState]) -> list[_Row | None]:
    rows: list[_Row | None] = [None] * len(states)
    asked = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if not asked:
        return rows
    values = (logits[asked] if len(asked) < len(states) else logits).log_softmax(-1)
    counts = [states[row].params.logprobs or 0 for row in asked]
    ids, tops = top_logprobs(values, max(counts))
    for place, row in enumerate(asked):
        count = counts[place]
        rows[row] = _Row(values[place], ids[place][:count], tops[place][:count])
    return rows


def top_logprobs(values: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """The ``count`` largest of each row of [N, vocab]: their ids and values, largest first."""
    top = values.topk(min(count, values.shape[1]), dim=-1)
    return top.indices.tolist(), top.values.tolist()


def score_tokens(logits: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens, with the ``count`` most likely ones. logits: [N, vocab] fp32."""
    values = logits.log_softmax(-1)
    own: list[float] = values.gather(1, _index(token_ids, logits)[:, None])[:, 0].tolist()
    ids, tops = top_logprobs(values, count)
    return [TokenLogprobs(*row) for row in zip(token_ids, own, ids, tops, strict=True)]

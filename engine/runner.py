"""Runs the steps that the scheduler plans: integers in, tokens out.

A step is computed by the thread that waits for it. On a CPU a thread of its own gains nothing: planning is
a few percent of a step, and both would take turns at the interpreter's lock after every operation.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.paged import PagedSequence
from .plan import PENDING, SampledOutput, ScheduledSequence, StepPlan
from .records import TokenLogprobs
from .sampler import Sampler, SamplingState, score_tokens
from .step_model import StepModel

_LOGITS_BYTES = 32 << 20  # one piece of fp32 logits; sampling holds about three such tensors
_NOT_FINITE = "the model's output is not finite (NaN or infinity) for this request"


@dataclass(frozen=True, slots=True)
class _Work:
    """One scheduled sequence and where it stands in the step: rows [first, first + count)."""

    plan: ScheduledSequence
    state: SamplingState
    first: int

    @property
    def last(self) -> int:
        return self.first + len(self.plan.token_ids) - 1


class _Handle:
    """A step that is computed when somebody asks for its result, after those before it."""

    def __init__(self, runner: "Runner", plan: StepPlan) -> None:
        self._runner = runner
        self.plan = plan
        self.outputs: list[SampledOutput] | None = None

    def result(self) -> list[SampledOutput]:
        """Compute up to this step. Raises what goes wrong; the runner is then not to be used any more."""
        self._runner.catch_up(self)
        assert self.outputs is not None
        return self.outputs


class Runner:
    """An executor over a step model.

    ``seed``: where requests without a seed draw theirs from, in the order of their arrival.
    """

    def __init__(self, model: StepModel, eos_token_ids: Sequence[int], seed: int = 0) -> None:
        self._model = model
        self._logit_rows = min(model.logit_rows, max(1, _LOGITS_BYTES // (4 * model.vocab_size)))
        self._sampler = Sampler(eos_token_ids)
        self._states: dict[int, SamplingState] = {}
        self._broken: set[int] = set()  # sequences that met a NaN, until the engine has ended them
        self._seeds = random.Random(seed)
        self._queue: deque[_Handle] = deque()

    @property
    def num_sequences(self) -> int:
        """Sequences whose sampling state is kept."""
        return len(self._states)

    def execute(self, plan: StepPlan) -> _Handle:
        """Queue a step. What goes wrong in it is raised by its handle's ``result``."""
        handle = _Handle(self, plan)
        self._queue.append(handle)
        return handle

    def catch_up(self, handle: _Handle) -> None:
        """Compute queued steps in their order, until ``handle`` has its outputs."""
        while handle.outputs is None:
            first = self._queue.popleft()
            first.outputs = self._run(first.plan)

    def _run(self, plan: StepPlan) -> list[SampledOutput]:
        for seq_id in plan.finished:
            self._states.pop(seq_id, None)
            self._broken.discard(seq_id)
        for new in plan.new:
            seed = new.params.seed if new.params.seed is not None else self._seeds.getrandbits(63)
            self._states[new.seq_id] = SamplingState(new.params, new.prompt_token_ids, seed)
        if not plan.scheduled:
            return []
        work: list[_Work] = []
        first = 0
        for scheduled in plan.scheduled:
            if scheduled.seq_id in self._broken:
                continue  # planned before its end was known
            state = self._states[scheduled.seq_id]
            state.truncate(scheduled.output_index)
            work.append(_Work(scheduled, state, first))
            first += len(scheduled.token_ids)
        found = self._compute(work) if work else {}
        return [
            SampledOutput(scheduled.seq_id, error=_NOT_FINITE)
            if scheduled.seq_id in self._broken
            else found[scheduled.seq_id]
            for scheduled in plan.scheduled
        ]

    def _compute(self, work: Sequence[_Work]) -> dict[int, SampledOutput]:
        """What the step finds for each sequence; nothing of use for those that break in it."""
        self._forward(work)
        self._find_broken(work)
        scores = {
            w.plan.seq_id: self._score_prompt(w)
            for w in work
            if w.plan.prompt_logprob_targets and w.plan.seq_id not in self._broken
        }
        found = self._sample([w for w in work if w.plan.samples and w.plan.seq_id not in self._broken])
        for w in work:
            seq_id = w.plan.seq_id
            found.setdefault(seq_id, SampledOutput(seq_id))
            if seq_id in scores:
                found[seq_id] = replace(found[seq_id], prompt_logprobs=scores[seq_id])
        return found

    def _forward(self, work: Sequence[_Work]) -> None:
        """Compute all the step's tokens; their K and V are in the cache then."""
        token_ids: list[int] = []
        for w in work:
            token_ids += w.plan.token_ids
            if token_ids[-1] == PENDING:
                token_ids[-1] = w.state.output_token_ids[-1]
        groups = [
            [
                PagedSequence(w.first, len(w.plan.token_ids), w.plan.start, table)
                for w, table in zip(work, tables, strict=True)
            ]
            for tables in zip(*(w.plan.block_tables for w in work), strict=True)
        ]
        self._model.forward(token_ids, groups)

    def _find_broken(self, work: Sequence[_Work]) -> None:
        """Note the sequences with a NaN or an infinity, and erase what they have just written to the cache.

        Without this, one sequence's overflow could spread. A bad K or V always shows in the hidden state,
        because each token attends to itself.
        """
        finite = self._model.finite()
        if all(finite):
            return
        for w in work:
            if not all(finite[w.first : w.last + 1]):
                self._broken.add(w.plan.seq_id)
                self._model.erase(w.first, w.last + 1)

    def _sample(self, work: Sequence[_Work]) -> dict[int, SampledOutput]:
        """One token for each of ``work``, booked in its state."""
        outputs: dict[int, SampledOutput] = {}
        for begin in range(0, len(work), self._logit_rows):
            piece = work[begin : begin + self._logit_rows]
            logits = self._model.logits([w.last for w in piece])
            sampled = self._sampler.sample(logits, [w.state for w in piece])
            for w, row in zip(piece, sampled, strict=True):
                seq_id = w.plan.seq_id
                if not row.finite:
                    self._broken.add(seq_id)
                    continue
                w.state.append(row.token_id)
                logprobs = () if row.logprobs is None else (row.logprobs,)
                outputs[seq_id] = SampledOutput(seq_id, (row.token_id,), logprobs)
        return outputs

    @torch.inference_mode()
    def _score_prompt(self, work: _Work) -> tuple[TokenLogprobs, ...]:
        targets = work.plan.prompt_logprob_targets
        count = work.state.params.prompt_logprobs or 0
        found: list[TokenLogprobs] = []
        for begin in range(0, len(targets), self._logit_rows):
            piece = targets[begin : begin + self._logit_rows]
            first = work.first + begin
            logits = self._model.logits(range(first, first + len(piece)))
            found += score_tokens(logits.values, piece, count)
        if not all(math.isfinite(score.logprob) for score in found):
            self._broken.add(work.plan.seq_id)
        return tuple(found)

"""Which tokens are computed in the next step: one budget, first come, first served.

There is no prefill and no decode: every sequence's ``num_computed_tokens`` catches up with its tokens, in
the order of arrival. A sequence is admitted with blocks for all it has, so only the last of the running
ones can have more than its newest tokens to compute, and going through them in order serves decodes first.

With lag 1 a step is planned while the one before it runs: its sequences' next tokens are PENDING, and
blocks go back only when the last step that may write them has ended.
"""

import time
from collections import OrderedDict

from .block_manager import BlockManager
from .plan import PENDING, NewSequence, SampledOutput, ScheduledSequence, StepPlan
from .records import FinishReason, SequenceOutput
from .sequence import Sequence


class Scheduler:
    """Plans steps and books what they found: ``schedule`` and ``update``, each in step order."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._step = 0
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._finished: list[int] = []  # the runner is to forget these
        self._detached: list[tuple[int, list[list[int]]]] = []  # (last step that may write, tables)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their first step, or again after a preemption."""
        return len(self._waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; it must fit in the KV cache when alone."""
        assert self.blocks.blocks_for(seq.compute_limit) <= self.blocks.num_blocks
        assert seq.num_target_tokens > 0
        self._sequences[seq.seq_id] = seq
        self._waiting[seq.seq_id] = seq

    def remove(self, seq: Sequence) -> None:
        """End a living sequence. What a step in flight finds for it is thrown away."""
        del self._sequences[seq.seq_id]
        if seq.seq_id in self._waiting:
            del self._waiting[seq.seq_id]
        else:
            self._running.remove(seq)
        if seq.announced:
            self._finished.append(seq.seq_id)
        self._release(seq)

    def schedule(self) -> StepPlan:
        """Plan the next step. Nothing to do (``scheduled`` empty): the plan is not to be executed."""
        scheduled: list[ScheduledSequence] = []
        new: list[NewSequence] = []
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self._running) and budget > 0:
            seq = self._running[index]
            index += 1
            count = min(seq.num_target_tokens - seq.num_computed_tokens, budget)
            if count == 0:
                continue  # its last token is being sampled
            lacking = self.blocks.lacking(seq, seq.num_computed_tokens + count)
            if lacking:
                if not self._make_room(seq, lacking):
                    continue
                self.blocks.grow(seq, lacking)
            scheduled.append(self._plan(seq, count))
            budget -= count
        self._admit(budget, scheduled, new)
        if not scheduled:
            return StepPlan(self._step, ())
        plan = StepPlan(self._step, tuple(scheduled), tuple(new), tuple(self._finished))
        self._step += 1
        self._finished.clear()
        return plan

    def _make_room(self, seq: Sequence, num_blocks: int) -> bool:
        """Preempt, latest arrival first, until ``num_blocks`` are free. False: ``seq`` must wait a step."""
        while self.blocks.num_free < num_blocks:
            coming = sum(len(tables[0]) for _, tables in self._detached if tables)
            if self.blocks.num_free + coming >= num_blocks:
                return False
            victim = self._running.pop()
            self._release(victim)
            self._waiting[victim.seq_id] = victim
            self._waiting.move_to_end(victim.seq_id, last=False)
            self.num_preemptions += 1
            if victim is seq:
                return False
        return True

    def _admit(self, budget: int, scheduled: list[ScheduledSequence], new: list[NewSequence]) -> None:
        """Let waiting sequences run, from the queue's front, as far as budget and blocks go."""
        now = time.monotonic()
        while self._waiting and budget > 0 and len(self._running) < self.max_num_seqs:
            seq = next(iter(self._waiting.values()))
            # A block per running sequence stays free: admitting a sequence only to preempt it soon is waste,
            # and one that just gave way must not take back what it gave.
            if seq.in_flight or not self.blocks.admit(seq, reserve=len(self._running)):
                return
            del self._waiting[seq.seq_id]
            self._running.append(seq)
            if seq.prompt_logprobs:
                seq.prompt_logprobs.clear()  # preempted halfway: the prompt is computed from its start again
            if seq.queued_seconds is None:
                seq.queued_seconds = now - seq.added_at
                seq.num_cached_tokens = seq.num_computed_tokens
                seq.announced = True
                self.num_prompt_tokens += seq.num_prompt_tokens
                request = seq.request
                new.append(NewSequence(seq.seq_id, tuple(request.prompt_token_ids), request.params))
            count = min(seq.num_target_tokens - seq.num_computed_tokens, budget)
            scheduled.append(self._plan(seq, count))
            budget -= count

    def _plan(self, seq: Sequence, count: int) -> ScheduledSequence:
        """The next ``count`` tokens of ``seq``, booked as computed."""
        start = seq.num_computed_tokens
        end = start + count
        samples = end == seq.num_tokens
        targets: tuple[int, ...] = ()
        if seq.prompt_logprobs is not None:
            targets = tuple(seq.token_ids[start + 1 : min(end + 1, seq.num_prompt_tokens)])
        work = ScheduledSequence(
            seq.seq_id,
            tuple(seq.token_ids[start:end]),
            start,
            samples,
            seq.num_output_tokens,
            seq.freeze_tables(self.blocks.blocks_for(end)),
            targets,
        )
        seq.num_computed_tokens = end
        seq.in_flight += 1
        seq.last_step = self._step
        if samples:
            seq.token_ids.append(PENDING)
        return work

    def update(self, plan: StepPlan, outputs: list[SampledOutput]) -> list[SequenceOutput]:
        """Book what a step found; returns what clients are to be told, in the plan's order."""
        results: list[SequenceOutput] = []
        for work, output in zip(plan.scheduled, outputs, strict=True):
            assert work.seq_id == output.seq_id
            seq = self._sequences.get(work.seq_id)
            if seq is None:
                continue  # ended while this step was in flight
            seq.in_flight -= 1
            if seq.num_discards:
                seq.num_discards -= 1
                continue
            result = self._book(seq, work, output)
            if result is not None:
                results.append(result)
        if self._detached:
            for step, tables in self._detached:
                if step <= plan.step:
                    self.blocks.free(tables)
            self._detached = [entry for entry in self._detached if entry[0] > plan.step]
        return results

    def _book(self, seq: Sequence, work: ScheduledSequence, output: SampledOutput) -> SequenceOutput | None:
        """What one step found for one living sequence."""
        tokens: list[int] = []
        reason: FinishReason | None = None
        stop_id: int | None = None
        end = work.start + len(work.token_ids)
        if output.error is not None:
            reason = "error"
            self.blocks.forget(seq)
        else:
            if work.samples:
                tokens, reason, stop_id = seq.accept(end, output.token_ids)
            elif end == seq.compute_limit:
                reason = "length"  # max_tokens is 0: only the prompt was wanted
            self.blocks.commit(seq, min(end, seq.num_computed_tokens))  # 0 if it was preempted meanwhile
            if seq.prompt_logprobs is not None:
                seq.prompt_logprobs.extend(output.prompt_logprobs)
        if reason is None and not tokens:
            return None
        result = SequenceOutput(
            seq.request.request_id,
            tokens,
            finish_reason=reason,
            stop_token_id=stop_id,
            error=output.error,
            num_cached_tokens=seq.num_cached_tokens,
            queued_seconds=seq.queued_seconds or 0.0,
        )
        seq.queued_seconds = 0.0
        if seq.request.params.logprobs is not None:
            result.logprobs = list(output.logprobs[: len(tokens)])
        if seq.prompt_logprobs is not None and output.error is None:
            assert len(seq.prompt_logprobs) == seq.num_prompt_tokens - 1
            result.prompt_logprobs = [None, *seq.prompt_logprobs]
            seq.prompt_logprobs = None
        self.num_generation_tokens += len(tokens)
        if reason is not None:
            self.remove(seq)
        return result

    def _release(self, seq: Sequence) -> None:
        """Take the blocks from ``seq``; they go back now, or when the last step that may write them ends."""
        writes = seq.in_flight > 0
        tables = seq.detach_tables()
        if writes:
            self._detached.append((seq.last_step, tables))
        else:
            self.blocks.free(tables)

    def check(self) -> None:
        """Assert every invariant of the queues and of the block manager."""
        running = [seq.seq_id for seq in self._running]
        waiting = list(self._waiting)
        order = running + waiting
        assert order == sorted(order), "sequences run and wait in the order of arrival"
        assert order == sorted(self._sequences)
        assert len(running) <= self.max_num_seqs
        assert not set(self._finished) & set(order)
        for seq in self._sequences.values():
            assert bool(seq.block_tables) == (seq.seq_id not in self._waiting)
            assert 0 <= seq.num_computed_tokens <= seq.num_target_tokens
            assert 0 <= seq.num_discards <= seq.in_flight
            assert seq.num_output_tokens <= seq.max_output_tokens
            known = len(seq.token_ids)
            while seq.token_ids[known - 1] == PENDING:
                known -= 1
            assert PENDING not in seq.token_ids[:known]
            assert seq.num_tokens - known <= seq.in_flight - seq.num_discards, (
                "a PENDING token without a step that samples it"
            )
        self.blocks.check(self._sequences.values(), (tables for _, tables in self._detached))

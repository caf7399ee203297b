"""What the scheduler tells the runner: frozen records of integers."""

from dataclasses import dataclass
from typing import Protocol

from .records import SamplingParams, TokenLogprobs

PENDING = -1  # stands for the token that the step before this one is still sampling (lag 1)


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the runner has not seen. It keeps it (penalties, seeds) until it is in ``finished``."""

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The work of one sequence in one step: compute ``token_ids`` at positions ``start``, ``start`` + 1...

    ``token_ids[-1]`` may be PENDING: the runner puts in the token it sampled last for this sequence.
    ``samples``: after the last of them one token is sampled (the chunk reaches the sequence's end).
    ``output_index``: how many output tokens the sequence has before that sample (counts PENDING ones).
    ``block_tables``: per KV group, the ids of the blocks that hold tokens [0, start + len(token_ids)).
    ``prompt_logprob_targets``: tokens whose log-probabilities the positions start.. predict; else empty.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    samples: bool
    output_index: int
    block_tables: tuple[tuple[int, ...], ...]
    prompt_logprob_targets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``scheduled`` is in a deterministic order; ``finished`` are ids the runner may forget."""

    step: int
    scheduled: tuple[ScheduledSequence, ...]
    new: tuple[NewSequence, ...] = ()
    finished: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(s.token_ids) for s in self.scheduled)


@dataclass(frozen=True, slots=True)
class SampledOutput:
    """What the runner found for one scheduled sequence.

    ``token_ids``: accepted tokens (one, or none where ``samples`` was False).
    ``prompt_logprobs``: one per entry of ``prompt_logprob_targets``.
    ``error``: the sequence's logits were not finite; it cannot go on, others can.
    """

    seq_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


class Handle(Protocol):
    """A step that may still be running."""

    def result(self) -> list[SampledOutput]:
        """Wait for the step; one output per entry of ``scheduled``, in its order."""


class Executor(Protocol):
    """Runs steps. Steps end in the order in which they were given."""

    def execute(self, plan: StepPlan) -> Handle:
        """Start one step, after those before it; at most ``lag`` others have not been waited for."""

"""A fake model and executor for the engine's tests: no torch, but a real paged memory.

The "model" folds hashes as attention folds values: the KV entry of a token depends on every token before
it, and a sampled token depends on every KV entry of its context, read back from the paged memory through
the block tables. A block freed too early, a wrong table or a stale cached block therefore changes tokens,
and ``oracle``, which knows nothing of pages, disagrees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.plan import PENDING, NewSequence, SampledOutput, ScheduledSequence, StepPlan
from nybble.engine.records import KVSpec, SamplingParams, SequenceOutput, TokenLogprobs

VOCAB = 48
EOS = (0, 1)
FAULTY_SEED = 13  # a request with this seed meets logits that are not finite now and then
FAULT = "logits are not finite"
START = 7  # the state before any token


def entry(group: int, token: int, position: int, state: int) -> int:
    """What a layer group's KV cache stores for a token that follows ``state``."""
    return hash((group, token, position, state))


def fold(state: int, entries: Sequence[int]) -> int:
    """The state after one more token, from its entry in each group."""
    return hash((state, *entries))


def logprob(state: int, token: int) -> TokenLogprobs:
    """A log-probability that only this context gives."""
    return TokenLogprobs(token, -(hash((state, token)) % 100_000) / 1000, [], [])


def sample(state: int, params: SamplingParams, output_index: int) -> int | None:
    """The token after ``state``; None: an error. Masks stop ids below min_tokens as the real sampler does."""
    if params.seed == FAULTY_SEED and state % 11 == 0:
        return None
    masked = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    tries = 0
    while True:
        token = hash((state, params.seed or 0, output_index, tries)) % VOCAB
        if output_index >= params.min_tokens or token not in masked:
            return token
        tries += 1


def oracle(prompt: list[int], params: SamplingParams, max_model_len: int, groups: int = 1) -> SequenceOutput:
    """What the request must give, computed plainly: no pages, no batch, no steps."""
    states = [START]

    def feed(token: int) -> None:
        position, state = len(states) - 1, states[-1]
        states.append(fold(state, [entry(group, token, position, state) for group in range(groups)]))

    for token in prompt:
        feed(token)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    output = SequenceOutput(-1, [])
    if params.logprobs is not None:
        output.logprobs = []
    if params.prompt_logprobs is not None:
        output.prompt_logprobs = [None]
        output.prompt_logprobs += [logprob(states[i], prompt[i]) for i in range(1, len(prompt))]
    limit = min(params.max_tokens, max_model_len - len(prompt))
    while len(output.token_ids) < limit:
        token = sample(states[-1], params, len(output.token_ids))
        if token is None:
            output.finish_reason, output.error = "error", FAULT
            return output
        if token in stops:
            output.finish_reason, output.stop_token_id = "stop", token
            return output
        output.token_ids.append(token)
        if output.logprobs is not None:
            output.logprobs.append(logprob(states[-1], token))
        feed(token)
    output.finish_reason = "length"
    return output


@dataclass
class FakeHandle:
    """A step that runs when somebody waits for it."""

    executor: "FakeExecutor"
    plan: StepPlan

    def result(self) -> list[SampledOutput]:
        return self.executor.finish(self.plan)


@dataclass
class FakeExecutor:
    """Runs plans on a paged memory and asserts the contract of ``StepPlan`` on the way.

    Steps run as late as possible, when their result is asked for. ``burst`` (numbers taken in turn for each
    sequence) makes a sampling step find that many tokens, as speculation would: 0, 1 or more.
    """

    block_size: int
    num_blocks: int
    groups: int = 1
    lag: int = 0
    max_num_batched_tokens: int = 1 << 30
    burst: tuple[int, ...] = ()
    plans: list[StepPlan] = field(default_factory=list)
    living: list[int] = field(default_factory=list)
    known: dict[int, NewSequence] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    flying: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory: list[list[int | None]] = [
            [None] * (self.num_blocks * self.block_size) for _ in range(self.groups)
        ]

    def execute(self, plan: StepPlan) -> FakeHandle:
        assert plan.scheduled, "an empty plan is not to be executed"
        assert plan.step == len(self.plans)
        assert plan.num_tokens <= self.max_num_batched_tokens
        for seq_id in plan.finished:
            self.living.remove(seq_id)
        self.living += [new.seq_id for new in plan.new]
        ids = [work.seq_id for work in plan.scheduled]
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(self.living)
        assert len(set(self.living)) == len(self.living)
        self.flying.append(plan)
        assert len(self.flying) <= self.lag + 1
        self._check_hazards(plan)
        self.plans.append(plan)
        return FakeHandle(self, plan)

    def _check_hazards(self, plan: StepPlan) -> None:
        """A block that a step in flight (or this one) writes is in nobody else's table."""
        for writer in (work for flying in self.flying for work in flying.scheduled):
            first = writer.start // self.block_size
            written = [set(table[first:]) for table in writer.block_tables]
            for work in plan.scheduled:
                if work.seq_id != writer.seq_id:
                    for blocks, table in zip(written, work.block_tables, strict=True):
                        assert not blocks & set(table), "a block in writing is shared"

    def finish(self, plan: StepPlan) -> list[SampledOutput]:
        assert self.flying.pop(0) is plan, "steps end in order"
        for seq_id in plan.finished:
            del self.known[seq_id]
        for new in plan.new:
            self.known[new.seq_id] = new
            self.outputs[new.seq_id] = []
        return [self._run(work) for work in plan.scheduled]

    def _run(self, work: ScheduledSequence) -> SampledOutput:
        params = self.known[work.seq_id].params
        # After an error a step that stood on the missing token may follow; its output is void.
        last = (self.outputs[work.seq_id] or [EOS[0]])[-1]
        end = work.start + len(work.token_ids)
        assert len(work.token_ids) > 0
        assert len(work.block_tables) == self.groups
        for table in work.block_tables:
            assert len(table) == -(-end // self.block_size)
        assert PENDING not in work.token_ids[:-1]
        state, states = START, []
        for position in range(work.start):
            state = fold(state, [self._load(work, group, position) for group in range(self.groups)])
        for position, token in enumerate(work.token_ids, work.start):
            token = last if token == PENDING else token
            entries = [entry(group, token, position, state) for group in range(self.groups)]
            for group, value in enumerate(entries):
                self.memory[group][self._slot(work, group, position)] = value
            state = fold(state, entries)
            states.append(state)
        found = tuple(map(logprob, states, work.prompt_logprob_targets))
        if not work.samples:
            return SampledOutput(work.seq_id, prompt_logprobs=found)
        return self._sample(work, params, state, found)

    def _sample(
        self, work: ScheduledSequence, params: SamplingParams, state: int, found: tuple[TokenLogprobs, ...]
    ) -> SampledOutput:
        outputs = self.outputs[work.seq_id]
        count = 1
        if self.burst:
            turn = self.turns.get(work.seq_id, 0)
            self.turns[work.seq_id] = turn + 1
            count = self.burst[turn % len(self.burst)]
            del outputs[work.output_index :]
        assert self.burst or len(outputs) == work.output_index or params.seed == FAULTY_SEED
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for step in range(count):
            token = sample(state, params, work.output_index + step)
            if token is None:
                return SampledOutput(work.seq_id, error=FAULT)
            tokens.append(token)
            logprobs.append(logprob(state, token))
            position = work.start + len(work.token_ids) + step
            state = fold(state, [entry(group, token, position, state) for group in range(self.groups)])
        outputs += tokens
        return SampledOutput(work.seq_id, tuple(tokens), tuple(logprobs), found)

    def _slot(self, work: ScheduledSequence, group: int, position: int) -> int:
        block = work.block_tables[group][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def _load(self, work: ScheduledSequence, group: int, position: int) -> int:
        value = self.memory[group][self._slot(work, group, position)]
        assert value is not None, "a KV entry is read that nobody wrote"
        return value


def kv_spec(layer: int = 0, window: int | None = None) -> KVSpec:
    """Any spec: the fake memory has its own entries."""
    return KVSpec((layer,), 1, 8, window, "float32")


def make_engine(
    *,
    num_blocks: int = 64,
    max_model_len: int = 64,
    groups: int = 1,
    burst: tuple[int, ...] = (),
    **options: object,
) -> tuple[Engine, FakeExecutor]:
    """An engine on a fake executor. ``options``: fields of EngineConfig."""
    config = EngineConfig("fake", **{"block_size": 8, "max_num_seqs": 8, **options})  # type: ignore[arg-type]
    executor = FakeExecutor(
        config.block_size, num_blocks, groups, config.lag, config.max_num_batched_tokens, burst
    )
    specs = [kv_spec(group) for group in range(groups)]
    return Engine(config, executor, specs, num_blocks, max_model_len, EOS, VOCAB), executor


def essence(output: SequenceOutput) -> tuple[object, ...]:
    """Everything of an output but times, ids and cache hits."""
    return (
        output.token_ids,
        output.logprobs,
        output.prompt_logprobs,
        output.finish_reason,
        output.stop_token_id,
        output.error,
    )

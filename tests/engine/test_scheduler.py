"""Scheduler: what each step computes, who waits, who gives way."""

import pytest
from nybble.engine.block_manager import BlockManager
from nybble.engine.plan import PENDING, SampledOutput, StepPlan
from nybble.engine.records import EngineRequest, SamplingParams, SequenceOutput
from nybble.engine.scheduler import Scheduler
from nybble.engine.sequence import Sequence

from .fakes import kv_spec, logprob

BLOCK = 4


class Driver:
    """A scheduler whose sequences sample 100, 101, 102..."""

    def __init__(
        self, num_blocks: int = 64, budget: int = 64, max_num_seqs: int = 8, caching: bool = False
    ) -> None:
        blocks = BlockManager([kv_spec()], num_blocks, BLOCK, caching)
        self.scheduler = Scheduler(blocks, max_num_seqs, budget)
        self.count = 0

    def add(self, length: int, **params: object) -> Sequence:
        wanted = SamplingParams(**{"max_tokens": 50, **params})  # type: ignore[arg-type]
        prompt = [1000 * self.count + index for index in range(length)]
        seq = Sequence(self.count, EngineRequest(self.count, prompt, wanted), 200, (), 0.0)
        self.count += 1
        self.scheduler.add(seq)
        return seq

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check()
        return plan

    def end(self, plan: StepPlan, **errors: str) -> list[SequenceOutput]:
        outputs = []
        for work in plan.scheduled:
            error = errors.get(f"seq{work.seq_id}")
            tokens = (100 + work.output_index,) if work.samples and error is None else ()
            found = tuple(logprob(0, token) for token in work.prompt_logprob_targets)
            outputs.append(SampledOutput(work.seq_id, tokens, (), found, error))
        results = self.scheduler.update(plan, outputs)
        self.scheduler.check()
        return results

    def step(self) -> tuple[StepPlan, list[SequenceOutput]]:
        plan = self.plan()
        return plan, self.end(plan)

    @property
    def used(self) -> int:
        blocks = self.scheduler.blocks
        return blocks.num_blocks - blocks.num_free


def work(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(w.seq_id, w.start, len(w.token_ids), w.samples) for w in plan.scheduled]


def test_chunks_fill_the_budget_after_decodes() -> None:
    driver = Driver(budget=8)
    driver.add(3)
    assert work(driver.step()[0]) == [(0, 0, 3, True)]
    driver.add(18)
    driver.add(2)
    assert work(driver.step()[0]) == [(0, 3, 1, True), (1, 0, 7, False)]
    assert work(driver.step()[0]) == [(0, 4, 1, True), (1, 7, 7, False)]
    assert work(driver.step()[0]) == [(0, 5, 1, True), (1, 14, 4, True), (2, 0, 2, True)]
    assert work(driver.step()[0]) == [(0, 6, 1, True), (1, 18, 1, True), (2, 2, 1, True)]


def test_plan_says_what_the_runner_needs() -> None:
    driver = Driver(budget=6)
    seq = driver.add(8, max_tokens=2)
    first, outputs = driver.step()
    assert outputs == []
    assert [new.seq_id for new in first.new] == [0]
    assert first.new[0].prompt_token_ids == tuple(seq.request.prompt_token_ids)
    assert first.scheduled[0].token_ids == (0, 1, 2, 3, 4, 5)
    assert len(first.scheduled[0].block_tables[0]) == 2
    second, outputs = driver.step()
    assert [output.token_ids for output in outputs] == [[100]]
    assert second.new == ()
    third, outputs = driver.step()
    assert third.scheduled[0].token_ids == (100,)
    assert third.scheduled[0].output_index == 1
    assert len(third.scheduled[0].block_tables[0]) == 3
    assert (outputs[0].token_ids, outputs[0].finish_reason) == ([101], "length")
    assert driver.plan().finished == ()  # an empty plan is not executed, so it carries nothing
    driver.add(1)
    assert driver.plan().finished == (0,)


def test_lag_plans_with_pending_tokens_and_no_further_than_the_limit() -> None:
    driver = Driver()
    driver.add(3, max_tokens=3)
    plans = [driver.plan()]
    for _ in range(2):
        plans.append(driver.plan())
        driver.end(plans[-2])
    assert [w.token_ids for plan in plans for w in plan.scheduled] == [(0, 1, 2), (PENDING,), (PENDING,)]
    assert [w.output_index for plan in plans for w in plan.scheduled] == [0, 1, 2]
    assert driver.plan().scheduled == ()  # the third token is the last: nothing to plan while it is sampled
    assert driver.end(plans[-1])[0].finish_reason == "length"
    assert driver.used == 0


def test_blocks_in_flight_are_freed_when_the_step_ends() -> None:
    driver = Driver()
    seq = driver.add(3, stop_token_ids=(101,))
    driver.step()
    first = driver.plan()
    second = driver.plan()
    assert driver.end(first)[0].stop_token_id == 101
    assert driver.used == 2
    assert driver.end(second) == []
    assert driver.used == 0
    seq = driver.add(9)
    plan = driver.plan()
    driver.scheduler.remove(seq)  # an abort
    driver.scheduler.check()
    assert driver.used == 3
    assert driver.end(plan) == []
    assert driver.used == 0


def test_latest_arrived_is_preempted_first_and_goes_on_where_it_was() -> None:
    driver = Driver(num_blocks=8)
    first, _, _ = (driver.add(6, max_tokens=12) for _ in range(3))
    for _ in range(3):
        assert [w.seq_id for w in driver.step()[0].scheduled] == [0, 1, 2]
    plan, _ = driver.step()  # the ninth token of each needs a third block, and two are left
    assert driver.scheduler.num_preemptions == 1
    assert [w.seq_id for w in plan.scheduled] == [0, 1]
    driver.add(2, max_tokens=12)
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (2, 2)
    driver.scheduler.remove(first)
    plan, outputs = driver.step()
    # Everything it has is computed again, and it comes before what arrived after it.
    assert work(plan) == [(1, 9, 1, True), (2, 0, 9, True)]
    assert plan.scheduled[1].token_ids[6:] == (100, 101, 102)
    assert plan.new == ()  # the runner knows it still
    assert outputs[1].token_ids == [103]


def test_preemption_in_flight_keeps_the_token_and_waits_for_the_blocks() -> None:
    driver = Driver(num_blocks=5)
    driver.add(8, max_tokens=12)
    victim = driver.add(1, max_tokens=12)
    flying = driver.plan()
    for _ in range(4):
        following = driver.plan()
        driver.end(flying)
        flying = following
    assert driver.used == 5
    assert driver.plan().scheduled == ()  # 0 needs a block; 1 gives way, but a step still writes its blocks
    assert (driver.scheduler.num_preemptions, driver.used) == (1, 5)
    assert [output.token_ids for output in driver.end(flying)] == [[104], [104]]
    assert driver.used == 3
    assert victim.token_ids[1:] == [100, 101, 102, 103, 104]
    assert work(driver.plan()) == [(0, 12, 1, True)]
    assert driver.used == 4


def test_error_ends_one_sequence() -> None:
    driver = Driver(caching=True)
    bad, _ = driver.add(9), driver.add(9)
    driver.step()
    outputs = driver.end(driver.plan(), seq0="not finite")
    assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [
        (0, "error", "not finite"),
        (1, None, None),
    ]
    assert driver.used == 3
    again = driver.add(1)
    again.token_ids = list(bad.request.prompt_token_ids)  # what it left behind is not read
    again.num_prompt_tokens = 9
    assert driver.scheduler.blocks.admit(again, 0)
    assert again.num_computed_tokens == 0
    driver.scheduler.blocks.free(again.detach_tables())
    driver.scheduler.remove(again)


def test_prompt_logprobs_by_chunks() -> None:
    driver = Driver(budget=4)
    driver.add(6, prompt_logprobs=0, max_tokens=1)
    plan, outputs = driver.step()
    assert plan.scheduled[0].prompt_logprob_targets == (1, 2, 3, 4)
    assert outputs == []
    plan, outputs = driver.step()
    assert plan.scheduled[0].prompt_logprob_targets == (5,)
    found = outputs[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert [entry.token_id for entry in found[1:] if entry is not None] == [1, 2, 3, 4, 5]


def test_prompt_logprobs_begin_again_after_a_preemption() -> None:
    driver = Driver(num_blocks=7, budget=2)
    driver.add(8, max_tokens=12)
    driver.add(12, prompt_logprobs=0, max_tokens=1)
    outputs = [output for _ in range(12) for output in driver.step()[1]]
    assert driver.scheduler.num_preemptions == 0
    while driver.scheduler.num_running + driver.scheduler.num_waiting:
        outputs += driver.step()[1]
    assert driver.scheduler.num_preemptions == 1
    (found,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    assert [entry.token_id for entry in found[1:] if entry is not None] == list(range(1001, 1012))


def test_echo_computes_the_prompt_but_its_last_token() -> None:
    driver = Driver(budget=4)
    driver.add(6, prompt_logprobs=0, max_tokens=0)
    assert work(driver.step()[0]) == [(0, 0, 4, False)]
    plan, outputs = driver.step()
    assert work(plan) == [(0, 4, 1, False)]
    assert (outputs[0].token_ids, outputs[0].finish_reason) == ([], "length")
    assert len(outputs[0].prompt_logprobs or []) == 6
    assert driver.used == 0


def test_max_num_seqs_and_fifo() -> None:
    driver = Driver(max_num_seqs=2)
    for _ in range(4):
        driver.add(2, max_tokens=2)
    order = []
    while driver.scheduler.num_running + driver.scheduler.num_waiting:
        plan, _ = driver.step()
        assert len(plan.scheduled) <= 2
        order += [new.seq_id for new in plan.new]
    assert order == [0, 1, 2, 3]


def test_a_large_prompt_is_not_overtaken() -> None:
    driver = Driver(num_blocks=8)
    driver.add(12, max_tokens=3)
    driver.add(25, max_tokens=2)
    driver.add(1, max_tokens=2)
    order = []
    while driver.scheduler.num_running + driver.scheduler.num_waiting:
        order += [new.seq_id for new in driver.step()[0].new]
    assert order == [0, 1, 2]


@pytest.mark.parametrize("harm", ["order", "pending", "tables", "computed"])
def test_check_finds_harm(harm: str) -> None:
    driver = Driver()
    first, _ = driver.add(3), driver.add(3)
    driver.step()
    if harm == "order":
        driver.scheduler._running.reverse()
    elif harm == "pending":
        first.token_ids[-1] = PENDING
    elif harm == "tables":
        first.block_tables = []
    else:
        first.num_computed_tokens = 9
    with pytest.raises(AssertionError):
        driver.scheduler.check()

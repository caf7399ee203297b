"""The runner by hand-written plans: pages, PENDING tokens, prompt scores, sequences that break."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine import runner as runner_module
from nybble.engine.model.decoder import Decoder
from nybble.engine.plan import PENDING, NewSequence, SampledOutput, ScheduledSequence, StepPlan
from nybble.engine.records import KVSpec, SamplingParams
from nybble.engine.runner import Runner
from nybble.engine.step_model import EagerModel, allocate_kv_cache, kv_cache_dtype
from nybble.kernels.dispatch import Target
from nybble.kernels.paged import PagedSequence
from tiny_models import engine_over, load_decoder, our_logits, tiny_transformer, transformers_logits

BLOCK = 8
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
PROMPT = tuple(range(3, 23))  # two full blocks and a half
BAD = 13  # the token whose embedding is NaN in some tests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    theirs = tiny_transformer(
        "qwen3", head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=1
    )
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture
def decoder(model: tuple[Any, Path]) -> Decoder:
    return load_decoder(model[1])


def eager(decoder: Decoder) -> EagerModel:
    return EagerModel(decoder, decoder.config.kv_specs("float32"), 16, BLOCK)


@pytest.fixture
def runner(decoder: Decoder) -> Runner:
    return Runner(eager(decoder), [])


def work(
    seq_id: int,
    tokens: tuple[int, ...],
    start: int = 0,
    table: tuple[int, ...] = (5, 2, 9, 4),
    **fields: Any,
) -> ScheduledSequence:
    """Both KV groups use the same page numbers, reversed in the second: they must not be mixed up."""
    length = -(-(start + len(tokens)) // BLOCK)
    tables = (table[:length], tuple(15 - page for page in table[:length]))
    defaults = {"samples": True, "output_index": 0}
    return ScheduledSequence(seq_id, tokens, start, block_tables=tables, **{**defaults, **fields})


def step(runner: Runner, *scheduled: ScheduledSequence, **fields: Any) -> list[SampledOutput]:
    return runner.execute(StepPlan(0, scheduled, **fields)).result()


def new(seq_id: int, params: SamplingParams = GREEDY, prompt: tuple[int, ...] = PROMPT) -> NewSequence:
    return NewSequence(seq_id, prompt, params)


def greedy_tokens(decoder: Decoder, prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(our_logits(decoder, torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def test_a_prompt_and_its_next_tokens(decoder: Decoder, runner: Runner) -> None:
    expected = greedy_tokens(decoder, PROMPT, 3)
    assert step(runner, work(1, PROMPT), new=(new(1),)) == [SampledOutput(1, (expected[0],))]
    assert step(runner, work(1, (expected[0],), 20, output_index=1)) == [SampledOutput(1, (expected[1],))]
    assert step(runner, work(1, (PENDING,), 21, output_index=2)) == [SampledOutput(1, (expected[2],))]


def test_a_chunk_that_does_not_reach_the_end_samples_nothing(decoder: Decoder, runner: Runner) -> None:
    expected = greedy_tokens(decoder, PROMPT, 1)
    assert step(runner, work(1, PROMPT[:13], samples=False), new=(new(1),)) == [SampledOutput(1)]
    assert step(runner, work(1, PROMPT[13:], 13)) == [SampledOutput(1, (expected[0],))]


def test_a_step_that_was_thrown_away_is_sampled_again(runner: Runner) -> None:
    """A preempted sequence comes back with fewer outputs than the runner has seen, and from its start."""
    params = SamplingParams(max_tokens=20, temperature=3.0, seed=3, frequency_penalty=2.0)
    first = step(runner, work(1, PROMPT), new=(new(1, params),))[0].token_ids
    second = step(runner, work(1, (PENDING,), 20, output_index=1))[0].token_ids
    third = step(runner, work(1, (PENDING,), 21, output_index=2))[0].token_ids
    assert len({first, second, third}) == 3
    again = work(1, (*PROMPT, *first), table=(1, 0, 3), output_index=1)
    assert step(runner, again)[0].token_ids == second
    assert step(runner, work(1, (PENDING,), 21, (1, 0, 3), output_index=2))[0].token_ids == third


def test_outputs_are_in_the_plans_order(decoder: Decoder, runner: Runner) -> None:
    prompts = {7: PROMPT, 3: PROMPT[:9], 5: (4,)}
    tables = {7: (5, 2, 9), 3: (0, 1), 5: (3,)}
    outputs = step(
        runner,
        *(work(seq_id, prompt, table=tables[seq_id]) for seq_id, prompt in prompts.items()),
        new=tuple(new(seq_id, prompt=prompt) for seq_id, prompt in prompts.items()),
    )
    expected = [(seq_id, tuple(greedy_tokens(decoder, prompt, 1))) for seq_id, prompt in prompts.items()]
    assert [(output.seq_id, output.token_ids) for output in outputs] == expected


@pytest.mark.parametrize("logit_rows", [2, 1000])
def test_prompt_scores_equal_transformers(
    model: tuple[Any, Path], decoder: Decoder, logit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_LOGITS_BYTES", 4 * decoder.config.vocab_size * logit_rows)
    runner = Runner(eager(decoder), [])
    largest = 0
    logits = decoder.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(hidden))
        return logits(hidden)

    monkeypatch.setattr(decoder, "logits", watched)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=3)
    first = work(1, PROMPT[:13], samples=False, prompt_logprob_targets=PROMPT[1:14])
    second = work(1, PROMPT[13:], 13, prompt_logprob_targets=PROMPT[14:])
    scores = [
        *step(runner, first, new=(new(1, params),))[0].prompt_logprobs,
        *step(runner, second)[0].prompt_logprobs,
    ]
    expected = transformers_logits(model[0], torch.tensor(PROMPT)).log_softmax(-1)
    assert [score.token_id for score in scores] == list(PROMPT[1:])
    for row, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[row, PROMPT[row + 1]]), abs=1e-4)
        assert score.top_ids == expected[row].topk(3).indices.tolist()
    assert largest == min(logit_rows, 13)


def test_the_head_sees_only_rows_that_are_asked_for(
    decoder: Decoder, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    step(
        runner,
        work(1, PROMPT),
        work(2, PROMPT[:9], table=(0, 1), samples=False),
        work(3, (4,), table=(3,)),
        new=(new(1), new(2), new(3)),
    )
    assert rows == [2]


def test_logprobs_come_where_they_are_asked_for(decoder: Decoder, runner: Runner) -> None:
    asked = SamplingParams(max_tokens=9, temperature=0.0, logprobs=2)
    outputs = step(runner, work(1, PROMPT), work(2, (4,), table=(3,)), new=(new(1, asked), new(2)))
    expected = our_logits(decoder, torch.tensor(PROMPT))[-1].log_softmax(-1)
    (own,) = outputs[0].logprobs
    assert own.top_ids == expected.topk(2).indices.tolist()
    assert own.logprob == own.top_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-5)
    assert outputs[1].logprobs == ()


def test_finished_sequences_are_forgotten(runner: Runner) -> None:
    step(runner, work(1, PROMPT), work(2, (4,), table=(3,)), new=(new(1), new(2)))
    assert runner.num_sequences == 2
    step(runner, work(2, (PENDING,), 1, (3,), output_index=1), finished=(1,))
    assert runner.num_sequences == 1


def test_steps_run_in_order_and_errors_come_out_of_result(decoder: Decoder, runner: Runner) -> None:
    expected = greedy_tokens(decoder, PROMPT, 2)
    first = runner.execute(StepPlan(0, (work(1, PROMPT),), (new(1),)))
    second = runner.execute(StepPlan(1, (work(1, (PENDING,), 20, output_index=1),)))
    wrong = runner.execute(StepPlan(2, (work(404, PROMPT),)))
    assert second.result()[0].token_ids == (expected[1],)
    assert first.result()[0].token_ids == (expected[0],)
    with pytest.raises(KeyError):
        wrong.result()


def sampled(decoder: Decoder, seed: int, params: SamplingParams) -> list[tuple[int, ...]]:
    runner = Runner(eager(decoder), [], seed)
    ids = range(8)
    outputs = step(
        runner,
        *(work(seq_id, (4,), table=(seq_id,)) for seq_id in ids),
        new=tuple(new(seq_id, params) for seq_id in ids),
    )
    return [output.token_ids for output in outputs]


def test_requests_without_a_seed_draw_one_from_the_engines(decoder: Decoder) -> None:
    unseeded = SamplingParams(max_tokens=9, temperature=5.0)
    first = sampled(decoder, 0, unseeded)
    assert first == sampled(decoder, 0, unseeded)
    assert first != sampled(decoder, 1, unseeded)
    assert len(set(first)) > 1
    seeded = SamplingParams(max_tokens=9, temperature=5.0, seed=5)
    assert len(set(sampled(decoder, 0, seeded))) == 1
    assert sampled(decoder, 0, seeded) == sampled(decoder, 1, seeded)


def broken_decoder(decoder: Decoder) -> Decoder:
    decoder.embed_tokens = decoder.embed_tokens.clone()
    decoder.embed_tokens[BAD] = math.nan
    return decoder


def test_a_sequence_that_breaks_ends_alone(decoder: Decoder) -> None:
    expected = greedy_tokens(decoder, PROMPT[:9], 2)
    runner = Runner(eager(broken_decoder(decoder)), [])
    bad = (4, 5, BAD, 6)
    first = StepPlan(0, (work(1, bad, table=(7,)), work(2, PROMPT[:9], table=(0, 1))), (new(1), new(2)))
    # Planned before anybody knew.
    second = StepPlan(
        1,
        (
            work(1, (PENDING,), 4, (7,), output_index=1),
            work(2, (PENDING,), 9, (0, 1), output_index=1),
        ),
    )
    handles = runner.execute(first), runner.execute(second)
    for handle, token in zip(handles, expected, strict=True):
        broken, whole = handle.result()
        assert broken.error is not None
        assert "not finite" in broken.error
        assert broken.token_ids == ()
        assert whole == SampledOutput(2, (token,))


def test_pages_of_a_broken_sequence_are_clean_for_the_next(decoder: Decoder) -> None:
    expected = greedy_tokens(decoder, (4, 5, 6), 1)
    runner = Runner(eager(broken_decoder(decoder)), [])
    step(runner, work(1, (5, 6, BAD, 7, 8, 9), table=(7,), samples=False), new=(new(1),))
    # Slots 3... of page 7 are not written by the next owner, yet attention multiplies them by zero.
    outputs = step(
        runner,
        work(2, (4, 5, 6), table=(7,)),
        work(3, PROMPT[:9], table=(0, 1)),
        new=(new(2), new(3)),
        finished=(1,),
    )
    assert outputs[0] == SampledOutput(2, tuple(expected))
    assert outputs[1].error is None
    assert step(runner, work(2, (PENDING,), 3, (7,), output_index=1))[0].error is None


@pytest.mark.parametrize("lag", [0, 1])
def test_broken_requests_in_a_crowded_engine(decoder: Decoder, lag: int) -> None:
    prompts = [[3 + n % 9] * (n % 7 + 1) + ([BAD] if n % 3 == 0 else []) + [5, 6] for n in range(24)]
    whole = [prompt for prompt in prompts if BAD not in prompt]
    params = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={BAD: -100.0})
    alone = engine_over(decoder, max_num_seqs=1, lag=0).generate(whole, params)
    engine = engine_over(broken_decoder(decoder), num_blocks=9, lag=lag, max_num_batched_tokens=64)
    outputs = engine.generate(prompts, params)
    assert [output.finish_reason for output in outputs] == [
        "error" if BAD in prompt else "length" for prompt in prompts
    ]
    assert [output.token_ids for output in outputs if output.error is None] == [
        output.token_ids for output in alone
    ]
    engine.check()


def test_non_finite_logits_of_a_finite_state_are_an_error_too(decoder: Decoder, runner: Runner) -> None:
    original = decoder.logits

    def overflowing(hidden: torch.Tensor) -> torch.Tensor:
        logits = original(hidden).clone()
        logits[0, 3] = math.inf
        return logits

    decoder.logits = overflowing  # type: ignore[method-assign]
    outputs = step(runner, work(1, PROMPT), work(2, (4,), table=(3,)), new=(new(1), new(2)))
    assert outputs[0].error is not None
    assert outputs[1].error is None


def test_cache_layout_and_bytes(decoder: Decoder) -> None:
    specs = decoder.config.kv_specs("float32")
    assert len(specs) == 2
    assert eager(decoder).kv_bytes == sum(spec.bytes_per_token for spec in specs) * 16 * BLOCK
    cache = allocate_kv_cache(KVSpec((0, 3), 2, 16, None, "float16"), 4, BLOCK)
    assert cache.shape == (2, 4, BLOCK, 2, 2, 16)
    assert cache.dtype == torch.float16
    assert not cache.any()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_the_cache_takes_memory_only_when_written() -> None:
    gc.collect()
    before = resident_bytes()
    cache = allocate_kv_cache(KVSpec((0,), 8, 128, None, "float32"), 4096, 16)  # 512 MiB
    assert cache.numel() * 4 == 1 << 29
    assert resident_bytes() - before < 16 << 20
    cache[:, 100] = 1.0
    assert resident_bytes() - before < 32 << 20


def test_dtype_of_the_cache() -> None:
    assert kv_cache_dtype(Target("cpu", torch.float16)) == "float32"
    assert kv_cache_dtype(Target("cuda", torch.bfloat16)) == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_as_on_a_gpu(decoder: Decoder, dtype: torch.dtype) -> None:
    """Every op of the device-neutral path in half precision, cache included; here on the CPU."""
    config, half = decoder.config, {}
    for name, weight in collect_weights(decoder).items():
        half[name] = weight.to(dtype) if isinstance(weight, torch.Tensor) else HalfLinear(weight, dtype)
    small = Decoder(config, half, decoder.ops, dtype)  # type: ignore[arg-type]
    model = EagerModel(small, config.kv_specs(str(dtype).removeprefix("torch.")), 16, BLOCK)
    with torch.inference_mode():
        chunks = [(PROMPT[:11], 0, (5, 2)), (PROMPT[11:], 11, (5, 2, 9))]
        rows = []
        for tokens, start, table in chunks:
            model.forward(tokens, [[PagedSequence(0, len(tokens), start, table)]] * 2)
            rows.append(model.logits(range(len(tokens))).values)
    logits = torch.cat(rows)
    expected = our_logits(decoder, torch.tensor(PROMPT))
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


class HalfLinear:
    """A linear whose input and output are half precision."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        self._linear, self._dtype = linear, dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == self._dtype
        out: torch.Tensor = self._linear(x.float())
        return out.to(self._dtype)


def collect_weights(decoder: Decoder) -> dict[str, Any]:
    """A decoder's weights under their slots' names again."""
    heads = decoder.config.num_heads
    weights: dict[str, Any] = {
        "model.embed_tokens": decoder.embed_tokens,
        "model.norm": decoder.norm,
        "lm_head": decoder.lm_head,
    }
    for layer in decoder.layers:
        prefix = f"model.layers.{layer.index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[prefix + name] = getattr(layer, name)
        for name in ("qkv_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}"] = getattr(layer, name)
        for name in ("gate_up_proj", "down_proj"):
            weights[f"{prefix}mlp.{name}"] = getattr(layer, name)
        assert layer.qk_norm is not None
        weights[prefix + "self_attn.q_norm"] = layer.qk_norm[0]
        weights[prefix + "self_attn.k_norm"] = layer.qk_norm[heads]
    return weights


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_runner_on_cuda(model: tuple[Any, Path], dtype: torch.dtype) -> None:
    decoder = load_decoder(model[1], str(dtype).removeprefix("torch."), "cuda")
    expected = greedy_tokens(load_decoder(model[1]), PROMPT, 12)
    engine = engine_over(decoder, max_num_seqs=4, max_num_batched_tokens=9)
    outputs = engine.generate([list(PROMPT)] * 4, SamplingParams(max_tokens=12, temperature=0.0))
    same = [output.token_ids == expected for output in outputs]
    assert all(same) or dtype != torch.float32
    assert all(output.finish_reason == "length" for output in outputs)

"""The sampler against a slow numpy reading of the same rules, and its randomness against chi-square."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nybble.engine.records import SamplingParams
from nybble.engine.sampler import Logits, Sampled, Sampler, SamplingState, score_tokens

VOCAB = 50
EOS = (0, 7)


def state(
    prompt: tuple[int, ...] = (1, 2), outputs: tuple[int, ...] = (), seed: int = 1, **fields: Any
) -> Any:
    params = SamplingParams(**{"max_tokens": 100, **fields})
    return SamplingState(params, prompt, params.seed if params.seed is not None else seed, list(outputs))


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sampled_from(table: torch.Tensor, states: list[SamplingState]) -> list[Sampled]:
    return Sampler(EOS).sample(Logits.of(table), states)


def processed(row: Any, of: SamplingState) -> Any:
    """Bias, min_tokens and penalties, token by token, in float64."""
    params, out = of.params, row.astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        if token < len(out):
            out[token] += bias
    counts = Counter(of.output_token_ids)
    for token in range(len(out)):
        if token in counts or token in of.prompt_token_ids:
            penalty = params.repetition_penalty
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        if token in counts:
            out[token] -= params.frequency_penalty * counts[token] + params.presence_penalty
    if len(of.output_token_ids) < params.min_tokens:
        for token in (*EOS, *params.stop_token_ids):
            if token < len(out):
                out[token] = -math.inf
    return out


def distribution(row: Any, of: SamplingState) -> Any:
    """The probabilities that a token is to be drawn with, in float64."""
    params, scaled = of.params, processed(row, of) / of.params.temperature

    def softmax() -> Any:
        exponents = np.exp(scaled - scaled.max())
        return exponents / exponents.sum()

    chances = softmax()
    scaled = np.where(chances < params.min_p * chances.max() * (1 - 1e-9), -math.inf, scaled)
    if 0 < params.top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-params.top_k], -math.inf, scaled)
    if params.top_p < 1:
        chances = softmax()
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]
        last = scaled[order][before < params.top_p][-1]
        scaled = np.where(scaled < last, -math.inf, scaled)
    return softmax()


def drawn_tokens(row: torch.Tensor, of: SamplingState, draws: int) -> Any:
    """[vocab] how often each token comes in ``draws`` draws with seeds 0, 1..."""
    states = [
        SamplingState(of.params, of.prompt_token_ids, s, list(of.output_token_ids)) for s in range(draws)
    ]
    found = sampled_from(row.expand(draws, -1).clone(), states)
    return np.bincount([sample.token_id for sample in found], minlength=len(row))


def chi_square(counts: Any, chances: Any) -> None:
    """Fails where the counts would come with a probability below about one in a million."""
    assert counts[chances == 0].sum() == 0, "a token was drawn that must not be"
    kept = chances > 0
    expected = counts.sum() * chances[kept]
    rare = expected < 5
    observed = np.append(counts[kept][~rare], counts[kept][rare].sum())
    wanted = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(len(wanted) - 1, 1)
    # Wilson-Hilferty: the cube root of chi-square over its freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.8, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k beyond": {"top_k": 500},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "top_p almost 1": {"top_p": 0.9999999},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 8, "top_p": 0.6},
    "all filters": {"top_k": 12, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "negative frequency": {"frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below 1": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": {3: 4.0, 11: -100.0, 999: 5.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (12, 999)},
    "min_tokens reached": {"min_tokens": 4, "stop_token_ids": (12,)},
    "everything": {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 30,
        "min_p": 0.001,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.2,
        "logit_bias": {5: 2.0},
        "min_tokens": 9,
    },
}


@pytest.mark.parametrize("name", RULES)
def test_tokens_come_with_their_probabilities(name: str) -> None:
    row = logits(1)[0]
    of = state(prompt=(1, 2, 2, 9), outputs=(4, 4, 9, 30), **RULES[name])
    chi_square(drawn_tokens(row, of, 4000), distribution(row.numpy(), of))


def test_rows_of_different_rules_do_not_touch_each_other() -> None:
    rules = [*RULES.values(), {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.9}]
    table = logits(len(rules))
    states = [state(outputs=(4, 4, 9, 30), seed=n, **fields) for n, fields in enumerate(rules)]
    together = sampled_from(table, states)
    for row, own in enumerate(states):
        assert sampled_from(table[row : row + 1], [own])[0] == together[row]


@pytest.mark.parametrize("name", RULES)
def test_greedy_is_the_argmax_of_what_the_rules_leave(name: str) -> None:
    table = logits(40, seed=3)
    states = [state(outputs=(4, 4, 9, 30), **{**RULES[name], "temperature": 0.0}) for _ in range(40)]
    for row, found in enumerate(sampled_from(table, states)):
        assert found.token_id == processed(table[row].numpy(), states[row]).argmax()


def test_the_lowest_id_wins_a_tie() -> None:
    table = torch.zeros(1, VOCAB)
    table[0, [13, 8, 44]] = 2.0
    assert sampled_from(table, [state(temperature=0.0)])[0].token_id == 8


def test_plain_rows_are_taken_as_they_were_found() -> None:
    """No look at the values: they are not even there."""
    found = Logits(None, [True, False, True], [31, 5, 8])  # type: ignore[arg-type]
    of = [{}, {"seed": 3, "top_k": 5}, {"min_tokens": 2, "outputs": (4, 4)}]
    tokens = Sampler(EOS).sample(found, [state(temperature=0.0, **fields) for fields in of])
    assert tokens == [Sampled(31, None, True), Sampled(5, None, False), Sampled(8, None, True)]
    ruled = ("logprobs", 0), ("logit_bias", {3: 1.0}), ("min_tokens", 2), ("presence_penalty", 0.1)
    assert not any(state(temperature=0.0, **dict([field])).is_plain for field in ruled)
    assert not state().is_plain


def test_ties_at_the_edge_of_a_filter_all_stay() -> None:
    row = torch.full((VOCAB,), -20.0)
    row[[3, 5, 8, 13]] = 1.0
    for fields in ({"top_k": 2}, {"top_p": 0.3}):
        assert set(np.flatnonzero(drawn_tokens(row, state(**fields), 400))) == {3, 5, 8, 13}


@pytest.mark.parametrize("temperature", [1e-300, 1e-20, 1e-5])
def test_a_vanishing_temperature_is_the_argmax(temperature: float) -> None:
    table = logits(20, seed=4) * 1e4
    states = [state(temperature=temperature, seed=n) for n in range(20)]
    found = [sample.token_id for sample in sampled_from(table, states)]
    assert found == table.argmax(-1).tolist()


def test_top_p_over_a_flat_distribution_looks_beyond_the_sorted_prefix() -> None:
    row = torch.linspace(0, 1e-3, 3000)
    counts = drawn_tokens(row, state(top_p=0.5), 3000)
    chances = distribution(row.numpy(), state(top_p=0.5))
    assert 1400 < (chances > 0).sum() < 1600
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(chances))
    assert (counts > 0).sum() > 1024


def test_extreme_penalties_stay_finite() -> None:
    of = state(outputs=(3,), repetition_penalty=1e-38, frequency_penalty=-2.0)
    assert drawn_tokens(logits(1)[0], of, 10).sum() == 10


def test_a_seed_gives_the_same_tokens_in_any_batch_and_another_seed_others() -> None:
    table = logits(64, seed=5)

    def run(order: list[int], seed_base: int) -> dict[int, int]:
        states = [state(seed=seed_base + n) for n in order]
        found = sampled_from(table[order], states)
        return {n: sample.token_id for n, sample in zip(order, found, strict=True)}

    first = run(list(range(64)), 10)
    assert run(list(reversed(range(64))), 10) == first
    assert {n: run([n], 10)[n] for n in range(64)} == first
    assert run(list(range(64)), 10**30) != first
    assert run(list(range(64)), -80) != first


def test_draws_of_one_sequence_are_independent_of_each_other() -> None:
    row, of = logits(1, seed=6)[0], state(seed=77)
    counts = np.zeros((2, VOCAB))
    before = 0
    pairs = np.zeros((2, 2))
    chances = distribution(row.numpy(), of)
    half = set(np.argsort(-chances)[::2])
    share = sum(chances[token] for token in half)
    for index in range(3000):
        token = sampled_from(row[None], [of])[0].token_id
        of.append(token)
        counts[0, token] += 1
        pairs[before, int(token in half)] += index > 0
        before = int(token in half)
    chi_square(counts[0], chances)
    for previous in (0, 1):
        chi_square(pairs[previous], np.array([1 - share, share]))


def test_logprobs_are_of_the_raw_logits() -> None:
    table = logits(3, seed=7)
    changed = {"temperature": 0.2, "logit_bias": {4: 50.0}, "repetition_penalty": 1.9, "top_k": 3}
    states = [state(logprobs=4, **changed), state(), state(logprobs=0, temperature=0.0)]
    expected = table.double().log_softmax(-1).numpy()
    found = sampled_from(table, states)
    assert found[1].logprobs is None
    for row, count in ((0, 4), (2, 0)):
        own = found[row].logprobs
        assert own is not None
        assert own.token_id == found[row].token_id
        assert own.logprob == pytest.approx(expected[row][own.token_id], abs=2e-6)
        assert own.top_ids == np.argsort(-expected[row])[:count].tolist()
        np.testing.assert_allclose(own.top_logprobs, np.sort(expected[row])[::-1][:count], atol=2e-6)
    assert found[0].token_id == 4


def test_the_chosen_tokens_float_is_the_one_in_the_list() -> None:
    table = logits(200, seed=8)
    for sample in sampled_from(table, [state(seed=n, logprobs=VOCAB) for n in range(200)]):
        own = sample.logprobs
        assert own is not None
        assert own.logprob == own.top_logprobs[own.top_ids.index(own.token_id)]


def test_scored_tokens() -> None:
    table = logits(5, seed=9)
    expected = table.double().log_softmax(-1)
    for row, score in enumerate(score_tokens(table, [3, 1, 4, 1, 49], 2)):
        assert score.token_id == [3, 1, 4, 1, 49][row]
        assert score.logprob == pytest.approx(float(expected[row, score.token_id]), abs=2e-6)
        assert score.top_ids == expected[row].topk(2).indices.tolist()
    assert score_tokens(table[:1], [3], 0)[0].top_ids == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_rows_bad_logits_are_its_own_affair(bad: float, temperature: float) -> None:
    table = logits(3, seed=10)
    clean = sampled_from(table.clone(), [state(temperature=temperature, seed=n) for n in range(3)])
    table[1, 20] = bad
    found = sampled_from(table, [state(temperature=temperature, seed=n) for n in range(3)])
    assert [sample.finite for sample in found] == [True, False, True]
    assert [found[0], found[2]] == [clean[0], clean[2]]


def test_huge_but_finite_logits_are_fine() -> None:
    table = torch.full((1, VOCAB), 3e38)
    assert sampled_from(table, [state(temperature=0.0)])[0].finite


def test_logits_are_left_alone() -> None:
    table = logits(len(RULES), seed=11)
    before = table.clone()
    sampled_from(table, [state(outputs=(4, 9), logprobs=2, **fields) for fields in RULES.values()])
    assert torch.equal(table, before)


def test_counts_follow_appends_and_truncations() -> None:
    of = state(frequency_penalty=1.0)
    of.append(5)
    of.seen(VOCAB, torch.device("cpu"))
    for token in (5, 9, 9, 3):
        of.append(token)
    of.truncate(3)
    assert of.output_token_ids == [5, 5, 9]
    counts, in_prompt = of.seen(VOCAB, torch.device("cpu"))
    assert counts.tolist() == np.bincount([5, 5, 9], minlength=VOCAB).tolist()
    assert in_prompt.nonzero()[:, 0].tolist() == [1, 2]


def test_ignore_eos_keeps_min_tokens_meaning() -> None:
    row = torch.zeros(VOCAB)
    row[0] = 50.0
    held = state(temperature=0.0, min_tokens=3, ignore_eos=True)
    assert sampled_from(row[None], [held])[0].token_id != 0
    free = replace(held.params, min_tokens=0)
    assert sampled_from(row[None], [SamplingState(free, (1,), 0)])[0].token_id == 0

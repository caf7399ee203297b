"""Greedy tokens through scheduler, pages and sampler equal transformers' generate, token for token, in fp32.

A difference passes only where transformers' own two best logits lie within ``NEAR_TIE`` of each other at
that position and are the two tokens in question; such cases are counted, printed, and few.

NYBBLE_TEST_EVERY_CUT=1 runs every combination of the ways to cut the work, not a covering few.
"""

import itertools
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.model.decoder import Decoder
from nybble.engine.records import SamplingParams, SequenceOutput
from tiny_models import engine_over, load_decoder, tiny_transformer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = {
    "tiny1m": ROOT / "../shared/data/models/tiny1m",
    "demo": ROOT / "engine/demo/bf16",
}
NUM_PROMPTS, NUM_TOKENS, BLOCK = 20, 64, 8
NEAR_TIE = 1e-4
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
OPENINGS = (
    "Once upon a time, there was a little girl named Lily who lived in a small house near the big forest. "
    "One sunny day she",
    "Tom and his dog went to the park. They saw a big red ball under a tree, and",
    "The old man was sad because",
    '"Can I have a cookie?" asked Ben. His mom smiled and said, "Yes, but first you',
)


@dataclass
class Case:
    """A model of transformers, ours, prompts and what transformers' generate makes of them."""

    theirs: Any
    ours: Decoder
    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]

    def check(self, outputs: list[SequenceOutput]) -> None:
        near_ties = 0
        for prompt, wanted, output in zip(self.prompts, self.expected, outputs, strict=True):
            assert output.finish_reason == "length"
            assert len(output.token_ids) == len(wanted)
            if output.token_ids != wanted:
                self.check_near_tie(prompt, wanted, output.token_ids)
                near_ties += 1
        if near_ties:
            print(f"{near_ties} of {len(outputs)} sequences part at a near tie")
        assert near_ties <= len(outputs) // 10

    def check_near_tie(self, prompt: list[int], wanted: list[int], found: list[int]) -> None:
        place = next(n for n, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
        with torch.no_grad():
            logits = self.theirs(torch.tensor([prompt + wanted[:place]])).logits[0, -1]
        best = logits.topk(2)
        gap = float(best.values[0] - best.values[1])
        print(f"token {place}: {wanted[place]} expected, {found[place]} found, gap {gap:.2e}")
        assert gap < NEAR_TIE, "not a near tie"
        assert {wanted[place], found[place]} == set(best.indices.tolist())


def generate(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def text_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Openings cut at many places, so that many share several whole blocks."""
    rng = random.Random(0)
    prompts = []
    for number in range(NUM_PROMPTS):
        tokens = tokenizer.encode(OPENINGS[number % len(OPENINGS)]).ids
        prompts.append(tokens[: rng.randrange(len(tokens) // 2, len(tokens)) + 1])
    return prompts


@pytest.fixture(scope="module", params=CHECKPOINTS)
def trained(request: pytest.FixtureRequest) -> Case:
    folder = CHECKPOINTS[request.param]
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no checkpoint {request.param} here")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = text_prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return Case(theirs, load_decoder(folder), folder, prompts, generate(theirs, prompts, NUM_TOKENS))


def torch_engine(case: Case, num_blocks: int, **options: Any) -> Engine:
    """Torch's ops one by one: the path of every device, and the CPU's oracle."""
    return engine_over(case.ours, num_blocks, **options)


def served_engine(case: Case, num_blocks: int, **options: Any) -> Engine:
    """What ``nybble serve --dtype float32`` builds on this machine."""
    token_bytes = sum(spec.bytes_per_token for spec in case.ours.config.kv_specs("float32"))
    memory = num_blocks * options["block_size"] * token_bytes
    longest = max(map(len, case.prompts)) + NUM_TOKENS
    limits = {"max_model_len": longest, "kv_cache_memory": memory, "num_threads": 1}
    config = EngineConfig(str(case.folder), "cpu", "float32", **limits, **options)
    engine, info = build_engine(config, lambda *_: None)
    assert info.dtype == "float32"
    return engine


# (concurrent requests, prefix cache, chunked prefill, forced preemption, lag)
EVERY = [*itertools.product((1, 8, 32), (False, True), (False, True), (False, True), (0, 1))]
PAIRS = [
    (1, False, False, False, 0),
    (8, False, False, False, 1),
    (8, True, True, True, 0),
    (8, False, True, True, 1),
    (32, False, True, False, 0),
    (32, True, False, True, 1),
    (32, True, True, False, 1),
]
CUTS = EVERY if os.environ.get("NYBBLE_TEST_EVERY_CUT") else PAIRS


@pytest.mark.parametrize("served", [False, True], ids=["torch", "served"])
@pytest.mark.parametrize(("concurrent", "cache", "chunked", "crowded", "lag"), CUTS)
def test_tokens_are_those_of_generate(
    trained: Case, served: bool, concurrent: int, cache: bool, chunked: bool, crowded: bool, lag: int
) -> None:
    block = 16 if served else BLOCK  # compiled attention wants larger blocks
    longest = max(map(len, trained.prompts)) + NUM_TOKENS
    make = served_engine if served else torch_engine
    engine = make(
        trained,
        longest // block + (6 if served else 12) if crowded else 1000,
        max_num_seqs=concurrent,
        max_num_batched_tokens=max(concurrent, 9) if chunked else 2048,
        enable_prefix_caching=cache,
        lag=lag,
        block_size=block,
    )
    trained.check(engine.generate(trained.prompts, GREEDY))
    assert (engine.stats().num_preemptions > 0) == (crowded and concurrent > 1)
    if cache and not crowded:
        before = engine.stats().prefix_cache_hits
        trained.check(engine.generate(trained.prompts, GREEDY))
        whole_blocks = sum((len(prompt) - 1) // block for prompt in trained.prompts)
        assert engine.stats().prefix_cache_hits - before == block * whole_blocks


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 11},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
}


@pytest.fixture(scope="module", params=FAMILIES)
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    theirs = tiny_transformer(request.param, max_position_embeddings=256, **FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    rng = random.Random(1)
    prompts = [[rng.randrange(97) for _ in range(rng.randrange(1, 60))] for _ in range(12)]
    return Case(theirs, load_decoder(folder), folder, prompts, generate(theirs, prompts, 40))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 32, "lag": 0},
        {"max_num_seqs": 8, "max_num_batched_tokens": 8},
        {"max_num_seqs": 12, "max_num_batched_tokens": 30, "num_blocks": 20},
    ],
    ids=["alone", "together", "chunked", "preempted"],
)
def test_every_family_through_the_engine(random_model: Case, options: dict[str, Any]) -> None:
    engine = engine_over(random_model.ours, **options)
    random_model.check(engine.generate(random_model.prompts, replace(GREEDY, max_tokens=40)))
    assert (engine.stats().num_preemptions > 0) == ("num_blocks" in options)
    engine.check()


def test_sampled_tokens_depend_on_the_seed_alone(random_model: Case) -> None:
    """The same tokens alone, in batches, chunked, preempted, at both lags."""
    params = [
        SamplingParams(
            max_tokens=30, temperature=0.8, top_p=0.9, frequency_penalty=0.5, seed=seed, ignore_eos=True
        )
        for seed in range(len(random_model.prompts))
    ]
    runs = [
        engine_over(random_model.ours, **options).generate(random_model.prompts, params)
        for options in (
            {"max_num_seqs": 1, "lag": 0},
            {"max_num_seqs": 32, "lag": 1},
            {"max_num_seqs": 12, "max_num_batched_tokens": 20, "num_blocks": 20, "lag": 1},
        )
    ]
    tokens = [[output.token_ids for output in run] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({tuple(own) for own in tokens[0]}) == len(params)

"""Names of tokens, and tokens that share one."""

from pathlib import Path

import pytest
from nybble.engine.records import TokenLogprobs
from nybble.engine.tokenizer import Tokenizer
from nybble.server.openai_logprobs import chat_logprobs, completion_logprobs, token_names


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_names(tokenizer: Tokenizer) -> None:
    name = token_names(tokenizer)
    assert name(1) == "<s>"
    assert name(tokenizer.token_id("Ġ")) == " "
    half = [
        token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id) == b"\xf0"
    ]
    assert name(half[0]) == "bytes:\\xf0"
    assert token_names(tokenizer, as_ids=True)(7) == "token_id:7"
    ordinary = range(2, tokenizer.vocab_size)
    assert len({name(token_id) for token_id in ordinary}) == len(ordinary)


def test_where_tokens_share_a_name_the_likelier_one_stays() -> None:
    entry = TokenLogprobs(token_id=3, logprob=-2.0, top_ids=[1, 2], top_logprobs=[-0.25, -1.0])
    shared = completion_logprobs([3], [entry], [0], lambda token_id: "x")
    assert shared["top_logprobs"] == [{"x": -0.25}]
    assert shared["token_logprobs"] == [-2.0]
    apart = completion_logprobs([3], [entry], [0], str)
    assert apart["top_logprobs"] == [{"1": -0.25, "2": -1.0, "3": -2.0}]


def test_the_chosen_tokens_float_is_the_top_entrys() -> None:
    logprob = -0.1234567890123456789
    entry = TokenLogprobs(token_id=1, logprob=logprob, top_ids=[1], top_logprobs=[logprob])
    found = completion_logprobs([1], [entry], [0], str)
    assert found["token_logprobs"][0] == max(found["top_logprobs"][0].values())


def test_the_first_token_of_a_prompt_and_minus_infinity(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs(token_id=5, logprob=float("-inf"), top_ids=[5], top_logprobs=[float("-inf")])
    found = completion_logprobs([4, 5], [None, entry], [0, 1], str)
    assert found["token_logprobs"] == [None, -9999.0]
    assert found["top_logprobs"] == [None, {"5": -9999.0}]
    chat = chat_logprobs([entry], 1, token_names(tokenizer), tokenizer)
    assert chat[0]["logprob"] == chat[0]["top_logprobs"][0]["logprob"] == -9999.0

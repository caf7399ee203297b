"""/v1/completions through OpenAI's own client."""

import json

import httpx
import openai
import pytest
from fake_client import VOCAB
from gateway_server import GatewayServer


def encode(server: GatewayServer, text: str, special: bool = False) -> list[int]:
    return server.gateway.models.get(None).tokenizer.encode(text, special)


def test_a_whole_answer(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    answer = openai_client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=40)
    ids = encode(server, "Once upon a time", True)
    # The fake engine repeats the prompt; <s> is special, so its text is left out.
    assert answer.choices[0].text.startswith("Once upon a time")
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == len(ids) + 40
    assert server.client.submitted[0][0] == ids
    assert ids[0] == 1


def test_defaults_are_generation_configs_and_max_tokens_is_16(
    openai_client: openai.OpenAI, server: GatewayServer
) -> None:
    openai_client.completions.create(model="tiny", prompt="a")
    params = server.client.submitted[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.9, 20, 16)
    assert params.seed is None


def test_a_stream_is_the_whole_answer_in_pieces(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    arguments = {"model": "tiny", "prompt": "Once upon a time, ünïcödé 🐕!", "max_tokens": 64}
    whole = openai_client.completions.create(**arguments)
    chunks = list(
        openai_client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert "�" not in chunks[3].choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_continuous_usage(server: GatewayServer) -> None:
    body = {"prompt": [5, 6], "max_tokens": 3, "stream": True}
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    counts = [
        event["usage"]["completion_tokens"]
        for event in _events(server, "/v1/completions", {**body, **options})
    ]
    assert counts == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["Hello", " world"], 2),
        ([[5, 6, 7], [8]], 2),
        ([5, 6, 7], 1),
    ],
)
def test_every_form_of_prompt(
    openai_client: openai.OpenAI, server: GatewayServer, prompt: list[object], expected: int
) -> None:
    answer = openai_client.completions.create(model="tiny", prompt=prompt, max_tokens=2, n=2)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == list(range(expected * 2))
    prompts = [submitted[0] for submitted in server.client.submitted]
    assert prompts[0] == prompts[1]
    if isinstance(prompt[0], int):
        assert prompts[0] == prompt
    assert answer.usage.completion_tokens == expected * 4
    assert answer.usage.prompt_tokens == sum(len(p) for p in prompts[::2])


def test_n_streams_keep_their_index_and_their_own_seed(
    openai_client: openai.OpenAI, server: GatewayServer
) -> None:
    stream = openai_client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=3, max_tokens=4, seed=2**63 - 1, stream=True
    )
    texts = dict.fromkeys(range(6), "")
    endings = dict.fromkeys(range(6), 0)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            endings[choice.index] += choice.finish_reason is not None
    assert set(endings.values()) == {1}
    assert len({texts[0], texts[1], texts[2]}) == 1
    assert texts[0] != texts[3]
    seeds = [submitted[1].seed for submitted in server.client.submitted]
    assert seeds[:3] == seeds[3:] == [2**63 - 1, -(2**63), -(2**63) + 1]


def test_stop_string_ends_the_text_and_aborts_the_engine(
    openai_client: openai.OpenAI, server: GatewayServer
) -> None:
    prompt = encode(server, "Once upon a time there was")
    for stream in (False, True):
        answer = openai_client.completions.create(
            model="tiny", prompt=prompt, max_tokens=100, stop=["a time", "zzz"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == "Once upon "
        assert choices[-1].finish_reason == "stop"
    assert len(server.client.aborted) == 2


def test_tokens_after_a_stop_are_neither_sent_nor_counted(server: GatewayServer) -> None:
    ids = encode(server, "Once upon a time there was")
    server.client.script = lambda prompt, params: [ids]  # all in one message
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 50, "stop": "upon"}).json()
    assert answer["choices"][0]["text"] == "Once "
    assert answer["choices"][0]["stop_reason"] == "upon"
    assert answer["usage"]["completion_tokens"] < len(ids)
    kept = server.post(
        "/v1/completions",
        {"prompt": "x", "max_tokens": 50, "stop": "upon", "include_stop_str_in_output": True},
    ).json()
    assert kept["choices"][0]["text"] == "Once upon"


def test_end_of_sequence_is_stop(server: GatewayServer) -> None:
    server.client.script = lambda prompt, params: [[5], [6]]
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 50}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_text_leaves_special_tokens_out(
    openai_client: openai.OpenAI, server: GatewayServer, stream: bool
) -> None:
    for prompt in ("Hello world", encode(server, "Hello world", True)):
        answer = openai_client.completions.create(
            model="tiny", prompt=prompt, max_tokens=3, echo=True, stream=stream
        )
        texts = [chunk.choices[0].text for chunk in answer] if stream else [answer.choices[0].text]
        text = "".join(texts)
        assert text.startswith("Hello world")
        assert len(text) > len("Hello world")
        assert "<s>" not in text


def test_logprobs(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    answer = openai_client.completions.create(model="tiny", prompt="Hello", max_tokens=5, logprobs=2)
    found = answer.choices[0].logprobs
    lengths = {len(found.tokens), len(found.token_logprobs), len(found.top_logprobs), len(found.text_offset)}
    assert lengths == {5}
    assert found.token_logprobs == [-1.5] * 5
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob
        assert max(top.values()) == -0.5


def test_logprobs_0_shows_the_chosen_token_alone(server: GatewayServer) -> None:
    answer = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "logprobs": 0}).json()
    found = answer["choices"][0]["logprobs"]
    assert [list(top) for top in found["top_logprobs"]] == [[token] for token in found["tokens"]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_as_lm_eval_does_it(server: GatewayServer, max_tokens: int) -> None:
    prompts = [encode(server, "Once upon a time"), encode(server, "Hello world 🐕")]
    body = {
        "prompt": prompts,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "temperature": 0,
        "echo": True,
        "seed": 1,
    }
    answer = server.post("/v1/completions", body).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt) + max_tokens
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert all(type(logprob) is float for logprob in found["token_logprobs"][1:])
        assert all(found["tokens"][i] in found["top_logprobs"][i] for i in range(1, len(prompt)))
        assert found["text_offset"] == sorted(found["text_offset"])
        assert choice["text"].startswith(server.gateway.models.get(None).tokenizer.decode(prompt))
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens
    if not max_tokens:
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2


def test_streamed_echo_logprobs_are_the_whole_ones(server: GatewayServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 6, "logprobs": 2, "echo": True}
    whole = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    merged: dict[str, list[object]] = {key: [] for key in whole}
    for event in _events(server, "/v1/completions", {**body, "stream": True}):
        for key, values in event["choices"][0]["logprobs"].items():
            merged[key] += values
    assert merged == whole


def test_vllms_extras_reach_the_engine(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    openai_client.completions.create(
        model="tiny",
        prompt="a",
        max_tokens=9,
        temperature=0,
        presence_penalty=1.5,
        frequency_penalty=-2,
        logit_bias={"7": -100, "8": 3},
        extra_body={
            "top_k": 10**6,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9, 9],
            "cache_salt": "salt",
        },
    )
    _, params, salt = server.client.submitted[0]
    assert (params.temperature, params.presence_penalty, params.frequency_penalty) == (0.0, 1.5, -2.0)
    assert params.logit_bias == {7: -100.0, 8: 3.0}
    assert (params.top_k, params.min_p, params.repetition_penalty) == (VOCAB, 0.1, 1.1)
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (9,))
    assert salt == "salt"


def test_token_ids_on_request(server: GatewayServer) -> None:
    body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "logprobs": 1}
    answer = server.post("/v1/completions", {**body, "return_tokens_as_token_ids": True}).json()["choices"][0]
    assert answer["prompt_token_ids"] == [5, 6]
    assert answer["token_ids"] == [5, 6, 5]
    assert answer["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:5"]


def test_the_word_abort_never_reaches_the_wire(server: GatewayServer) -> None:
    ids = encode(server, "stop here")
    server.client.script = lambda prompt, params: [ids] * 5
    with httpx.stream(
        "POST",
        server.url + "/v1/completions",
        json={"prompt": "x", "max_tokens": 50, "stop": "here", "stream": True},
    ) as response:
        assert "abort" not in response.read().decode()


def _events(server: GatewayServer, path: str, body: object) -> list[dict[str, object]]:
    lines = server.post(path, body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

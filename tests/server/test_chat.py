"""/v1/chat/completions through OpenAI's own client."""

import openai
import pytest
from gateway_server import GatewayServer

USER = [{"role": "user", "content": "Hello"}]


def prompt_text(server: GatewayServer, index: int = -1) -> str:
    tokenizer = server.gateway.models.get(None).tokenizer
    return tokenizer.decode(server.client.submitted[index][0], skip_special_tokens=False)


def test_a_whole_answer(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    answer = openai_client.chat.completions.create(model="tiny", messages=USER, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    # The template's own <s> and no other: the rendered prompt gets no special tokens again.
    assert prompt_text(server) == "<s><user>Hello</><assistant>"


def test_a_stream_is_the_whole_answer_in_pieces(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    arguments = {"model": "tiny", "messages": USER, "max_completion_tokens": 30, "n": 2}
    whole = openai_client.chat.completions.create(**arguments)
    chunks = list(
        openai_client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert mine[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in mine[1:])
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_max_tokens_is_what_is_left(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    openai_client.chat.completions.create(model="tiny", messages=USER)
    prompt, params, _ = server.client.submitted[0]
    assert params.max_tokens == 256 - len(prompt)
    openai_client.chat.completions.create(model="tiny", messages=USER, max_tokens=7, max_completion_tokens=3)
    assert server.client.submitted[1][1].max_tokens == 3


def test_content_as_parts_and_all_roles(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]
    openai_client.chat.completions.create(
        model="tiny",
        max_tokens=1,
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "name": "me"},  # type: ignore[list-item]
            {"role": "user", "content": "and?"},
        ],
    )
    text = prompt_text(server)
    assert text.startswith("<s><system>be brief</><user>two")
    assert text.endswith("parts</><assistant>yes</><user>and?</><assistant>")


def test_template_options(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    messages = [*USER, {"role": "assistant", "content": "I am"}]
    for extra, expected in [
        ({"chat_template_kwargs": {"shout": True}}, "<s><user>Hello</><assistant>I am</>!!<assistant>"),
        ({"add_generation_prompt": False}, "<s><user>Hello</><assistant>I am</>"),
        ({"continue_final_message": True}, "<s><user>Hello</><assistant>I am"),
    ]:
        openai_client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=1,
            extra_body=extra,  # type: ignore[arg-type]
        )
        assert prompt_text(server) == expected


def test_logprobs(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 3
        assert [top.logprob for top in entry.top_logprobs if top.token == entry.token] == [entry.logprob]
    plain = openai_client.chat.completions.create(model="tiny", messages=USER, max_tokens=4, logprobs=True)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 4


def test_streamed_logprobs(openai_client: openai.OpenAI) -> None:
    chunks = openai_client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=4, logprobs=True, top_logprobs=2, stream=True
    )
    entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert len(entries) == 4


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be rude"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user", "content": "x", "surprise": 1}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(
    openai_client: openai.OpenAI, messages: list[dict[str, object]]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["param"].startswith("messages")


def test_a_model_without_a_template(server: GatewayServer) -> None:
    from dataclasses import replace

    models = server.gateway.models
    original = models.get(None)
    try:
        server.call(lambda: models._models.update(tiny=replace(original, chat_template=None)))
        answer = server.post("/v1/chat/completions", {"messages": USER})
        assert answer.status_code == 400
        assert "--chat-template" in answer.json()["error"]["message"]
    finally:
        server.call(lambda: models._models.update(tiny=original))

"""/tokenize, /detokenize, /v1/models, /version."""

import nybble
import openai
import pytest
from gateway_server import GatewayServer


def test_tokenize_and_back(server: GatewayServer) -> None:
    text = "Once upon a time, 🐕 ünï"
    answer = server.post("/tokenize", {"model": "tiny", "prompt": text}).json()
    assert set(answer) == {"count", "max_model_len", "tokens", "token_strs"}
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert answer["tokens"][0] == 1
    assert answer["token_strs"] is None
    back = server.post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<s>" + text}  # as vLLM: special tokens are shown
    plain = server.post(
        "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert plain["tokens"] == answer["tokens"][1:]
    assert len(plain["token_strs"]) == plain["count"]
    assert all(isinstance(string, str) for string in plain["token_strs"])


def test_tokenize_counts_what_a_chat_would_send(server: GatewayServer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.post("/tokenize", {"messages": messages}).json()
    chat = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()
    assert answer["count"] == chat["usage"]["prompt_tokens"]
    assert answer["tokens"] == server.client.submitted[0][0]
    shorter = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert shorter["count"] < answer["count"]


def test_long_and_empty_texts(server: GatewayServer) -> None:
    assert server.post("/tokenize", {"prompt": "a b c " * 5000}).json()["count"] > 256
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == [1]
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}),
        ("/tokenize", {"prompt": "a", "surprise": 1}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "1"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [1.5]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [10**300]}),
    ],
)
def test_bad_bodies(server: GatewayServer, path: str, body: object) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_models(openai_client: openai.OpenAI, server: GatewayServer) -> None:
    listed = openai_client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("tiny", "model", "nybble")]
    assert openai_client.models.retrieve("tiny") == listed[0]
    assert server.get("/v1/models/a/b%2Fc").json()["error"]["code"] == "model_not_found"


def test_tokenizer_info(server: GatewayServer) -> None:
    info = server.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")


def test_version(server: GatewayServer) -> None:
    assert server.get("/version").json() == {"version": nybble.__version__}


def test_openapi_describes_every_body(server: GatewayServer) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False
        assert "$ref" not in str(schema)

"""A model's JSON files: what they mean, and errors that name the file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.engine.model_files import DEMO_FOLDER, ModelFiles, read_json, resolve_model


def model(folder: Path, **files: Any) -> ModelFiles:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ModelFiles(folder)


def test_a_folder_a_file_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    assert resolve_model(str(tmp_path / "model")) == (tmp_path / "model").resolve()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == (tmp_path / "model").resolve()
    with pytest.raises(ConfigError, match=r"--revision main: .* local folder"):
        resolve_model("model", "main")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model("model.safetensors")
    for absent in ("./nothing", "/nothing/here", "a/b/c", "x y", "", "model.gguf", "weights\0", "é/é"):
        with pytest.raises(ConfigError, match=r"does not exist|neither"):
            resolve_model(absent)


def test_the_demo_is_the_default() -> None:
    if DEMO_FOLDER.is_dir():
        assert resolve_model(None) == DEMO_FOLDER.resolve()
    else:
        with pytest.raises(ConfigError, match="nybble serve MODEL"):
            resolve_model(None)


def test_a_hub_id_offline_says_so_and_uses_no_network(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    code = """
from nybble.engine.errors import ConfigError
from nybble.engine.model_files import resolve_model
for revision in (None, "v1"):
    try:
        resolve_model("nybble-test/not-there", revision)
    except ConfigError as error:
        print(error.message)
"""
    environment = child_environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    plain, revised = done.stdout.splitlines()
    assert "'nybble-test/not-there'" in plain
    assert "HF_HUB_OFFLINE" in plain
    assert "--revision 'v1'" in revised


def test_a_hub_id_in_the_cache_resolves_offline(tmp_path: Path, child_environment: dict[str, str]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--nybble-test--cached"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = "from nybble.engine.model_files import resolve_model; print(resolve_model('nybble-test/cached'))"
    environment = child_environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == repo / "snapshots" / commit


def test_hub_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for raised, says in (
        (LocalEntryNotFoundError("x\ny"), "offline"),
        (PermissionError("no\nspace"), "could not be downloaded"),
    ):

        def fail(*_: Any, error: Exception = raised, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ConfigError, match=says) as caught:
            resolve_model("owner/name")
        assert "\n" not in caught.value.message


def test_the_hub_is_asked_for_no_pickles_and_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", "v2") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v2")
    there = [
        "model-00001.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    elsewhere = ["pytorch_model.bin", "modeling_x.py", "model.gguf", "original/consolidated.00.pth", "a.pt"]
    kept = filter_repo_objects(
        there + elsewhere, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == there


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    ],
)
def test_bad_json_names_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_json(path)
    assert str(path) in error.value.message


def test_a_file_that_is_too_large_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 16 MiB"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        _ = ModelFiles(tmp_path / "nothing").config
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        _ = ModelFiles(tmp_path).config


def test_end_of_sequence_is_the_union(tmp_path: Path) -> None:
    files = model(
        tmp_path,
        config={"eos_token_id": 5},
        generation_config={"eos_token_id": [7, 5]},
        tokenizer_config={
            "eos_token": {"content": "<|im_end|>"},
            "added_tokens_decoder": {"9": {"content": "<|im_end|>"}},
        },
    )
    assert files.eos_token_ids() == [5, 7, 9]


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"added_tokens": [{"id": 3, "content": "<s>"}, {"id": 4, "content": "</s>"}]},
        {"model": {"vocab": {"<s>": 3, "</s>": 4}}},
    ],
)
def test_the_tokenizers_end_is_found_in_tokenizer_json(tmp_path: Path, tokenizer: Any) -> None:
    files = model(tmp_path, config={}, tokenizer_config={"eos_token": "</s>"}, tokenizer=tokenizer)
    assert files.eos_token_ids() == [4]


def test_no_end_of_sequence_anywhere(tmp_path: Path) -> None:
    assert (
        model(tmp_path, config={"eos_token_id": None}, tokenizer_config={"eos_token": None}).eos_token_ids()
        == []
    )
    assert (
        model(tmp_path, tokenizer_config={"eos_token": "</s>"}, tokenizer={"model": []}).eos_token_ids() == []
    )


@pytest.mark.parametrize("value", ["2", [2, "3"], -1, True, 2.5, {"a": 1}, [[2]]])
def test_a_strange_end_of_sequence_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        model(tmp_path, config={}, generation_config={"eos_token_id": value}).eos_token_ids()


def test_sampling_defaults_are_those_stated(tmp_path: Path) -> None:
    stated = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": -1,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "num_beams": 4,
    }
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.05, "max_tokens": 2048}
    assert model(tmp_path, generation_config=stated).sampling_defaults() == expected
    assert ModelFiles(tmp_path / "nothing").sampling_defaults() == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("min_p", float("nan")),
        ("repetition_penalty", float("inf")),
        ("max_new_tokens", 0),
    ],
)
def test_a_strange_sampling_value_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key}.*--generation-config none"):
        model(tmp_path, generation_config={key: value}).sampling_defaults()


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 4096),
        (
            {
                "max_position_embeddings": 2048,
                "rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 7},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 99,
                "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 7},
            },
            14,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 2}}, 1024),
        (
            {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            512,
        ),
    ],
)
def test_the_models_length_with_its_rope_scaling(tmp_path: Path, config: Any, length: int) -> None:
    assert model(tmp_path, config=config).max_model_len() == length


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_position_embeddings": "2048"},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 64, "rope_scaling": [1]},
        {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": "4"}},
        {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": -1}},
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0},
        },
    ],
)
def test_a_strange_length_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model(tmp_path, config=config).max_model_len()


def test_where_the_quantization_is_stated(tmp_path: Path) -> None:
    assert model(tmp_path, config={}).quantize_config is None
    assert model(tmp_path, quantize_config={"bits": 4}).quantize_config == {"bits": 4}
    assert model(tmp_path, config={"quantization_config": {"bits": 8}}).quantize_config == {"bits": 8}
    assert model(tmp_path, config={"compression_config": {"bits": 2}}).quantize_config == {"bits": 2}
    with pytest.raises(CheckpointError, match="quantization_config"):
        _ = model(tmp_path, config={"quantization_config": "gptq"}).quantize_config

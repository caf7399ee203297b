"""A model's folder: where it is, and its JSON files, read once, size-limited, errors naming the file."""

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError

Json = dict[str, Any]

DEMO_FOLDER = Path(__file__).parent / "demo" / "gptq-4bit-g64"
MAX_JSON_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20
PROVENANCE = "provenance"  # of config.json: what ``engine.quantize`` says of a checkpoint of its own
# Weights as safetensors, configuration, templates, tokenizers and their slow sources; no pickles, no code.
_HUB_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_HUB_IGNORED = ("original/*", "onnx/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """The local folder of ``model``: None is the built-in demo, else a folder, else a Hugging Face hub id.

    A hub model is downloaded into the hub's cache (safetensors, JSON, tokenizer and template files only) or
    read from it where ``HF_HUB_OFFLINE`` is set. Errors: ConfigError.
    """
    if model is None:
        if not DEMO_FOLDER.is_dir():
            raise ConfigError(
                "the built-in demo model is not part of this installation "
                f"({DEMO_FOLDER} is missing); name a model: nybble serve MODEL"
            )
        model = str(DEMO_FOLDER)
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision}: {model!r} is a local folder; leave --revision out")
        return folder.resolve()
    if model and folder.exists():
        raise ConfigError(f"model {model!r} is a file; give the folder that holds it and its config.json")
    if not _HUB_ID.fullmatch(model) or model.endswith((".safetensors", ".gguf", ".bin", ".pt")):
        raise ConfigError(
            f"model {model!r} does not exist; give an existing folder, or a hub id such as 'owner/name'"
        )
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    # Imported here: the gateway serves local folders without this library's import time and memory.
    from huggingface_hub import snapshot_download

    # HTTPError is its HTTP client's (httpx or httpx2 by version), which it does not declare as exported.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"model {model!r}" if revision is None else f"model {model!r} at --revision {revision!r}"
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=list(_HUB_ALLOWED), ignore_patterns=list(_HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"{named} is gated: accept its terms on the hub and set HF_TOKEN, or give a local folder"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{named}: the hub has no such revision; give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{named} is neither a local folder nor on the hub (or it is private and HF_TOKEN is not set); "
            "check the spelling"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{named} is neither a local folder nor a valid hub id (owner/name)") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{named} is neither a folder nor in the local hub cache, and the hub is offline "
            "(HF_HUB_OFFLINE, or no network); give a local folder, or download it once with the network on"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(
            f"{named} could not be downloaded ({reason}); try again, or give a local folder"
        ) from error
    return Path(found)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, *, unique: bool = True) -> Json:
    """The JSON object in ``path``. CheckpointError if it is too large, not UTF-8, not JSON or no object.

    ``unique``: two equal keys in one object, of which readers see either, are an error.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes >> 20} MiB, so it is not what its name says")
    return parse_json(data, str(path), unique=unique)


def parse_json(data: bytes, name: str, *, unique: bool = True) -> Json:
    """The JSON object in ``data``; ``name`` is for errors. See ``read_json``."""
    try:
        parsed = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise CheckpointError(f"{name}: nested too deep to be a model's file") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{name}: not valid JSON ({str(error)[:200]})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name}: holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:100]!r} appears twice")
    return result


class ModelFiles:
    """The JSON files of the model in ``folder``; each is read at its first use.

    Errors: CheckpointError naming file and key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _optional(self, name: str) -> Json:
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    @cached_property
    def config(self) -> Json:
        """config.json; it must exist."""
        path = self.folder / "config.json"
        if not path.exists():
            raise CheckpointError(f"{self.folder}: no config.json, so it is not a model's folder")
        return read_json(path)

    @cached_property
    def generation_config(self) -> Json:
        """generation_config.json, {} if absent."""
        return self._optional("generation_config.json")

    @cached_property
    def tokenizer_config(self) -> Json:
        """tokenizer_config.json, {} if absent."""
        return self._optional("tokenizer_config.json")

    @cached_property
    def quantize_config(self) -> Json | None:
        """config.json's quantization_config (older: compression_config), else quantize_config.json."""
        for key in ("quantization_config", "compression_config"):
            block = self.config.get(key)
            if block is not None:
                if not isinstance(block, dict):
                    raise CheckpointError(f"{self.folder / 'config.json'}: {key} is not an object")
                return block
        return self._optional("quantize_config.json") or None

    def eos_token_ids(self) -> list[int]:
        """Ids that end a sequence: config's, generation_config's and the tokenizer's, each once."""
        ids: list[int] = []
        for name, block in (("config.json", self.config), ("generation_config.json", self.generation_config)):
            value = block.get("eos_token_id")
            for item in value if isinstance(value, list) else [] if value is None else [value]:
                if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                    raise CheckpointError(
                        f"{self.folder / name}: eos_token_id {value!r}: expected an id or a list of ids"
                    )
                ids.append(item)
        token = self._tokenizer_eos()
        return list(dict.fromkeys(ids if token is None else [*ids, token]))

    def _tokenizer_eos(self) -> int | None:
        token = self.tokenizer_config.get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            return None
        decoder = self.tokenizer_config.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and entry.get("content") == content and key.isdecimal():
                return int(key)
        path = self.folder / "tokenizer.json"
        tokenizer = read_json(path, MAX_TOKENIZER_BYTES, unique=False) if path.exists() else {}
        added = tokenizer.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict) and entry.get("content") == content:
                found = entry.get("id")
                return found if isinstance(found, int) else None
        vocab = tokenizer.get("model", {}).get("vocab") if isinstance(tokenizer.get("model"), dict) else None
        found = vocab.get(content) if isinstance(vocab, dict) else None
        return found if isinstance(found, int) else None

    def sampling_defaults(self) -> dict[str, float | int]:
        """generation_config's sampling values, under SamplingParams' names; only those it states.

        ``do_sample`` is not looked at (vLLM's meaning). ``max_new_tokens`` becomes ``max_tokens``.
        """
        found: dict[str, float | int] = {}
        for key, (name, least, most, whole) in _SAMPLING.items():
            value = self.generation_config.get(key)
            if value is None:
                continue
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not least <= value <= most:
                raise CheckpointError(
                    f"{self.folder / 'generation_config.json'}: {key} {value!r}: expected a number from "
                    f"{least} to {most}; correct it or use --generation-config none"
                )
            found[name] = max(0, value) if name == "top_k" else value
        return found

    def max_model_len(self) -> int:
        """Positions the model can address: max_position_embeddings, extended by the rope scaling.

        vLLM's rule: linear and dynamic multiply it by ``factor``; yarn multiplies
        original_max_position_embeddings; llama3 and longrope state the extended value already.
        """
        path = self.folder / "config.json"
        length = self.config.get("max_position_embeddings")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise CheckpointError(f"{path}: max_position_embeddings {length!r}: expected a positive integer")
        rope = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
            rope = rope["full_attention"]
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path}: the rope scaling is not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        factor = rope.get("factor", 1.0)
        if kind not in ("linear", "dynamic", "yarn"):
            return length
        original = rope.get("original_max_position_embeddings", length) if kind == "yarn" else length
        if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor <= 0:
            raise CheckpointError(f"{path}: rope factor {factor!r}: expected a positive number")
        if not isinstance(original, int) or original < 1:
            raise CheckpointError(
                f"{path}: original_max_position_embeddings {original!r}: expected a positive integer"
            )
        return int(original * factor)


_INF = math.inf
# generation_config's key: (SamplingParams' name, least, most, an integer)
_SAMPLING: dict[str, tuple[str, float, float, bool]] = {
    "temperature": ("temperature", 0.0, 100.0, False),
    "top_p": ("top_p", 1e-9, 1.0, False),
    "top_k": ("top_k", -1, 1 << 31, True),
    "min_p": ("min_p", 0.0, 1.0, False),
    "repetition_penalty": ("repetition_penalty", 1e-9, 1e9, False),
    "max_new_tokens": ("max_tokens", 1, 1 << 31, True),
}


def original_files(folder: Path) -> ModelFiles:
    """Those of a model that may be quantized. ConfigError where it is already; CheckpointError."""
    files = ModelFiles(folder)
    if files.quantize_config is not None:
        method = files.quantize_config.get("quant_method", "gptq")
        raise ConfigError(f"MODEL {folder}: is quantized already ({method}); give the original")
    return files


def compared(gate: Mapping[str, Any]) -> str:
    """As "+0.5886 > 0.1": the rise in a gate's verdict beside its limit, with digits enough to be true."""
    rise, limit = gate["nll_increase"], gate["max_nll_increase"]
    digits = next((d for d in range(4, 17) if (round(rise, d) > limit) == (rise > limit)), 17)
    return f"{rise:+.{digits}f} {'<=' if gate['passed'] else '>'} {limit!r}"

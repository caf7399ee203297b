"""The server's options: one frozen record. The only place where the environment is read (and set)."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ..engine.config import CpuActivations, CpuKernels, Device, DType, EngineConfig
from ..engine.errors import ConfigError
from ..engine.tokenizer import POOL_ENVIRONMENT
from .findings import finding

PREFIX = "NYBBLE_"
# Read by the Makefile's bootstrap, not by the server.
_SECRET = frozenset({"api_key", "admin_key", "database_url"})
_OTHERS = frozenset({"NYBBLE_TORCH"})
# What Kubernetes sets in every pod for a Service named "nybble", unless enableServiceLinks is false.
_SERVICE_LINK = re.compile(
    r"NYBBLE_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)"
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def bytes_of(size: str) -> int:
    """Of "2GiB", "512MB", "1.5G" (G is GiB, GB is 10**9) or a plain number. Errors: ValueError."""
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError("should be a size in bytes, as 2GiB, 512MB or 1000000")
    number, unit, binary = match.groups()
    if unit is None:
        return int(float(number))
    decimal = not binary and size.strip()[-1] in "bB"
    return int(float(number) * (1000 if decimal else 1024) ** _POWERS[unit.upper()])


def _split_keys(value: object) -> object:
    return tuple(value.split()) if isinstance(value, str) else value


def _check_key(key: SecretStr) -> None:
    text = key.get_secret_value()
    if not text or any(character.isspace() for character in text):
        raise ValueError("a key must not be empty or hold blanks")


Size = Annotated[int, BeforeValidator(lambda value: bytes_of(value) if isinstance(value, str) else value)]
Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Every option of ``nybble serve``. From the command line, else NYBBLE_<NAME>, else the default."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=False, protected_namespaces=()
    )

    model: str | None = Field(None, description="a folder, or a hub id (owner/name); default: the demo model")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    served_model_name: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="name of the model in the API (default: its hub id or folder)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    chat_template: str | None = Field(
        None, description="a Jinja file, or the name of one of the model's templates"
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto: the model's generation_config.json gives the sampling defaults"
    )

    device: Device = Field("auto", description="where the model runs")
    dtype: DType = Field("auto", description="what the model computes in")
    max_model_len: int | None = Field(
        None, description="longest prompt + output, in tokens (default: the model's)"
    )
    max_num_seqs: int = Field(64, description="sequences that run at once")
    max_num_batched_tokens: int = Field(2048, description="tokens computed in one step at most")
    block_size: int = Field(16, description="tokens in a block of the KV cache")
    kv_cache_memory: Size | None = Field(
        None,
        description="bytes of the KV cache, as 2GiB (default: what is needed, at most half of what is free)",
    )
    num_threads: int | None = Field(
        None, description="the engine's threads (default: the physical cores it may use)"
    )
    prefix_caching: bool = Field(True, description="let requests share the KV cache of equal beginnings")
    lag: int = Field(0, description="steps planned ahead of the one that runs: 0 or 1")
    cpu_kernels: CpuKernels = Field(
        "auto",
        description="compiled kernels for this instruction set (auto: the CPU's best), torch's own, or "
        "portable: low-bit weights stay packed and need no special instructions",
    )
    cpu_activations: CpuActivations | None = Field(
        None,
        description="what low-bit weights meet in compiled kernels: int8 is fastest, fp32 exact, bf16 takes "
        "AVX512-BF16 (default: int8, fp32 with --dtype float32)",
    )
    lm_head_bits: int | None = Field(
        None, description="round a dense output head to 8 or 4 bits at load (default: as stored)"
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed of the requests that bring none")

    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="a key that requests must bring; repeatable (NYBBLE_API_KEY: separated by spaces)",
    )
    admin_key: SecretStr | None = Field(
        None,
        description="the key of the routes that quantize, load and unload models (default: they are off)",
    )
    models_dir: Path | None = Field(
        None, description="the folder that quantization jobs write to and that models are loaded from"
    )
    data_dir: Path | None = Field(None, description="the folder of calibration files that jobs may name")
    database_url: str | None = Field(
        None,
        description="where jobs are kept, as SQLAlchemy writes it: "
        "postgresql+psycopg://USER:PASSWORD@HOST/NAME (default: SQLite in --models-dir)",
    )
    quantize_threads: int = Field(1, ge=1, description="threads of a quantization job")
    quantize_memory: Size | None = Field(
        None,
        ge=1 << 28,
        description="bytes that a quantization job may allocate, as 8GiB (default: no limit)",
    )

    max_queued_requests: int = Field(
        256, ge=1, description="sequences that may wait for their turn; more get a 429"
    )
    max_queued_tokens: int = Field(1 << 20, ge=1, description="prompt tokens that may wait; more get a 429")
    max_body_size: Size = Field(16 << 20, ge=1024, description="bytes of a request's body at most, as 16MiB")
    drain_delay: Seconds = Field(
        5.0, description="seconds after SIGTERM in which new requests are still served while /ready fails"
    )
    drain_timeout: Seconds = Field(
        30.0, description="seconds after that in which running requests may finish"
    )
    hang_timeout: float = Field(
        120.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds without a step, with work to do, until it is a hang",
    )
    vllm_metrics: bool = Field(
        False, description="/metrics also shows the vllm: names that gateways and scalers read"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys(cls, value: object) -> object:
        return _split_keys(value)

    @field_validator("api_key")
    @classmethod
    def _not_blank(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            _check_key(key)
        return keys

    @field_validator("admin_key")
    @classmethod
    def _no_blank_admin_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            _check_key(key)
        return key

    @field_validator("models_dir", "data_dir")
    @classmethod
    def _existing(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        folder = path.expanduser().resolve()
        if not folder.is_dir():
            raise ValueError("no such folder; make it first")
        return folder

    def engine_config(self, folder: Path) -> EngineConfig:
        """What the engine needs of these options. Errors: ConfigError."""
        return EngineConfig(
            model=str(folder),
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            kv_cache_memory=self.kv_cache_memory,
            num_threads=self.num_threads,
            enable_prefix_caching=self.prefix_caching,
            lag=self.lag,
            cpu_kernels=self.cpu_kernels,
            cpu_activations=self.cpu_activations,
            lm_head_bits=self.lm_head_bits,
            seed=self.seed,
            generation_config=self.generation_config,
        )


def option_name(field: str, given: object = None) -> str:
    """The command-line spelling of a field."""
    name = field.replace("_", "-")
    return f"--no-{name}" if given is False else f"--{name}"


def load_settings(given: dict[str, Any]) -> Settings:
    """Settings from the command line's ``given`` values and the environment. Errors: ConfigError."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        upper = name.upper()
        if upper.startswith(PREFIX) and upper not in known | _OTHERS and not _SERVICE_LINK.fullmatch(upper):
            raise ConfigError(f"{name}: no such option; unset it, or see nybble serve --help for the names")
    if os.environ.get("NYBBLE_PORT", "").startswith("tcp://"):
        given = {"port": Settings.model_fields["port"].default, **given}
    if os.environ.get("NYBBLE_API_KEY", "unset").strip() == "" and "api_key" not in given:
        raise ConfigError("NYBBLE_API_KEY is empty: set a key, or unset it to serve without one")
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "options"
        value = "" if field in _SECRET else f" {first['input']!r:.80}"
        source = "" if field in given else f" (from {PREFIX}{field.upper()})"
        message = finding(first, size=field.endswith(("_memory", "_size")))
        raise ConfigError(f"{option_name(field)}{value}{source}: {message}") from error


def limit_tokenizer_threads() -> None:
    """One thread for the pool inside `tokenizers`: the cores are the engine's. Call before any encode."""
    os.environ.update(POOL_ENVIRONMENT)

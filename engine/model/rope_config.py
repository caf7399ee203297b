"""The rotary position fields of ``config.json``: ``rope_theta``, ``rope_scaling``, ``rope_parameters``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import ConfigError, UnsupportedModelError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_NUMBERS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
)
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. ``original_max_position_embeddings`` is the length that scaling starts from.

    ``attention_factor`` multiplies cos and sin (yarn; 1 for the others).
    """

    type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def rope_from_dict(config: Mapping[str, object], max_position_embeddings: int) -> RopeConfig:
    """Read both ages of config. Precedence is that of transformers 5.24 (``modeling_rope_utils.py``).

    Raises UnsupportedModelError for an unknown type or parameter, ConfigError for nonsense.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    raw = config.get(name) or {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json: {name} must be an object")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in _TYPES:
        raise UnsupportedModelError(
            f"config.json: rope type {kind!r} is not computed; known: {', '.join(_TYPES)}"
        )
    values = _numbers(raw, name)
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor {values['partial_rotary_factor']} is not computed"
        )
    missing = [need for need in _NEEDS[kind] if need not in values]
    if missing:
        raise ConfigError(f"config.json: {name} of type {kind} needs {', '.join(missing)}")
    theta = values["rope_theta"] if "rope_theta" in values else _theta(config)
    original = _original_length(config, values, max_position_embeddings)
    factor = values.get("factor", 1.0)
    if kind == "yarn" and "factor" not in values:
        factor = max_position_embeddings / original
    truncate = raw.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"config.json: {name}.truncate must be true or false")
    return RopeConfig(
        type=cast(RopeType, kind),
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original if kind in ("llama3", "yarn") else max_position_embeddings,
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 1.0),
        beta_fast=values.get("beta_fast") or 32.0,
        beta_slow=values.get("beta_slow") or 1.0,
        attention_factor=_attention_factor(values, factor) if kind == "yarn" else 1.0,
        truncate=truncate,
    )


def _numbers(raw: Mapping[str, object], name: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for key, value in raw.items():
        if key in ("rope_type", "type", "truncate", "finetuned") or value is None:
            continue
        if key not in _NUMBERS:
            raise UnsupportedModelError(f"config.json: {name}.{key} is not computed")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"config.json: {name}.{key} {str(value)[:60]!r}: must be a finite number >= 0")
        values[key] = float(value)
    for key in ("factor", "rope_theta", "original_max_position_embeddings"):
        if values.get(key, 1.0) <= 0:
            raise ConfigError(f"config.json: {name}.{key} {values[key]}: must be above 0")
    return values


def _theta(config: Mapping[str, object]) -> float:
    value = config.get("rope_theta", 10000.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: rope_theta {str(value)[:60]!r}: must be a number above 0")
    return float(value)


def _original_length(config: Mapping[str, object], values: Mapping[str, float], default: int) -> int:
    outer = config.get("original_max_position_embeddings")
    if outer is not None:
        if isinstance(outer, bool) or not isinstance(outer, int) or outer < 1:
            raise ConfigError("config.json: original_max_position_embeddings must be a positive integer")
        return outer
    return int(values.get("original_max_position_embeddings", default))


def _attention_factor(values: Mapping[str, float], factor: float) -> float:
    """YaRN's scale of cos and sin (Peng et al. 2023, section 3.4; the mscale form is DeepSeek's)."""
    if "attention_factor" in values:
        return values["attention_factor"]
    mscale, of_all = values.get("mscale"), values.get("mscale_all_dim")
    if mscale and of_all:
        return _mscale(factor, mscale) / _mscale(factor, of_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

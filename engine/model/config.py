"""What a checkpoint's ``config.json`` says about the computation: every field that changes the result.

One decoder covers the Llama family, so families differ here only by defaults and by where a field lives.
A field that this decoder does not compute is refused by name unless its value is neutral.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedModelError
from ..records import KVSpec
from .rope_config import RopeConfig, rope_from_dict

_MAX_LAYERS = 4096  # a guard against a config that lies, not a limit of the decoder


@dataclass(frozen=True, slots=True)
class _Family:
    """How one architecture reads its config; defaults are those of transformers' config class."""

    model_type: str
    max_position_embeddings: int
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    always_qkv_bias: bool = False
    reads_attention_bias: bool = False
    biases_o_proj: bool = False  # whether attention_bias also gives o_proj one
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    windows: str = "none"  # "none" | "all" (Mistral) | "layers" (Qwen)


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        "llama", 2048, reads_attention_bias=True, biases_o_proj=True, reads_mlp_bias=True
    ),
    "MistralForCausalLM": _Family("mistral", 131072, num_kv_heads=8, windows="all"),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, num_kv_heads=32, always_qkv_bias=True, windows="layers"),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        32768,
        num_kv_heads=32,
        head_dim=128,
        reads_attention_bias=True,
        biases_o_proj=True,
        qk_norm=True,
        windows="layers",
    ),
}

# Read here or in rope_config, or known not to change the result of inference.
_KNOWN = frozenset(
    (
        "architectures",
        "attention_bias",
        "attention_dropout",
        "attn_dropout",
        "head_dim",
        "hidden_act",
        "hidden_dropout",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
    )
)

# Words in the name of a field that we do not know: it is refused unless its value is neutral.
_SUSPICIOUS = (
    "alibi",
    "bias",
    "chunk",
    "clip",
    "expert",
    "interleave",
    "multiplier",
    "no_rope",
    "norm",
    "parallel",
    "qk_",
    "query_pre_attn",
    "residual",
    "rope",
    "rotary",
    "scale",
    "scaling",
    "sink",
    "softcap",
    "soft_cap",
    "window",
)

# Known fields of relatives of this family, and the values with which they change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "attention_chunk_size": (None,),
    "kv_lora_rank": (None,),
    "q_lora_rank": (None,),
    "dual_chunk_attention_config": (None,),
    "position_embedding_type": (None, "rope", "rotary"),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "use_mrope": (None, False),
    "dim_model_base": (None,),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The decoder's shape. ``windows[i]``: how many tokens layer i looks back, its own counted; None: all."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @staticmethod
    def from_dict(config: Mapping[str, object]) -> "ModelConfig":
        """Read a parsed ``config.json`` of either age of transformers.

        Raises UnsupportedModelError for what this decoder does not compute, ConfigError for nonsense.
        """
        architecture, family = _family(config)
        _refuse_foreign_fields(config)
        hidden_size = _positive(config, "hidden_size")
        num_heads = _positive(config, "num_attention_heads")
        num_kv_heads = _positive(config, "num_key_value_heads", family.num_kv_heads or num_heads, num_heads)
        head_dim = _positive(config, "head_dim", family.head_dim or hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
                f"{num_kv_heads}"
            )
        if head_dim % 2:
            raise UnsupportedModelError(
                f"config.json: head_dim {head_dim}: rotary positions need an even one"
            )
        num_layers = _positive(config, "num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise ConfigError(f"config.json: num_hidden_layers {num_layers}: at most {_MAX_LAYERS}")
        max_positions = _positive(config, "max_position_embeddings", family.max_position_embeddings)
        attention_bias = _boolean(config, "attention_bias")
        if attention_bias and not family.reads_attention_bias and not family.always_qkv_bias:
            raise UnsupportedModelError(
                f"config.json: attention_bias true is not computed for {architecture}"
            )
        mlp_bias = _boolean(config, "mlp_bias")
        if mlp_bias and not family.reads_mlp_bias:
            raise UnsupportedModelError(f"config.json: mlp_bias true is not computed for {architecture}")
        return ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(config, "vocab_size"),
            max_position_embeddings=max_positions,
            rms_norm_eps=_epsilon(config),
            rope=rope_from_dict(config, max_positions),
            tie_word_embeddings=_boolean(config, "tie_word_embeddings"),
            qkv_bias=family.always_qkv_bias or attention_bias,
            o_bias=attention_bias and family.biases_o_proj,
            mlp_bias=mlp_bias,
            qk_norm=family.qk_norm,
            windows=_windows(config, family, num_layers),
        )

    def kv_specs(self, dtype: str) -> tuple[KVSpec, ...]:
        """One KV group per distinct window, in the order of their first layers. ``dtype`` of the cache."""
        groups: dict[int | None, list[int]] = {}
        for layer, window in enumerate(self.windows):
            groups.setdefault(window, []).append(layer)
        return tuple(
            KVSpec(tuple(layers), self.num_kv_heads, self.head_dim, window, dtype)
            for window, layers in groups.items()
        )


def _family(config: Mapping[str, object]) -> tuple[str, _Family]:
    named = config.get("architectures")
    model_type = config.get("model_type")
    if isinstance(named, list) and named:
        architecture = named[0]
    else:
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        architecture = by_type.get(model_type) if isinstance(model_type, str) else None
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"config.json: architectures {named!r} with model_type {model_type!r} is not computed; "
            f"use one of {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[architecture]
    if model_type not in (None, family.model_type):
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} does not go with {architecture} "
            f"(expected {family.model_type!r})"
        )
    return architecture, family


def _refuse_foreign_fields(config: Mapping[str, object]) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"config.json: hidden_act {config['hidden_act']!r}: only silu is computed"
        )
    for name, value in config.items():
        if name in _NEUTRAL:
            neutral = any(value is n or (type(value) is type(n) and value == n) for n in _NEUTRAL[name])
        elif name in _KNOWN or name == "quantization_config":
            continue
        else:
            neutral = not any(word in name for word in _SUSPICIOUS) or _changes_nothing(value)
        if not neutral:
            raise UnsupportedModelError(
                f"config.json: {name} {_short(value)} would change the result and is not computed"
            )


def _changes_nothing(value: object) -> bool:
    """Values of an unknown scale, switch or list that most likely mean "off"."""
    if isinstance(value, (dict, list, str)):
        return len(value) == 0
    return value is None or value is False or (not isinstance(value, bool) and value in (0, 1))


def _windows(config: Mapping[str, object], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    window = _window(config, 4096 if family.windows != "none" else None)
    if family.windows == "layers" and not _boolean(config, "use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if types is not None:
        return _windows_of_layer_types(types, family, window, num_layers)
    if family.windows == "none" and window is not None:
        raise UnsupportedModelError(
            f"config.json: sliding_window {window} is not computed for model_type {family.model_type}; "
            f"set it to null to attend to everything"
        )
    if family.windows == "layers":
        first = _natural(config, "max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return (window,) * num_layers


def _windows_of_layer_types(
    types: object, family: _Family, window: int | None, num_layers: int
) -> tuple[int | None, ...]:
    if not isinstance(types, list) or len(types) != num_layers:
        raise ConfigError(f"config.json: layer_types must be a list of {num_layers} names")
    windows: list[int | None] = []
    for layer, name in enumerate(types):
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"config.json: layer_types[{layer}] {_short(name)} is not computed")
        if name == "sliding_attention" and window is None:
            raise UnsupportedModelError(
                f"config.json: layer_types[{layer}] is sliding_attention but sliding_window is null or "
                f"use_sliding_window is false"
            )
        windows.append(window if name == "sliding_attention" else None)
    expected = {"none": {None}, "all": {window}}.get(family.windows)
    if expected is not None and set(windows) != expected:
        raise UnsupportedModelError(
            f"config.json: layer_types with mixed attention is not computed for {family.model_type}"
        )
    return tuple(windows)


def _window(config: Mapping[str, object], default: int | None) -> int | None:
    return (
        None
        if config.get("sliding_window", default) is None
        else _positive(config, "sliding_window", default)
    )


def _positive(
    config: Mapping[str, object], name: str, default: int | None = None, null_means: int | None = None
) -> int:
    """An int >= 1. An absent field is ``default``, an explicit null is ``null_means`` or the default."""
    value = config.get(name, default)
    if value is None:
        value = null_means if null_means is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"config.json: {name} {_short(value)}: must be a positive integer")
    return value


def _natural(config: Mapping[str, object], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config.json: {name} {_short(value)}: must be a natural number")
    return value


def _boolean(config: Mapping[str, object], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {name} {_short(value)}: must be true or false")
    return bool(value)


def _epsilon(config: Mapping[str, object]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"config.json: rms_norm_eps {_short(value)}: must be a number >= 0")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

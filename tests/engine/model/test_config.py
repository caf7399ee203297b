"""Reading config.json of both ages, and refusing by name what is not computed."""

from typing import Any

import pytest
from nybble.engine.errors import ConfigError, UnsupportedModelError
from nybble.engine.model.config import ModelConfig
from nybble.engine.model.rope_config import RopeConfig
from nybble.engine.records import KVSpec
from transformers import AutoConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
}


def read(base: dict[str, Any], **fields: Any) -> ModelConfig:
    return ModelConfig.from_dict(base | fields)


def test_defaults_are_those_of_transformers() -> None:
    for base in (LLAMA, MISTRAL, QWEN2, QWEN3):
        theirs = AutoConfig.for_model(**{k: v for k, v in base.items() if k != "architectures"})
        ours = read(base)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 4)
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.windows[0] == getattr(theirs, "sliding_window", None)


def test_biases_and_norms_by_family() -> None:
    plain = read(LLAMA)
    assert not any((plain.qkv_bias, plain.o_bias, plain.mlp_bias, plain.qk_norm))
    biased = read(LLAMA, attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias
    qwen2 = read(QWEN2)
    assert qwen2.qkv_bias
    assert not qwen2.o_bias
    qwen3 = read(QWEN3, attention_bias=True)
    assert qwen3.qk_norm
    assert qwen3.qkv_bias
    assert qwen3.o_bias
    assert not read(QWEN3).qkv_bias


def test_null_means_the_default() -> None:
    config = read(LLAMA, num_key_value_heads=None, head_dim=None, rope_scaling=None, sliding_window=None)
    assert (config.num_kv_heads, config.head_dim, config.rope.type) == (4, 16, "default")


def test_windows() -> None:
    assert read(MISTRAL).windows == (4096,) * 4
    assert read(MISTRAL, sliding_window=None).windows == (None,) * 4
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    assert read(QWEN2, sliding_window=8, max_window_layers=1).windows == (None,) * 4
    assert read(QWEN2, **sliding).windows == (None,) * 4  # max_window_layers 28
    assert read(QWEN2, **sliding, max_window_layers=3).windows == (None, None, None, 8)
    types = ["full_attention", "sliding_attention"] * 2
    assert read(QWEN3, **sliding, layer_types=types).windows == (None, 8, None, 8)


def test_kv_specs_group_layers_by_window() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    config = read(QWEN3, use_sliding_window=True, sliding_window=8, layer_types=types, head_dim=32)
    assert config.kv_specs("float16") == (
        KVSpec((0, 2), 2, 32, None, "float16"),
        KVSpec((1, 3), 2, 32, 8, "float16"),
    )


OLD_AND_NEW_ROPE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}},
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    (
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW_ROPE)
def test_both_ages_of_rope_settings_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert read(LLAMA, **old) == read(LLAMA, **new)
    theirs = AutoConfig.for_model(**{k: v for k, v in (LLAMA | old).items() if k != "architectures"})
    assert read(LLAMA, rope_parameters=theirs.rope_parameters) == read(LLAMA, **new)


def test_yarn_fills_in_what_is_not_given() -> None:
    rope = read(
        LLAMA,
        max_position_embeddings=2048,
        rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    ).rope
    assert isinstance(rope, RopeConfig)
    assert rope.factor == 4.0
    assert rope.attention_factor == pytest.approx(1.1386, abs=1e-4)
    outside = read(
        LLAMA, original_max_position_embeddings=256, rope_scaling={"type": "yarn", "factor": 2.0}
    ).rope
    assert outside.original_max_position_embeddings == 256


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    (LLAMA, {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}, "SmolLM3ForCausalLM"),
    (LLAMA, {"architectures": [], "model_type": "smollm3"}, "smollm3"),
    (LLAMA, {"model_type": "mistral"}, "model_type"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
    (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    (LLAMA, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1.0}}, "twist"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    (LLAMA, {"sliding_window": 128}, "sliding_window"),
    (LLAMA, {"logits_scaling": 8.0}, "logits_scaling"),
    (LLAMA, {"logit_scale": 0.0625}, "logit_scale"),
    (LLAMA, {"attention_multiplier": 0.0078125}, "attention_multiplier"),
    (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier"),
    (LLAMA, {"embedding_multiplier": 12}, "embedding_multiplier"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (LLAMA, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    (LLAMA, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
    (LLAMA, {"attention_chunk_size": 8192}, "attention_chunk_size"),
    (LLAMA, {"use_parallel_residual": True}, "use_parallel_residual"),
    (LLAMA, {"clip_qkv": 8.0}, "clip_qkv"),
    (LLAMA, {"use_qk_norm": True}, "use_qk_norm"),
    (LLAMA, {"is_causal": False}, "is_causal"),
    (LLAMA, {"kv_lora_rank": 512}, "kv_lora_rank"),
    (LLAMA, {"head_dim": 15}, "head_dim"),
    (LLAMA, {"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention"),
    (MISTRAL, {"attention_bias": True}, "attention_bias"),
    (MISTRAL, {"mlp_bias": True}, "mlp_bias"),
    (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
]


@pytest.mark.parametrize(("base", "fields", "named"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(
    base: dict[str, Any], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(base, **fields)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": -64}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_attention_heads": 128}, "head_dim"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("fields", "named"), NONSENSE)
def test_nonsense_is_a_config_error_that_names_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LLAMA, **fields)
    assert named in str(caught.value)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="intermediate_size"):
        ModelConfig.from_dict({k: v for k, v in LLAMA.items() if k != "intermediate_size"})


def test_inert_and_neutral_fields_pass() -> None:
    inert = {
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "pretraining_tp": 4,
        "bos_token_id": 1,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "partial_rotary_factor": 1.0,
        "logits_scaling": 1.0,
        "final_logit_softcapping": None,
        "no_rope_layers": None,
        "num_experts": 0,
        "use_parallel_residual": False,
        "hidden_act": "silu",
        "rope_interleaved": False,
        "is_llama_config": True,
        "_name_or_path": "somewhere",
    }
    assert read(LLAMA, **inert) == read(LLAMA)


def test_real_configs_of_transformers_are_read() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        assert ModelConfig.from_dict(AutoConfig.for_model(model_type).to_dict()).num_layers > 0

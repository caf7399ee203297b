"""The decoder against transformers on tiny random weights, one field of the configuration at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.model.decoder import Decoder, causal_attend
from nybble.engine.model.layers import Linear, RotaryEmbedding
from nybble.kernels import reference
from nybble.kernels.dispatch import Ops, Target
from nybble.kernels.layout import PackedWeight
from tiny_models import load_decoder, our_logits, tiny_transformer, transformers_logits

LENGTH = 60
TOLERANCE = 5e-5  # logits are of size 10 or so: fp32 rounding through three layers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Fields that leave the shapes of all weights alone: the base model's weights, another result.
SAME_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rms_norm_eps": 0.3}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 16}}),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 2.0}}),
    ("llama", {"rope_parameters": YARN | {"beta_slow": 0.25}}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
    ("llama", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
]
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("llama", {"head_dim": 32}),
    ("mistral", {"head_dim": 32}),
    ("qwen3", {"head_dim": 32}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"intermediate_size": 40}),
    ("llama", {"vocab_size": 33}),
]


def tokens(vocab_size: int = 97, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(5))


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return case[0] + "-" + ",".join(f"{k}={v}" for k, v in case[1].items())[:70]


@pytest.mark.parametrize("case", SAME_SHAPES, ids=name_of)
def test_a_field_changes_the_result_as_in_transformers(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    model_type, fields = case
    theirs = tiny_transformer(model_type, **fields)
    theirs.save_pretrained(tmp_path)
    expected = transformers_logits(theirs, tokens())
    without = dict(fields)
    if "rope_parameters" in fields and fields["rope_parameters"] not in (LLAMA3, YARN):
        family = fields["rope_parameters"]["rope_type"]
        without = {"rope_parameters": {"llama3": LLAMA3, "yarn": YARN}.get(family)}
    else:
        without = {"sliding_window": 20} if model_type == "mistral" else {}
    base = transformers_logits(tiny_transformer(model_type, **without), tokens())
    assert (expected - base).abs().max() > 1e-2, "the case does not exercise its field"
    actual = our_logits(load_decoder(tmp_path), tokens())
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", SHAPES, ids=name_of)
def test_a_shape_is_computed_as_in_transformers(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    model_type, fields = case
    theirs = tiny_transformer(model_type, **fields)
    theirs.save_pretrained(tmp_path)
    token_ids = tokens(fields.get("vocab_size", 97))
    actual = our_logits(load_decoder(tmp_path), token_ids)
    torch.testing.assert_close(actual, transformers_logits(theirs, token_ids), atol=TOLERANCE, rtol=TOLERANCE)


def test_dynamic_rope_beyond_the_trained_length_is_that_of_token_by_token_generation(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    theirs = tiny_transformer("llama", max_position_embeddings=24, rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    prompt = tokens(length=20)
    generated = theirs.generate(
        prompt[None],
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = torch.cat(generated.logits)
    actual = our_logits(load_decoder(tmp_path), generated.sequences[0][:-1])[19:]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    plain = tiny_transformer("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    base = transformers_logits(plain, generated.sequences[0][:-1])[19:]
    assert (base - expected).abs().max() > 1e-2, "the stretch does nothing here"


def test_several_sequences_in_one_pass_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_transformer("llama").save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    parts = tokens().split([25, 1, 34])
    attend = causal_attend(decoder.config, decoder.ops, [25, 1, 34])
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    with torch.no_grad():
        together = decoder.logits(decoder(tokens(), positions, attend))
    apart = torch.cat([our_logits(decoder, part) for part in parts])
    torch.testing.assert_close(together, apart, atol=TOLERANCE, rtol=TOLERANCE)


def random_weights(decoder: Decoder) -> dict[str, Linear | torch.Tensor]:
    """Leaf tensors that want gradients, in the shapes of ``decoder``, through the reference linear."""
    config, generator = decoder.config, torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).requires_grad_()

    def linear(out_features: int, in_features: int) -> Linear:
        return Linear([reference.DenseLinear(leaf(out_features, in_features), None)])

    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    weights: dict[str, Linear | torch.Tensor] = {
        "model.embed_tokens": leaf(config.vocab_size, config.hidden_size),
        "model.norm": leaf(config.hidden_size),
        "lm_head": linear(config.vocab_size, config.hidden_size),
    }
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        weights[layer + "input_layernorm"] = leaf(config.hidden_size)
        weights[layer + "post_attention_layernorm"] = leaf(config.hidden_size)
        weights[layer + "self_attn.q_norm"] = leaf(config.head_dim)
        weights[layer + "self_attn.k_norm"] = leaf(config.head_dim)
        weights[layer + "self_attn.qkv_proj"] = linear(heads + 2 * kv_heads, config.hidden_size)
        weights[layer + "self_attn.o_proj"] = linear(config.hidden_size, heads)
        weights[layer + "mlp.gate_up_proj"] = linear(2 * config.intermediate_size, config.hidden_size)
        weights[layer + "mlp.down_proj"] = linear(config.hidden_size, config.intermediate_size)
    return weights


def test_gradients_are_those_of_the_reference_ops(tmp_path: Path) -> None:
    tiny_transformer("qwen3", head_dim=16, num_hidden_layers=2).save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path)
    config = replace(loaded.config, windows=(None, 9))
    names = ("embedding", "rms_norm", "add_rms_norm", "rope", "silu_and_mul", "kv_write")
    plain = Ops(
        *(getattr(reference, name) for name in names), reference.paged_attention, reference.causal_attention
    )
    gradients = []
    for ops in (Ops.resolve(Target()), plain):
        weights = random_weights(loaded)
        decoder = Decoder(config, weights, ops)
        hidden = decoder(tokens(), torch.arange(LENGTH), causal_attend(config, ops, [LENGTH]))
        decoder.logits(hidden).log_softmax(-1)[:, 0].sum().backward()
        leaves = [
            w if isinstance(w, torch.Tensor) else part.weight
            for w in weights.values()
            for part in ([w] if isinstance(w, torch.Tensor) else w.parts)
        ]
        assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_angles_at_long_positions_keep_their_precision(tmp_path: Path) -> None:
    tiny_transformer("llama").save_pretrained(tmp_path)
    config = load_decoder(tmp_path).config
    where = torch.tensor([0, 1, 127, 131071])
    cos, sin = RotaryEmbedding(config)(where)
    # transformers multiplies in fp32: the oracle is its formula, not float64's angle.
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    angle = where[:, None].float() * frequencies
    torch.testing.assert_close(cos[:, 0, :8], angle.cos())
    torch.testing.assert_close(cos[:, 0, 8:], angle.cos())
    torch.testing.assert_close(sin[:, 0, :8], -angle.sin())
    torch.testing.assert_close(sin[:, 0, 8:], angle.sin())


def test_unfused_parts_are_concatenated() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 8, generator=generator) for n in (3, 5))
    target = Target(dtype=torch.float32)
    apart = Linear([reference.linear.repack(PackedWeight(w), target) for w in (first, second)])
    fused = Linear.build([PackedWeight(first), PackedWeight(second)], target)
    x = torch.randn(4, 8, generator=generator)
    assert len(apart.parts) == 2
    assert len(fused.parts) == 1
    assert apart.nbytes == fused.nbytes == 4 * 8 * 8
    torch.testing.assert_close(apart(x), fused(x))
    torch.testing.assert_close(fused(x), x @ torch.cat([first, second]).T)

"""Options that contradict each other, or that a method would ignore, are refused by name."""

from typing import Any

import pytest
from nybble.engine.errors import ConfigError
from nybble.engine.quantize.options import USERS, QuantizeOptions
from nybble.engine.quantize.storage import general_spec


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "rtn", "awq_steps": 3}, "--awq-steps 3: has no effect with --method rtn, only with awq"),
        ({"prune": "wanda"}, "--prune wanda: has no effect with --method gptq"),
        ({"method": "awq", "static_groups": True}, "--static-groups True: has no effect with --method awq"),
        ({"base": "rtn"}, "--base rtn: has no effect with --method gptq, only with requant or gwq"),
        ({"method": "yaqa", "damping": 0.1}, "--damping 0.1: has no effect with --method yaqa"),
        ({"seed": 1 << 63}, f"--seed {1 << 63}: must be from 0 to"),
        ({"seed": -1}, "--seed -1: must be from 0 to"),
        (
            {"method": "requant", "budget_bits": 5, "checkpoint_format": "awq"},
            "--checkpoint-format awq cannot hold every choice; use gptq or gptq_v2",
        ),
        ({"bits": 3, "checkpoint_format": "awq"}, "--bits 3: --checkpoint-format awq holds 4 bits only"),
        (
            {"actorder": "group", "checkpoint_format": "awq", "symmetric": False},
            "--checkpoint-format awq stores no order of inputs; use --checkpoint-format gptq_v2, or another",
        ),
        ({"report": False, "eval_tokens": 5}, "--eval-tokens: has no effect without --report; leave it out"),
        ({"report": False, "max_nll_increase": 0.0}, "--max-nll-increase: has no effect without --report"),
        ({"max_nll_increase": -0.1}, "--max-nll-increase -0.1: must be a number, 0 or more"),
        ({"max_nll_increase": float("nan")}, "--max-nll-increase nan: must be a number, 0 or more"),
        ({"transform": "rotate"}, "--transform rotate: use none, awq or smoothquant"),
        ({"smooth_alpha": 1.5}, "--smooth-alpha 1.5: must be from 0 to 1"),
        ({"smooth_alpha": 0.7}, "--smooth-alpha 0.7: has no effect without --transform smoothquant"),
        ({"bits": 16}, "--bits 16: use 2, 3, 4 or 8 (16, nothing rounded, is for sparse24)"),
        ({"method": "sparse24", "bits": 16, "checkpoint_format": "gptq"}, "holds no 2:4 floats"),
        ({"dynamic": {"(": {}}}, "--dynamic '(': is no regular expression"),
        ({"dynamic": {"a": {"bits": 5}}}, "--dynamic 'a': bits 5: use bits (2, 3, 4 or 8)"),
        ({"dynamic": {"a": {"group_size": True}}}, "--dynamic 'a': group_size True"),
        ({"dynamic": {"a": {"desc": 1}}}, "--dynamic 'a': desc 1"),
        ({"dynamic": {"a": 4}}, "--dynamic 'a': expected an object"),
        ({"dynamic": "a.json"}, "--dynamic a.json: expected an object"),
    ],
)
def test_mistakes_name_the_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizeOptions("a", "b", **given)
    assert message in caught.value.message


def test_a_base_may_use_its_options() -> None:
    QuantizeOptions("a", "b", method="requant", base="awq", awq_steps=5)
    with pytest.raises(ConfigError, match="--awq-steps 5: has no effect"):
        QuantizeOptions("a", "b", method="requant", base="rtn", awq_steps=5)


def test_a_transform_has_its_options() -> None:
    QuantizeOptions("a", "b", transform="awq", awq_steps=5)
    QuantizeOptions("a", "b", transform="smoothquant", smooth_alpha=0.6)


def test_every_user_table_entry_is_an_option() -> None:
    assert set(USERS) <= set(QuantizeOptions.__dataclass_fields__)


def test_static_groups_need_no_g_idx() -> None:
    options = QuantizeOptions("a", "b", actorder="group", static_groups=True)
    assert general_spec(options).actorder == "none"
    assert general_spec(QuantizeOptions("a", "b", actorder="group")).actorder == "group"
    assert general_spec(QuantizeOptions("a", "b", actorder="gar")).actorder == "none"


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        ({}, "gptq"),
        ({"symmetric": False}, "gptq_v2"),
        ({"method": "sparse24", "bits": 16}, "compressed-tensors"),
        ({"checkpoint_format": "awq"}, "awq"),
    ],
)
def test_the_format_follows(given: dict[str, Any], storage: str) -> None:
    assert QuantizeOptions("a", "b", **given).storage == storage


def test_the_format_that_asymmetric_weights_are_stored_in() -> None:
    """Also where only some modules are asymmetric; a format that was asked for stays."""
    some = {"a": {"bits": 8}, "b": {"symmetric": False}}
    assert QuantizeOptions("a", "b").storage == "gptq"
    assert QuantizeOptions("a", "b", symmetric=False).storage == "gptq_v2"
    assert QuantizeOptions("a", "b", dynamic=some).storage == "gptq_v2"
    asked = QuantizeOptions("a", "b", dynamic=some, checkpoint_format="gptq")
    assert (asked.storage, general_spec(asked).least_zero) == ("gptq", 1)
    assert general_spec(QuantizeOptions("a", "b", dynamic=some)).least_zero == 0

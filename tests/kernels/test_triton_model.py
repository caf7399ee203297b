"""A whole quantized model through scheduler, pages and sampler over GPU kernels: the reference's tokens.

Without a GPU the kernels are interpreted; ``make gpu-check`` begins with the built-in model on the device.
"""

from pathlib import Path

import pytest
import torch
from format_models import random_weight, write_model
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.formats.registry import get_format
from nybble.engine.records import SamplingParams, SequenceOutput
from nybble.kernels.layout import QuantSpec
from tiny_models import engine_over

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: make gpu-check runs a model on it", allow_module_level=True)

import triton_interpreter  # noqa: E402
from interpreted_model import load_interpreted  # noqa: E402

PROMPTS = [[5, 9, 33, 4], [60], list(range(3, 40))]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize(
    ("architecture", "dtype", "bits", "act_order"),
    [
        ("sm_80", torch.float16, 4, True),
        ("sm_90", torch.bfloat16, 8, False),
        ("gfx942", torch.float16, 4, False),
    ],
)
def test_gives_the_references_tokens(
    architecture: str, dtype: torch.dtype, bits: int, act_order: bool, tmp_path: Path
) -> None:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "desc_act": act_order,
        "sym": not act_order,
    }
    spec = QuantSpec(bits, 32, not act_order, "group" if act_order else "none")
    write_model(tmp_path, get_format(config), lambda name, shape, seed: random_weight(shape, spec, seed))
    exact, _ = build_engine(
        EngineConfig(str(tmp_path), "cpu", "float32", cpu_kernels="torch"), lambda *_: None
    )
    expected = exact.generate(PROMPTS, GREEDY)

    decoder, loaded = load_interpreted(tmp_path, dtype, architecture)
    kernels = {layer.kernel for layer in loaded.report.layers if layer.spec is not None}
    assert kernels == {"triton-low-bit"}
    before = triton_interpreter.accesses()["load"]
    with triton_interpreter.poisoned_memory():
        found = engine_over(decoder, max_model_len=64).generate(PROMPTS, GREEDY)
    assert triton_interpreter.accesses()["load"] > before
    assert [o.token_ids for o in found] == [o.token_ids for o in expected], gaps(expected)


def gaps(outputs: list[SequenceOutput]) -> str:
    """How far apart the reference's two best tokens were, at the closest."""
    least = [min(t.top_logprobs[0] - t.top_logprobs[1] for t in output.logprobs or []) for output in outputs]
    return f"least gaps of the reference: {least}"

"""GWQ: what has the largest gradients stays exact, in each linear."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.quantize.awq import AWQScaling
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gptq import GPTQ
from nybble.engine.quantize.gwq import GWQ
from nybble.engine.quantize.outliers import kept, largest
from nybble.engine.quantize.pipeline import Recipe
from nybble.engine.quantize.rtn import RTN
from nybble.engine.quantize.sensitivity import before, plain_gradients
from nybble.engine.quantize.source import Source
from nybble.engine.quantize.store import Store
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import QuantSpec
from tiny_sequences import SEQUENCES


@pytest.mark.parametrize("base", [Recipe(RTN(0.0)), Recipe(GPTQ()), Recipe(RTN(0.0), AWQScaling())])
def test_the_largest_gradients_stay(base: Recipe, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama", num_hidden_layers=2)
    with Source(folder) as source, Store() as store:
        specs = {part.name: QuantSpec(2, 32, False) for _, part in source.parts()}
        work = Work.on(source, specs, Calibration(SEQUENCES, "random", ""), tmp_path / "work")
        gradients = plain_gradients(work, store, 3)
        for block in GWQ(base, 0.02, 3).run(work):
            weights = before(work, block)
            for module in block.modules:
                assert module.weight is not None
                mask = kept(module.weight)
                assert int(mask.sum()) == round(0.02 * mask.numel())
                if base.transform is None:
                    expected = largest(gradients[module.name], 0.02)
                    assert expected is not None
                    assert float((mask & expected).sum()) > 0.98 * float(mask.sum())  # equal gradients
                if not base.needs_inputs:
                    values, original = module.weight.dequantize()[mask], weights[module.name][mask]
                    torch.testing.assert_close(values, original, rtol=2e-3, atol=5e-4)

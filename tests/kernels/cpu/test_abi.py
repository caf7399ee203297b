"""Machine code that was compiled once is not compiled again."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba.core import config
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu import paged_attention, recorder
from nybble.kernels.cpu.abi import compile_kernel, use_cache
from nybble.kernels.cpu.atomics import atomic_add
from nybble.kernels.cpu.isa import AVX2
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from tape_models import low_bit_tape_model

ISA = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels="auto"))
pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI")


def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind of a model's kernels, made anew as a process makes them: some close over functions."""
    assert ISA is not None
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def get(self: recorder.Kernels, make: Any, *traits: Any) -> Any:
        wanted.setdefault(make.__name__, (make, traits))
        return SimpleNamespace(address=0, ctypes=SimpleNamespace(data=0))

    monkeypatch.setattr(recorder.Kernels, "get", get)
    low_bit_tape_model(ISA, 1).close()
    assert "attention_kernel" in wanted
    monkeypatch.setattr(config, "CACHE_DIR", "")  # put back afterwards
    folder = use_cache(tmp_path)

    def start() -> list[int]:
        made = [compile_kernel(make(*traits), (name, *traits)) for name, (make, traits) in wanted.items()]
        return [kernel.cache_hits for kernel in made]

    assert start() == [0] * len(wanted)
    stored = sorted(folder.rglob("*"))
    assert start() == [1] * len(wanted)
    assert sorted(folder.rglob("*")) == stored


def test_without_traits_what_a_kernel_closes_over_tells_it_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adding(number: int) -> Any:
        def kernel(args, thread, num_threads):
            atomic_add(args, number)

        return kernel

    monkeypatch.setattr(config, "CACHE_DIR", "")
    use_cache(tmp_path)
    total = np.zeros(1, np.int64)
    for number in (1, 10, 1):
        compile_kernel(adding(number)).ctypes(total.ctypes.data, 0, 1)
    assert total[0] == 12
    with pytest.raises(AssertionError, match="taken for one another"):
        compile_kernel(adding(1), ())


def test_functions_of_two_kernels_that_are_not_the_same_have_other_names() -> None:
    """The linker takes the first of a name; the counter in numba's names begins anew in every process."""

    def names(*traits: int) -> set[str]:
        kernel = compile_kernel(paged_attention.attention_kernel(*traits), traits)
        found = re.findall(r'^define [^@]*@"?([^"( ]+)', kernel.inspect_llvm(), re.MULTILINE)
        return {re.sub(r"B\d+v\d+", "", name) for name in found}

    first, second = names(AVX2, 1, 2, 32, 16), names(AVX2, 1, 4, 32, 16)
    for helper in ("attention_kernel", "span_chunk", "span_scores"):
        assert any(helper in name for name in first), helper
        assert not any(helper in name for name in first & second), helper

"""What ``make gpu-check`` runs on a machine with a GPU: is it right, then how fast. Under 8 minutes.

1. The built-in 4-bit model, whole, on the device: greedy tokens equal those of fp32 on the CPU, up to a near
   tie in each text; at least three quarters of all tokens must have been compared.
2. The tests marked gpu, with fresh random inputs: the metadata order of sparse MMA first (not on AMD's, which
   have none), then every kind of weight against float64. They are stopped when the time is over.
3. benchmarks/kernels.py, with what is left of the time.

No install: torch, triton, transformers, tokenizers, safetensors, numpy, pytest and what is here are all it
imports. ``--rehearse`` goes through all of it on a CPU with interpreted kernels. Exit code 0 only if a GPU
(or the rehearsal) was there and everything passed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = ROOT / ".cache" / "ns"
HELPERS = ROOT / "tests" / "helpers"
MODEL = ROOT / "engine" / "demo" / "gptq-4bit-g64"
SECONDS = 450  # of the eight minutes
NEAR_TIE = 0.05  # nats between the reference's two best tokens: fp16's noise on the logits is 0.01
LEAST = 0.75  # of the tokens compared: the reference's near ties, all in the third text, leave 146 of 192
OPENINGS = (
    "Once upon a time, there was a little girl named Lily who lived in a small house near the big forest.",
    "Tom and his dog went to the park.",
    "The old man was sad because",
)


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-bench", action="store_true", help="only whether it is right")
    rehearsal = os.environ.get("REHEARSE") == "1"
    parser.add_argument(
        "--rehearse", action="store_true", default=rehearsal, help="on a CPU, with interpreted kernels"
    )
    options = parser.parse_args()
    started = time.monotonic()
    prepare(options.rehearse)
    if not options.rehearse and not describe_gpu():
        return 2
    seed = time.time_ns() % 1_000_000_007
    print(f"gpu-check: fresh inputs by NYBBLE_TEST_SEED={seed}", flush=True)
    failed = []
    for name, step in (("model", check_model), ("tests", run_tests), ("benchmarks", run_benchmarks)):
        if name == "benchmarks" and (options.no_bench or failed):
            continue
        began = time.monotonic()
        left = SECONDS - (began - started)
        passed = step(options.rehearse, seed, left)
        print(
            f"gpu-check: {name}: {'pass' if passed else 'FAIL'} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if not passed:
            failed.append(name)
    return 1 if failed else 0


def prepare(rehearse: bool) -> None:
    """Our package under its name, and the interpreter for a rehearsal; before triton is imported."""
    NAMESPACE.mkdir(parents=True, exist_ok=True)
    if not (NAMESPACE / "nybble").exists():
        (NAMESPACE / "nybble").symlink_to(Path("..", ".."), target_is_directory=True)
    sys.path[:0] = [str(NAMESPACE), str(HELPERS)]
    before = os.environ.get("PYTHONPATH")
    ours = [str(NAMESPACE), str(HELPERS), str(ROOT / "scripts")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), *ours])
    os.environ["TRITON_INTERPRET"] = os.environ["REHEARSE"] = "1" if rehearse else "0"


def describe_gpu() -> bool:
    """Say what is here; False where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        print(
            f"gpu-check: torch {torch.__version__} ({build}) sees no CUDA device; nothing was checked. "
            "With a CUDA build of torch in another Python: make gpu-check GPU_PYTHON=/path/to/python; "
            "on a CPU: make gpu-check ARGS=--rehearse",
            file=sys.stderr,
        )
        return False
    import triton

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"gpu-check: {torch.cuda.get_device_name()}, sm {capability}, {versions}")
    return True


def check_model(rehearse: bool, seed: int, left: float) -> bool:
    """Greedy tokens of the device against fp32 on the CPU."""
    from nybble.engine.build import build_engine
    from nybble.engine.config import EngineConfig
    from nybble.engine.records import SamplingParams
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = [tokenizer.encode(opening).ids for opening in OPENINGS]
    params = SamplingParams(max_tokens=2 if rehearse else 64, temperature=0.0, ignore_eos=True, logprobs=2)
    exact, _ = build_engine(EngineConfig(str(MODEL), "cpu", "float32", cpu_kernels="torch"), lambda *_: None)
    expected = exact.generate(prompts, params)
    if rehearse:
        from interpreted_model import load_interpreted
        from tiny_models import engine_over
        from torch import float16

        decoder, loaded = load_interpreted(MODEL, float16, "sm_90")
        engine, kernels = engine_over(decoder), {layer.kernel for layer in loaded.report.layers}
    else:
        engine, info = build_engine(EngineConfig(str(MODEL), "cuda", "float16"), lambda *_: None)
        kernels = {info.kernel}
    print(f"gpu-check: linears by {', '.join(sorted(kernels))}")
    found = engine.generate(prompts, params)
    checks = [same(*pair) for pair in zip(expected, found, strict=True)]
    compared, wanted = sum(count for _, count in checks), len(prompts) * params.max_tokens
    print(f"gpu-check: {compared} of {wanted} tokens compared, {LEAST * wanted:.0f} must be")
    enough = compared >= LEAST * wanted
    return all(right for right, _ in checks) and enough and any(n.startswith("triton") for n in kernels)


def same(expected: Any, found: Any) -> tuple[bool, int]:
    """Whether tokens are the same up to a near tie of the reference, and how many were before it."""
    for place, (wanted, got) in enumerate(zip(expected.token_ids, found.token_ids, strict=True)):
        if wanted != got:
            best = expected.logprobs[place]
            gap = best.top_logprobs[0] - best.top_logprobs[1]
            print(
                f"gpu-check: token {place}: {got} for {wanted}, the reference's two best are {gap:.3f} apart"
            )
            return gap < NEAR_TIE and got == best.top_ids[1], place
    return True, len(expected.token_ids)


def run_tests(rehearse: bool, seed: int, left: float) -> bool:
    """The tests marked gpu; in a rehearsal those that stand for them. Stopped after ``left`` seconds."""
    tests = ROOT / "tests" / "kernels"
    files = [str(tests / name) for name in ("test_triton_device.py", "test_triton_matrix.py")]
    chosen = ["-k", "as_emulated or (test_interpreted and sm_90)"] if rehearse else ["-m", "gpu"]
    # Our own settings name plug-ins that may be missing here.
    settings = ["-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *settings, *chosen, *files]
    environment = os.environ | {"NYBBLE_TEST_SEED": str(seed), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=max(left, 1))
    except subprocess.TimeoutExpired:
        print(f"gpu-check: the tests did not end in the {left:.0f} s that were left", flush=True)
        return False
    return done.returncode == 0


def run_benchmarks(rehearse: bool, seed: int, left: float) -> bool:
    """What is left of the time goes to the benchmark, which begins no shape after it."""
    script = str(ROOT / "benchmarks" / "kernels.py")
    command = [sys.executable, script, "--budget", str(max(10, left - 60))]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

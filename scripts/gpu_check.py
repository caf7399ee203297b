"""What ``make gpu-check`` runs on a machine with an NVIDIA GPU: the tests marked gpu, the kernel benchmarks.

Exit code 0 only if a GPU was there, at least one test ran, and all passed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
NO_TESTS_RAN = 5  # pytest's exit code


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-bench", action="store_true", help="only the tests")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        print(
            f"gpu-check: torch {torch.__version__} ({build}) sees no CUDA device; nothing was checked. "
            "On a machine with one, NYBBLE_TORCH=cuda make gpu-check installs a CUDA build",
            file=sys.stderr,
        )
        return 2
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"gpu-check: {torch.cuda.get_device_name()}, sm {capability}, torch {torch.__version__}")
    code = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=ROOT, check=False).returncode
    if code == NO_TESTS_RAN:
        print("gpu-check: no test is marked gpu yet; nothing was checked", file=sys.stderr)
    benchmark = ROOT / "benchmarks" / "kernels.py"
    if code == 0 and not options.no_bench and benchmark.exists():
        code = subprocess.run([sys.executable, str(benchmark)], cwd=ROOT, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())

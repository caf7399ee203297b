"""What every test may use."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

# Before torch is imported: threads that spin at a barrier make every test slow on a busy machine (50 x seen).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a worker already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before triton is imported: without a GPU its kernels are interpreted (tests/helpers/triton_interpreter.py).
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, which is also the package's folder."""
    return ROOT


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Every file that belongs to the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    return sorted(path for line in listing.stdout.splitlines() if (path := root / line).is_file())


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment for a child Python: ours, without this checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return environment | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def pytest_configure(config: pytest.Config) -> None:
    """Markers, in one place."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; make gpu-check runs these")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

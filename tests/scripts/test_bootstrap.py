"""The choice of torch's build, and the remedies for Pythons that will not do."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.py"
OFFERED = [
    "2.15.0",
    "2.14.1",
    "2.13.0+cpu",
    "2.13.0",
    "2.12.1",
    "2.11.0",
    "2.10.0+cpu",
    "2.14.0rc1",
    "2.13.1.dev1",
]
RANGE = "torch>=2.11,<2.14"


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_cpu_build_in_range(bootstrap: ModuleType) -> None:
    assert bootstrap.choose_version(OFFERED, RANGE, "cpu") == "2.13.0+cpu"
    assert bootstrap.choose_version(["2.12.0+cpu", "2.9.0+cpu", "2.13.0"], RANGE, "cpu") == "2.12.0+cpu"
    assert bootstrap.choose_version(["2.13.0", "2.14.0+cpu", "2.10.0+cpu"], RANGE, "cpu") is None


def test_cuda_never_takes_a_cpu_build(bootstrap: ModuleType) -> None:
    assert bootstrap.choose_version(OFFERED, RANGE, "cuda") == "2.13.0"
    assert bootstrap.choose_version(["2.13.0+cpu", "2.13.0", "2.13.0+cu130"], RANGE, "cuda") == "2.13.0+cu130"
    assert bootstrap.choose_version(["2.13.0+cpu"], RANGE, "cuda") is None


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.11", True), ("2.11.0", True), ("2.10.9", False), ("2.13.9+cpu", True), ("2.14", False),
     ("2.12.0.post1", True), ("2.12.0rc1", False)],
)  # fmt: skip
def test_bounds(bootstrap: ModuleType, version: str, fits: bool) -> None:
    assert bootstrap.in_range(version, RANGE) is fits


def test_the_requirement_comes_from_pyproject(bootstrap: ModuleType) -> None:
    assert bootstrap.torch_requirement().startswith("torch>=2.")
    names = [r.split(">")[0].split("[")[0] for r in bootstrap.image_requirements("cpu")]
    assert "triton" not in names
    assert {"torch", "numba", "fastapi"} <= set(names)
    assert any(r.startswith("triton") for r in bootstrap.image_requirements("cuda"))


def test_the_variable_decides(bootstrap: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.wanted_torch({}, driver=False) == "cpu"
    assert bootstrap.wanted_torch({}, driver=True) == "cuda"
    assert bootstrap.wanted_torch({"NYBBLE_TORCH": "auto"}, driver=True) == "cuda"
    assert bootstrap.wanted_torch({"NYBBLE_TORCH": "cpu"}, driver=True) == "cpu"
    assert bootstrap.wanted_torch({"NYBBLE_TORCH": "cuda"}, driver=False) == "cuda"
    with pytest.raises(SystemExit) as ending:
        bootstrap.wanted_torch({"NYBBLE_TORCH": "rocm"}, driver=False)
    assert ending.value.code == 2
    assert capsys.readouterr().err == "bootstrap: NYBBLE_TORCH=rocm: use auto, cpu or cuda\n"


class FakeInstaller:
    """Records what would be installed; ``versions`` are those that the index offers."""

    def __init__(self, bootstrap: ModuleType, versions: list[str], cuda: bool) -> None:
        self.index = ["--extra-index-url", "file:///index"]
        self.installed: list[tuple[str, ...]] = []
        self._versions = versions
        self._cuda = cuda
        self.run = bootstrap.Installer.install_torch

    def versions(self, name: str) -> list[str]:
        assert name == "torch"
        return self._versions

    def pulls_cuda(self, requirement: str) -> bool:
        return self._cuda

    def install(self, *arguments: str) -> None:
        self.installed.append(arguments)


@pytest.mark.parametrize(
    ("versions", "cuda", "wanted", "installed", "warns"),
    [
        (OFFERED, True, "cpu", "torch===2.13.0+cpu", False),
        (OFFERED, True, "cuda", "torch===2.13.0", False),
        (["2.13.0"], True, "cpu", RANGE, True),  # only CUDA is offered: taken, with a warning
        (["2.13.0"], False, "cpu", RANGE, False),  # a platform whose plain build is a CPU build
        (["2.13.0+cpu"], False, "cuda", RANGE, True),
    ],
)
def test_what_is_installed(
    bootstrap: ModuleType, capsys: pytest.CaptureFixture[str], versions: list[str], cuda: bool, wanted: str,
    installed: str, warns: bool,
) -> None:  # fmt: skip
    fake = FakeInstaller(bootstrap, versions, cuda)
    fake.run(fake, wanted)
    assert fake.installed == [("--extra-index-url", "file:///index", installed)]
    said = capsys.readouterr().out
    assert ("warning" in said and "TORCH_INDEX" in said) is warns


def test_an_old_python_gets_a_remedy(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit) as ending:
        bootstrap.main([])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "3.9 is too old" in error
    assert "make PYTHON=python3.11" in error


def test_a_stamp_makes_the_second_call_do_nothing(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(bootstrap, "make_venv", lambda venv: calls.append("venv"))
    monkeypatch.setattr(bootstrap.Installer, "install_torch", lambda self, wanted: calls.append("torch"))
    monkeypatch.setattr(bootstrap.Installer, "install", lambda self, *a: calls.append(a))
    monkeypatch.delenv("NYBBLE_TORCH", raising=False)
    base, dev = ["--venv", str(tmp_path)], ["--venv", str(tmp_path), "--extras", "dev"]
    bootstrap.main(dev)
    assert calls == ["venv", "torch", ("--editable", f"{bootstrap.ROOT}[dev]")]
    bootstrap.main(dev)
    bootstrap.main(base)  # a subset of what is there
    assert len(calls) == 3
    monkeypatch.setenv("NYBBLE_TORCH", "cuda")
    bootstrap.main(base)
    assert len(calls) == 6
    assert json.loads((tmp_path / ".nybble-installed.json").read_text())["extras"] == []


def test_it_parses_on_old_pythons() -> None:
    """Syntax up to Python 3.8, so that such an interpreter prints the remedy and not a traceback."""
    import ast

    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_help() -> None:
    done = subprocess.run(["python3", str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--extras" in done.stdout

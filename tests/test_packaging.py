"""The wheel: complete, alone in site-packages, and able to serve."""

import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from source_tree import modules
from waiting import answers, complete, until

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, tracked: list[Path]) -> Path:
    """The wheel of the repository's files, built without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("nybble-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, where the dependencies are those of this environment."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A folder named in a .pth file joins the path, but its own .pth files (an editable nybble) are not read.
    dependencies = sysconfig.get_paths()["purelib"]
    site_packages(home).joinpath("dependencies.pth").write_text(dependencies + "\n", encoding="utf-8")
    return home


def site_packages(home: Path) -> Path:
    """The site-packages of an environment."""
    (folder,) = home.glob("lib/python*/site-packages")
    return folder


def test_only_nybble_is_installed(installed: Path) -> None:
    record = next(site_packages(installed).glob("nybble-*.dist-info/RECORD")).read_text(encoding="utf-8")
    tops = {line.split("/")[0] for line in record.splitlines() if not line.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nybble"}
    assert any("licenses/LICENSE" in line for line in record.splitlines())


def test_every_file_of_the_package_is_in_the_wheel(installed: Path, tracked: list[Path]) -> None:
    """Modules, the demo model, calibration text, tuned tables: what is in the folders is in the wheel."""
    package = site_packages(installed) / "nybble"
    relative = [path.relative_to(ROOT) for path in tracked]
    ours = [p for p in relative if p.parts[0] in ("server", "engine", "kernels") or str(p) == "py.typed"]
    assert [str(p) for p in ours if not (package / p).is_file()] == []


def test_every_module_imports(installed: Path, child_environment: dict[str, str]) -> None:
    names = [f"nybble.{name}" for name in modules() if not name.startswith("kernels.triton")]
    script = (
        "import importlib, sys, pathlib\n"
        "home = pathlib.Path(sys.prefix)\n"
        "for name in sys.argv[1:]:\n"
        "    file = importlib.import_module(name).__file__\n"
        "    assert pathlib.Path(file).is_relative_to(home), file\n"
        "for name in ('server', 'engine', 'kernels'):\n"
        "    try: found = importlib.import_module(name).__file__\n"
        "    except ModuleNotFoundError: continue\n"
        "    assert 'nybble' not in str(found) and name == 'kernels', found\n"
    )
    command = [installed / "bin" / "python", "-c", script, *names]
    done = subprocess.run(
        command, env=child_environment, cwd=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_serves(
    installed: Path, child_environment: dict[str, str], free_port: int, tmp_path: Path
) -> None:
    """``nybble serve`` without a model, from the wheel alone, answers a completion and leaves on SIGTERM."""
    log = tmp_path / "log"
    command = [installed / "bin" / "nybble", "serve", "--port", str(free_port), "--drain-delay", "0"]
    url = f"http://127.0.0.1:{free_port}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, env=child_environment, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        until(lambda: answers(f"{url}/ready") or server.poll() is not None, 120)
        assert server.poll() is None, log.read_text()
        answer = complete(url, 8)
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["text"].strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()


def test_the_explicit_package_list_is_complete() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    there = {f"nybble.{m.name}" for m in modules().values() if m.is_package} | {"nybble"}
    assert sorted(listed) == sorted(there)


def test_a_bare_import_of_kernels_is_never_ours(child_environment: dict[str, str]) -> None:
    """transformers imports Hugging Face's ``kernels``; from this folder it must not get this folder's."""
    script = (
        "import importlib.util, transformers\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec.origin if spec else 'none')\n"
        "from transformers.utils import is_kernels_available\n"
        "is_kernels_available()\n"
        "from transformers import LlamaForCausalLM\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=child_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") not in done.stdout

    unsafe = {k: v for k, v in child_environment.items() if k != "PYTHONSAFEPATH"}
    probe = "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, env=unsafe, capture_output=True, text=True, check=True
    )
    assert str(ROOT / "kernels") in found.stdout, "the variable that this test guards would not be needed"

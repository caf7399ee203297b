"""The README's commands run: blocks after a ``<!-- run -->`` line, against a server on another port."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import answers, until

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```(bash|python)\n(.*?)```", README, re.DOTALL)
PORT = 8000  # as the README writes it


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Ours, with the environment's commands on the path."""
    folder = str(Path(sys.executable).parent)
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return keep | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[int]:
    """The port of ``nybble serve`` as ``make serve`` starts it, but on a free port."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["nybble", "serve", "--port", "0", "--drain-delay", "0"], env=environment, stdout=out, stderr=out
        )
    try:
        until(lambda: greeted(log) is not None or server.poll() is not None, 120)
        number = greeted(log)
        assert number is not None, log.read_text()
        until(lambda: answers(f"http://127.0.0.1:{number}/ready"), 10)
        yield number
    finally:
        server.terminate()
        server.wait(60)


def greeted(log: Path) -> int | None:
    """The port in the line that the server prints for copy and paste."""
    found = re.search(r"curl [^\n]*http://127\.0\.0\.1:(\d+)/v1/", log.read_text(errors="replace"))
    return int(found.group(1)) if found else None


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[code.split("\n")[0][:40] for _, code in BLOCKS])
def test_a_block_runs(
    language: str, code: str, port: int, environment: dict[str, str], tmp_path: Path
) -> None:
    if code.startswith("curl") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "engine").symlink_to(ROOT / "engine")
    code = code.replace(f"127.0.0.1:{PORT}", f"127.0.0.1:{port}")
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else ["python", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout, done.stdout


def test_make_targets_exist() -> None:
    named = set(re.findall(r"`?make ([a-z][a-z-]+)", README))
    assert {"serve", "test", "check", "bench"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_options_exist(environment: dict[str, str]) -> None:
    helps = "".join(
        subprocess.run(
            ["nybble", c, "--help"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for c in ("serve", "check", "quantize", "eval", "tune")
    )
    known = set(re.findall(r"--[a-z][a-z-]+", helps)) | {"--version"}
    documents = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    text = "\n".join(
        line for line in documents.splitlines() if not re.match(r"\s*(docker|git|pip|kubectl) ", line)
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(named) > 15
    assert named - known == set()


def test_links_exist() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"

"""Jobs in SQLite, and in a real PostgreSQL where Debian's packages are installed."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nybble.engine.errors import ConfigError, EngineError
from nybble.server.job_store import JobRecord, JobStore, only_server_of


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A server of its own on a socket in a temporary folder."""
    pytest.importorskip("psycopg", reason="psycopg (extra postgres) is not installed")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("no PostgreSQL here (apt install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # pytest's own is closed to other users
    as_user = []
    if Path("/proc/self").owner() == "root":  # initdb refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    data, log = folder / "data", folder / "log"
    control = [*as_user, str(binaries[-1] / "pg_ctl"), "-D", str(data), "-w", "-l", str(log)]
    subprocess.run([*as_user, str(binaries[-1] / "initdb"), "-D", str(data), "-U", "nybble"], check=True)
    subprocess.run([*control, "-o", f"-k {folder} -c listen_addresses=''", "start"], check=True)
    try:
        yield f"postgresql+psycopg://nybble@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "stop", "-m", "immediate"], check=True)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres"))


def test_jobs_come_back_as_they_were(url: str, tmp_path: Path) -> None:
    store = JobStore(url, str(tmp_path))
    first = JobRecord("a", 7, {"model": "m", "output": "ö", "options": {"bits": 4}})
    second = JobRecord("b", 7, {"model": "m", "output": "p"})
    for job in (first, second):
        store.add(job)
    first.status, first.result, first.progress = (
        "succeeded",
        {"seconds": 1.5},
        {"phase": "quantize", "done": 3},
    )
    store.update(first)
    store.close()
    again = JobStore(url, str(tmp_path))
    assert again.load() == [first, second]
    again.remove(first)
    assert again.load() == [second]
    again.close()
    other = JobStore(url, "another folder")
    assert other.load() == []
    other.close()


def test_an_id_is_stored_once(url: str, tmp_path: Path) -> None:
    store = JobStore(url, str(tmp_path))
    store.add(JobRecord("same", 1, {}))
    with pytest.raises(EngineError, match="cannot be written"):
        store.add(JobRecord("same", 2, {}))
    assert [job.created_at for job in store.load()] == [1]
    store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "--database-url nonsense: cannot be used"),
        ("sqlite:////nowhere/at/all.sqlite", "cannot be used"),
        ("postgresql+nodriver://user:secret@host/name", "cannot be used"),
    ],
)
def test_databases_that_cannot_be_used(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        JobStore(url, "folder")
    assert "secret" not in found.value.message


def test_one_server_for_a_folder(tmp_path: Path) -> None:
    with (
        only_server_of(tmp_path),
        pytest.raises(ConfigError, match="another server uses it"),
        only_server_of(tmp_path),
    ):
        pass
    with only_server_of(tmp_path):
        pass

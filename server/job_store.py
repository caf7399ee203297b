"""Jobs in a database, so that they survive restarts."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..engine.errors import ConfigError, EngineError

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Json = dict[str, Any]


@dataclass(slots=True)
class JobRecord:
    """One quantization job. request: its body, resolved. Times are Unix seconds."""

    id: str
    created_at: int
    request: Json
    status: Status = "queued"
    started_at: int | None = None
    finished_at: int | None = None
    progress: Json = field(default_factory=dict)
    result: Json | None = None
    error: Json | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("succeeded", "failed", "cancelled")

    def to_dict(self) -> Json:
        """The API's job object."""
        shown: Json = {"id": self.id, "object": "quantization", "status": self.status}
        shown |= {"created_at": self.created_at, "started_at": self.started_at}
        shown |= {"finished_at": self.finished_at, **self.request, "progress": self.progress or None}
        shown |= {"result": self.result, "error": self.error}
        return shown


@contextmanager
def only_server_of(models_dir: Path) -> Iterator[Path]:
    """While inside, no other server works in this folder; gives the hidden folder for what it keeps.

    ConfigError where one does, or the folder cannot be written.
    """
    hidden = models_dir / ".nybble"
    try:
        hidden.mkdir(exist_ok=True)
        with (hidden / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield hidden
    except BlockingIOError as error:
        raise ConfigError(f"--models-dir {models_dir}: another server uses it; give each its own") from error
    except OSError as error:
        raise ConfigError(f"--models-dir {models_dir}: cannot be written ({error.strerror})") from error


_COLUMNS = JobRecord.__slots__


class JobStore:
    """One table of a database that SQLAlchemy opens. Blocking: call it from a thread.

    A server sees only the jobs of its own models folder, so that several may share a database.
    """

    def __init__(self, url: str, folder: str) -> None:
        """Opens the database and makes the table. ConfigError where that fails; passwords are not shown."""
        # Imported here: 20 MB that only servers with quantization jobs need.
        import sqlalchemy
        from sqlalchemy.exc import SQLAlchemyError

        self._folder = folder
        self._failure = SQLAlchemyError
        shown = url
        try:
            shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
            self._engine = sqlalchemy.create_engine(url, pool_pre_ping=True)
            self._table = _table(sqlalchemy)
            self._table.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"--database-url {shown}: cannot be used ({_first_line(error)})") from error

    @property
    def mark(self) -> str:
        """A name for the database, by its URL without the password (of SQLite: by its file)."""
        url = self._engine.url
        if url.get_backend_name() == "sqlite" and url.database is not None:
            url = url.set(database=str(Path(url.database).absolute()))
        return hashlib.sha256(url.render_as_string(hide_password=True).encode()).hexdigest()[:12]

    def load(self) -> list[JobRecord]:
        """All jobs, the oldest first. Errors: EngineError."""
        table = self._table
        query = table.select().where(table.c.folder == self._folder).order_by(table.c.number)
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(query).mappings().all()
        except self._failure as error:
            raise EngineError(f"the jobs' database cannot be read: {_first_line(error)}") from error
        return [JobRecord(**{name: row[name] for name in _COLUMNS}) for row in rows]

    def add(self, job: JobRecord) -> None:
        """A new job. Errors: EngineError, then it is not stored."""
        self._write(self._table.insert().values(folder=self._folder, **_values(job)))

    def update(self, job: JobRecord) -> None:
        """What changed of a job. Errors: EngineError."""
        self._write(self._table.update().where(self._table.c.id == job.id).values(**_values(job)))

    def remove(self, job: JobRecord) -> None:
        """Forget a job. Errors: EngineError."""
        self._write(self._table.delete().where(self._table.c.id == job.id))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _write(self, statement: Any) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(statement)
        except self._failure as error:
            raise EngineError(f"the jobs' database cannot be written: {_first_line(error)}") from error


def _table(sqlalchemy: Any) -> Any:
    column, text, json = sqlalchemy.Column, sqlalchemy.Text, sqlalchemy.JSON(none_as_null=True)
    return sqlalchemy.Table(
        "nybble_quantizations",
        sqlalchemy.MetaData(),
        column("number", sqlalchemy.Integer, primary_key=True, autoincrement=True),
        column("id", text, unique=True, nullable=False),
        column("folder", text, index=True, nullable=False),
        column("created_at", sqlalchemy.BigInteger, nullable=False),
        column("status", text, nullable=False),
        column("started_at", sqlalchemy.BigInteger),
        column("finished_at", sqlalchemy.BigInteger),
        column("request", json, nullable=False),
        column("progress", json, nullable=False),
        column("result", json),
        column("error", json),
    )


def _values(job: JobRecord) -> Json:
    return {name: getattr(job, name) for name in _COLUMNS}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]

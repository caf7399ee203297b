"""Plain text files of documents, as calibration and scoring read them."""

from pathlib import Path

from .errors import ConfigError

SEPARATOR = "<|endoftext|>"
MAX_TEXT_BYTES = 1 << 30


def read_text(path: Path, option: str) -> str:
    """The UTF-8 text in ``path``, which ``option`` named. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{option} {path}: larger than {MAX_TEXT_BYTES >> 30} GiB; give a part of it")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: cannot be read ({error.strerror}); give a plain text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option} {path}: not UTF-8 (byte {error.start}); give a plain text file"
        ) from error


def split_documents(text: str) -> list[str]:
    """The documents between ``<|endoftext|>`` marks, stripped; empty ones are left out."""
    return [document for part in text.split(SEPARATOR) if (document := part.strip())]

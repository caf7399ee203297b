"""Fields of a quantization configuration, checked. ``where`` names the place in errors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError

Neutral = Mapping[str, tuple[Any, ...]]


def refuse_foreign(config: Mapping[str, Any], neutral: Neutral, where: str) -> None:
    """UnsupportedModelError for a key whose value is none of those that change nothing."""
    for key, values in neutral.items():
        if key in config and config[key] not in values:
            raise UnsupportedModelError(
                f"{where}: {key} {str(config[key])[:100]!r} is not supported; save the checkpoint without it"
            )


def flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A boolean, ``default`` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} {str(value)[:100]!r}: expected true or false")
    return value


def group_size(value: Any, where: str) -> int:
    """-1, or a positive number."""
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 1 <= value < 1 << 31):
        raise CheckpointError(f"{where}: group_size {value!r}: expected -1 or a positive number")
    return value


def names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of strings, () where it is absent or null."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CheckpointError(f"{where}: {key} {str(value)[:100]!r}: expected a list of names")
    return tuple(value)


def compiled(patterns: Iterable[str], where: str) -> tuple[str, ...]:
    """The same patterns. CheckpointError for one that is no regular expression."""
    found = tuple(patterns)
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{where}: {pattern[:100]!r} is no regular expression ({error})") from error
    return found

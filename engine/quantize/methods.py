"""The quantization methods by name. A new one is a file and a line here."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..errors import ConfigError
from .options import QuantizeOptions
from .pipeline import Method, Recipe

# Functions of QuantizeOptions. Those of RECIPES need one pass over the blocks and may be a base of others.
RECIPES: dict[str, str] = {
    "rtn": ".rtn:recipe",
    "gptq": ".gptq:recipe",
    "awq": ".awq:recipe",
    "yaqa": ".yaqa:recipe",
}
METHODS: dict[str, str] = {
    **RECIPES,
    "sparse24": ".sparse24:recipe",
    "requant": ".requant:method",
    "gwq": ".gwq:method",
}


def get_method(options: QuantizeOptions) -> Method:
    """``options.method``, set up. Raises ConfigError that names those there are."""
    found: Method = _look_up("--method", options.method, METHODS)(options)
    return found


def get_base(options: QuantizeOptions) -> Recipe:
    """``options.base``, for a method that builds on another. Raises ConfigError."""
    found: Recipe = _look_up("--base", options.base, RECIPES)(options)
    return found


def _look_up(option: str, name: str, table: dict[str, str]) -> Callable[[QuantizeOptions], Any]:
    where = table.get(name)
    if where is None:
        raise ConfigError(f"{option} {name}: use one of {', '.join(table)}")
    module, function = where.split(":")
    return getattr(import_module(module, __package__), function)  # type: ignore[no-any-return]

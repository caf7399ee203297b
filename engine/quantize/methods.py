"""The quantization methods by name. A new one is a file and a line here."""

from importlib import import_module
from typing import cast

from ..errors import ConfigError
from .options import QuantizeOptions
from .pipeline import Method

METHODS: dict[str, str] = {"rtn": ".rtn:RTN", "gptq": ".gptq:GPTQ"}


def get_method(options: QuantizeOptions) -> Method:
    """``options.method``, set up. Raises ConfigError that names those there are."""
    where = METHODS.get(options.method)
    if where is None:
        raise ConfigError(f"--method {options.method}: use one of {', '.join(METHODS)}")
    module, name = where.split(":")
    return cast(Method, getattr(import_module(module, __package__), name).from_options(options))

"""Messages of ``nybble quantize``, which name the CLI's options, in the words of POST /v1/quantizations."""

import re
from typing import Any

Json = dict[str, Any]

# "nybble serve --lm-head-bits" stays: an option of the server's is not a field of the body.
_FLAG = re.compile(r"(?<![\w-])(?<!nybble serve )--[a-z][a-z-]*")
_ARGUMENT = re.compile(r"(?<!\S)(MODEL|OUT)(?=[\s:,;]|$)")
_FIELDS = {
    **{"MODEL": "model", "OUT": "output", "eval_text": "evaluation"},
    **{"sym": "symmetric", "asym": "symmetric", "max_nll_increase": "gate.max_nll_increase"},
}
_VALUES = {"--sym": "true", "--asym": "false"}
_NOT_HERE = " or add --overwrite"  # no job replaces a folder


def field_of(message: str) -> str:
    """The body's field that ``message`` begins with, as the CLI spells it."""
    return _field(message.split()[0].strip(":"))


def in_api_words(message: str) -> str:
    """``message`` with the fields of the body in quotes, where it names options and arguments of the CLI."""
    message = message.replace(_NOT_HERE, "")
    message = _ARGUMENT.sub(lambda found: f"'{_field(found[0])}'", message)
    return _FLAG.sub(lambda found: _named(found[0]), message)


def shown_message(message: str, request: Json) -> str:
    """``message`` of a job, in the API's words and without the server's paths: what it was sent instead.

    request: see ``JobRecord``.
    """
    options = request["options"]
    sent = {options["out"]: request["output"], options.get("model"): request.get("model")}
    for option, field in (("calibration", "calibration"), ("eval_text", "evaluation")):
        if (path := options.get(option)) is not None:
            source = request[field]["source"]
            inline = not isinstance(source, str)
            # Errors tell a file's path or its name alone; of text in the request neither was sent.
            sent |= {path: "texts", path.rpartition("/")[2]: "texts"} if inline else {path: source}
    for path, name in sent.items():
        if path is not None:
            message = message.replace(path, str(name))
    folder = options["out"].rpartition("/")[0]
    return in_api_words(message.replace(f"{folder}/", ""))


def _named(flag: str) -> str:
    name = f"'{_field(flag)}'"
    value = _VALUES.get(flag, "false" if flag.startswith("--no-") else "")
    return f"{name} {value}".rstrip()


def _field(flag: str) -> str:
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    return _FIELDS.get(name, name)

"""What pydantic found, in plain words for people who know neither Python nor pydantic."""

from pydantic_core import ErrorDetails

_WORDS = {
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be a text",
    "list_type": "should be a list",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "should be at least"),
    "greater_than": ("gt", "should be more than"),
    "less_than_equal": ("le", "should be at most"),
    "less_than": ("lt", "should be less than"),
}


def finding(details: ErrorDetails, size: bool = False) -> str:
    """A sentence without a subject: "should be at most 65535"; bounds of a ``size`` in bytes as 256MiB."""
    kind, context = details["type"], details.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        mebibytes = size and bound >= 1 << 20 and bound % (1 << 20) == 0
        return f"{words} {bound >> 20}MiB" if mebibytes else f"{words} {bound}"
    if kind in ("too_short", "string_too_short") and context["min_length"] == 1:
        return "must not be empty"
    return _WORDS.get(kind, details["msg"].removeprefix("Value error, ").removeprefix("Input "))

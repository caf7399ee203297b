"""The ``nybble`` command."""

import inspect
import sys
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .. import __version__
from ..engine.errors import NybbleError
from .cli_tasks import register
from .findings import finding
from .lifecycle import serve
from .settings import PREFIX, Settings, load_settings, option_name

EXIT_USAGE = 2


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2."""
    try:
        code = build_cli()(standalone_mode=False)
    except typer.TyperException as error:
        code = _fail(_usage(error))
    except NybbleError as error:
        code = _fail(error.message)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the command line. Values are checked by pydantic, in newer typers."""
    message = error.format_message()
    if not isinstance(error.__cause__, ValidationError):
        return message
    first = error.__cause__.errors(include_url=False)[0]
    option = message.removeprefix("Invalid value for ").partition(":")[0].strip("'\"")
    return f"{option} {first['input']!r:.80}: {finding(first)}"


def _fail(message: str) -> int:
    print(f"nybble: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USAGE


def build_cli() -> typer.Typer:
    """All commands."""
    cli = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    cli.callback(invoke_without_command=True)(_nybble)
    epilog = f"Each option may also be set in the environment, as {PREFIX}<NAME>; the command line wins."
    cli.command("serve", epilog=epilog)(_serve_command())
    register(cli)
    return cli


def _nybble(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Compress a language model, see what that cost in quality, serve it, watch it."""
    if version:
        typer.echo(f"nybble {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def _serve_command() -> Callable[..., None]:
    """``serve``, with a parameter for each field of Settings: an option is declared in one place only."""

    def command(**given: Any) -> None:
        """Serve MODEL over HTTP as OpenAI's API does. Without MODEL: the built-in demo model."""
        raise typer.Exit(
            serve(load_settings({name: value for name, value in given.items() if value is not None}))
        )

    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Text for typer: Settings itself checks and converts, and says what is wrong in one way everywhere."""
    kind: Any = str
    if name == "model":
        positional = Annotated[str | None, typer.Argument(metavar="MODEL", help=field.description)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=positional)
    flag = option_name(name)
    if field.annotation is bool:
        kind, flag = bool, f"{flag}/{option_name(name, given=False)}"
    elif name == "api_key":
        kind = list[str]
    described: Any = Annotated[
        kind | None, typer.Option(flag, metavar=_metavar(field), help=_help(field), show_default=False)
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=described)


def _help(field: FieldInfo) -> str:
    default = field.default
    if default is None or default == ():
        return f"{field.description}."
    shown = ("on" if default else "off") if isinstance(default, bool) else default
    return f"{field.description}. [default: {shown}]"


def _metavar(field: FieldInfo) -> str | None:
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return "|".join(str(kind) for kind in kinds)
    if field.annotation is bool:
        return None
    return {int: "N", float: "SECONDS", str: "TEXT"}.get(kinds[0], "TEXT")


if __name__ == "__main__":
    main()

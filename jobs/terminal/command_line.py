"""Makes commands from config classes: their flags, their help, and errors for wrong flags."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from jobs.cluster.stopping import Stopped, leave
from jobs.log_file import close_log, open_log
from jobs.screen import VisibleConsole, choose_printing, detail, finish, prepare, say_failure, tell
from jobs.terminal.call_options import PrintOptions, StorageOptions
from smallcap.errors import ConfigError, SmallCapError
from smallcap.options import Config, Option, list_options, list_settings, load_config
from smallcap.patience import set_patience

EXIT_RUN_ERROR = 1
EXIT_USAGE = 2
EXIT_TOO_MANY_ERRORS = 3

Run = Callable[..., int | None]
Base = Callable[[dict[str, Any], Any], Mapping[str, Any] | None]
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, or the one in the copy of click that newer typers carry


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: The words after `smallcap`.
        run: A function of a config, and, for jobs, of the options of the call; returns the exit status, or None for 0.
        example: A typical command line.
        base: A function of a job's flags, which it may change, and of the options of the call; returns the recorded
            config to start from, or None.
    """

    name: str
    run: Run
    example: str
    base: Base | None = None

    @property
    def summary(self) -> str:
        """What the command does, in a line."""
        return (self.run.__doc__ or "").strip()

    @property
    def kinds(self) -> list[type[Config]]:
        """The classes of its options: a job's config and the options of its call, or those of a look-up."""
        return [kind for name, kind in get_type_hints(self.run).items() if name != "return"]

    def options(self) -> list[Option]:
        """All its options: arguments first, then required options, then others; groups of a job's config come last."""
        kinds: list[type[Config]] = [*self.kinds, StorageOptions, PrintOptions]
        options = [
            option for kind in kinds for option in sorted(list_options(kind), key=lambda option: not option.is_required)
        ]
        return sorted(options, key=lambda option: (not option.is_positional, "." in option.key))

    def section(self, option: Option) -> str:
        """Returns the title under which an option is listed."""
        if option.is_positional:
            return "Arguments"
        if "." in option.key:
            return f"{option.key.rpartition('.')[0]}: {' '.join((option.group.__doc__ or '').split())}"
        return "Options" if issubclass(self.kinds[0], option.group) else "This call"

    def __call__(self, **typed: Any) -> None:
        """Runs the command, or prints its help.

        Args:
            typed: The options as they were typed, by `_parameter_name`; None or an empty list for others.
        """
        if typed["help"]:
            print_help(self)
            return
        printing = load_config(PrintOptions, flags=_flags_of(PrintOptions, typed))
        if printing.log_file is not None:
            open_log(printing.log_file)
        choose_printing(
            quiet=printing.quiet,
            verbose=printing.verbose,
            as_json=bool(typed.get("as_json") or typed.get("json_file")),
            command=self.name,
        )
        set_patience(load_config(StorageOptions, flags=_flags_of(StorageOptions, typed)).storage_patience_s)
        status = self._run(typed)
        close_log()
        choose_printing()  # not after an error, which is still to be told
        if status:
            raise typer.Exit(status)

    def _run(self, typed: Mapping[str, Any]) -> int | None:
        flags = [_flags_of(kind, typed) for kind in self.kinds]
        if len(flags) == 1:
            options = load_config(self.kinds[0], flags=flags[0])
            _print_settings(options)
            return self.run(options)
        call: Any = load_config(self.kinds[1], flags=flags[1])
        base = self.base(flags[0], call) if self.base else None
        config = load_config(self.kinds[0], call.config, flags[0], call.settings, base)
        _print_settings(config, call)
        return self.run(config, call)

    def add_to(self, app: typer.Typer) -> None:
        """Adds the command to a command line."""

        def call(**typed: Any) -> None:
            self(**typed)

        types = {_parameter_name(option): _parameter_type(option) for option in self.options()}
        types["help"] = Annotated[bool | None, typer.Option("--help", "-h")]
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
                for name, kind in types.items()
            ]
        )
        app.command(self.name.split()[-1], short_help=self.summary, add_help_option=False)(call)


def _flags_of(kind: type[Config], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a class that were typed, by their keys."""
    return {
        option.key: [item for text in value for item in text.split(",")] if option.has_commas else value
        for option in list_options(kind)
        if (value := typed[_parameter_name(option)]) not in (None, [])
    }


def _print_settings(*configs: Config) -> None:
    detail("\n".join(f"{key} = {value}" for config in configs for key, value in list_settings(config)))


def _parameter_name(option: Option) -> str:
    return option.key.replace(".", "__")


def _parameter_type(option: Option) -> Any:
    """Returns the type of an option for typer, which passes on all values as they were typed."""
    kind = list[str] | None if option.is_list else str | None
    if option.is_positional:
        return Annotated[kind, typer.Argument(metavar=option.names[0], autocompletion=_completion(option))]
    if option.is_switch:
        *short, name = option.names
        return Annotated[
            bool | None, typer.Option(*short, f"{name}/--no-{name.removeprefix('--')}", help=option.summary)
        ]
    return Annotated[kind, typer.Option(*option.names, help=option.summary, autocompletion=_completion(option))]


def _completion(option: Option) -> Callable[[str], list[str]]:
    """Returns a function that completes an option's value for a shell, which completes names of files by itself."""
    found = re.match("(one of )?(.+)", option.values)
    words = found[2].split(", ") if found and found[1] else ["auto"] if option.values.startswith("auto ") else []

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def print_help(command: Command) -> None:
    """Prints what a command does, how it is called, and all its options."""
    from rich.table import Table
    from rich.text import Text

    console = VisibleConsole()
    options = command.options()
    positional = [
        show_usage(option) if option.is_required else f"[{show_usage(option)}]"
        for option in options
        if option.is_positional
    ]
    usage = " ".join(["smallcap", command.name, *positional, "[OPTIONS]"])
    console.print(Text(f"Usage: {usage}\n\n{command.summary}\n"))
    console.print(Text(f"Example: {command.example}"), soft_wrap=True)
    width = max(len(show_usage(option)) for option in options)
    for title, members in groupby(options, command.section):
        table = Table.grid(padding=(0, 2), pad_edge=True)
        table.add_column(min_width=width, no_wrap=True, style="cyan")
        table.add_column()
        for option in members:
            description = Text(option.summary)
            description.append(f"  [{'; '.join(facts)}]" if (facts := list_facts(option)) else "", style="dim")
            table.add_row(show_usage(option), description)
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)


def list_facts(option: Option) -> list[str]:
    """Returns what help shows besides an option's docstring: whether it is required, its values, its default."""
    if option.is_switch:
        name = option.names[-1].removeprefix("--")
        return [f"on by default, --no-{name} turns it off"] if option.default else []
    values = option.values.replace("a whole number", "N").replace("a number", "X")
    facts = [
        "required" if option.is_required else "",
        values if values not in ("N", "X") else "",
        "repeatable" if option.is_list and not option.is_positional else "",
        f"default: {option.default}" if option.default else "",
    ]
    return [fact for fact in facts if fact]


def show_usage(option: Option) -> str:
    """Returns an option as people type it, such as `-k, --k N`."""
    if option.is_positional:
        return option.names[0] + "..." * option.is_list
    if option.is_switch:
        return ", ".join(option.names)
    value = "N" if "whole number" in option.values else "X" if "number" in option.values else "TEXT"
    return f"{', '.join(option.names)} {value}"


def run_app(app: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits; prints smallcap's errors, and wrong flags, in smallcap's format."""
    prepare()
    typed = arguments or ()
    # Until the options are read, so that an error in them is told as it was asked for.
    as_json = any(word.partition("=")[0] == "--json" for word in typed)
    choose_printing(as_json=as_json)
    try:
        status = app(arguments, prog_name="smallcap", standalone_mode=False) or 0
        finish()
        sys.exit(status)
    except _UsageError as error:
        choose_printing(as_json=as_json, command=_command_of(error))
        _fail_usage(error)
    except Stopped as stopped:
        leave(stopped)
    except SmallCapError as error:
        _fail(error, EXIT_USAGE if isinstance(error, ConfigError) else EXIT_RUN_ERROR)
    except Exception as error:  # noqa: BLE001 - a fault of ours, whose text may come from anywhere
        tell(traceback.format_exc())
        say_failure(error, EXIT_RUN_ERROR)
        sys.exit(EXIT_RUN_ERROR)
    finally:
        close_log()
        choose_printing()


def _command_of(error: Any) -> str | None:
    """Returns the words after `smallcap` in which something is wrong; None where they are no command."""
    context = getattr(error, "ctx", None)
    if context is None or hasattr(context.command, "commands"):
        return None
    path: str = context.command_path
    return path.removeprefix("smallcap ")


def _fail_usage(error: Any) -> NoReturn:
    message = error.format_message()
    if message.startswith("Usage:"):  # a command group without a command
        tell(message)
        sys.exit(EXIT_USAGE)
    _fail(_unknown_flag(error) if hasattr(error, "possibilities") else ConfigError(message), EXIT_USAGE)


def _unknown_flag(error: Any) -> ConfigError:
    flags = [flag for parameter in error.ctx.command.params for flag in parameter.opts]
    nearest = get_close_matches("--" + error.option_name.lstrip("-").rpartition(".")[2], flags, n=1)
    remedy = f"Did you mean {nearest[0]}?" if nearest else f"{error.ctx.command_path} --help lists all options."
    return ConfigError("There is no such option.", where=error.option_name, remedy=remedy)


def _fail(error: SmallCapError, exit_code: int) -> NoReturn:
    """Prints an error for people, and for programs if they are to know, and ends the process."""
    from rich.text import Text

    message = Text("error: ", style="bold red")
    message.append(str(error), style="default")
    VisibleConsole(sys.stderr).print(message, soft_wrap=True)
    say_failure(error, exit_code)
    sys.exit(exit_code)

"""Option groups: what several commands share are the fields of one dataclass, declared once with its defaults.

And how a command's options are shown: those that most runs need first, the others under "More", without types where
the text says them.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints, overload

from typer.core import TyperArgument, TyperCommand, TyperOption
from typer.models import OptionInfo

MORE = "More"


@overload
def grouped(command: Callable[..., int]) -> Callable[..., int]: ...


@overload
def grouped(*, first: Sequence[str]) -> Callable[[Callable[..., int]], Callable[..., int]]: ...


def grouped(command: Callable[..., int] | None = None, *, first: Sequence[str] = ()) -> Any:
    """Let a command take groups: each field of a parameter that is a dataclass becomes an option of its own.

    The order of the parameters is that of the help text. Typer sees the options, the command gets the group filled in.

    Args:
        command: The command, where this is its decorator as it stands.
        first: Names of the options that most runs need, in their order; all others stand under "More". Without any,
            options stand in the panels that they were declared with.
    """

    def decorated(command: Callable[..., int]) -> Callable[..., int]:
        groups: dict[str, Any] = {}
        options: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind = parameter.annotation
            if is_dataclass(kind):
                groups[parameter.name] = kind
                options += _options_of(kind)
            else:
                options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        options = [_shown(option, first) for option in _ordered(options, first)]

        @functools.wraps(command)
        def run(**given: Any) -> int:
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            return command(**given)

        run.__signature__ = inspect.Signature(options, return_annotation=int)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options} | {"return": int}
        del run.__wrapped__  # whoever asks for the signature gets the options
        return run

    return decorated if command is None else decorated(command)


class Command(TyperCommand):
    """A command whose help has no column of types: choices and bounds stand in the text, where it lacks them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for option in self.params:
            if isinstance(option, TyperOption):
                _without_type(option)
            elif isinstance(option, TyperArgument):
                option.display_type_rich = lambda ctx: None  # type: ignore[method-assign]

    def get_help_option(self, ctx: Any) -> Any:
        """As of every command."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option


def _without_type(option: TyperOption) -> None:
    text = option.help or ""
    choices = [str(choice) for choice in option.type_descriptor.choices or ()]
    if not all(choice in text for choice in choices):
        text = f"{', '.join(choices)}. {text}"
    option.help = text.strip()
    if option.metavar != "[N]":
        option.metavar = ""
    option._get_number_range_help_str = lambda: None  # type: ignore[method-assign]


def _ordered(options: list[inspect.Parameter], first: Sequence[str]) -> list[inspect.Parameter]:
    named = {option.name: option for option in options}
    unknown = [name for name in first if name not in named]
    if unknown:
        raise ValueError(f"no such option: {', '.join(unknown)}")
    return [*(named[name] for name in first), *(option for option in options if option.name not in first)]


def _shown(option: inspect.Parameter, first: Sequence[str]) -> inspect.Parameter:
    """The option in the panel where it is to stand."""
    kind = option.annotation
    if not first or get_origin(kind) is not Annotated:
        return option
    plain, *notes = get_args(kind)
    changed = [_placed(note, option.name in first) for note in notes]
    return option.replace(annotation=Annotated[(plain, *changed)])


def _placed(note: Any, is_first: bool) -> Any:
    if not isinstance(note, OptionInfo):
        return note
    placed = copy.copy(note)
    placed.rich_help_panel = None if is_first else MORE
    return placed


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]

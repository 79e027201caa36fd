"""Commands take requests: frozen dataclasses whose fields become the flags of the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from gap_export.spec.requests import Declared, options_of


@dataclass(frozen=True)
class Only:
    """Marks a request of which a command takes some options alone; the rest keep their defaults.

    Attributes:
        names: The fields it takes.
    """

    names: tuple[str, ...]


def takes_requests(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each option of the requests among its parameters."""
    hints = get_type_hints(command, include_extras=True)
    requests: dict[str, tuple[type[Any], list[Declared]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        request, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(request, type) and is_dataclass(request)):
            parameters.append(parameter.replace(annotation=hint))
            continue
        names = next((mark.names for mark in marks if isinstance(mark, Only)), None)
        taken = [each for each in options_of(request) if names is None or each.name in names]
        requests[parameter.name] = request, taken
        parameters += [_flag(each, parameter.kind) for each in taken]

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> None:
        for name, (request, taken) in requests.items():
            given = {each.name: values.pop(each.name) for each in taken}
            repeatable = {
                each.name: tuple(given[each.name] or ()) for each in taken if each.is_many
            }
            values[name] = request(**{**given, **repeatable})
        command(*args, **values)

    return with_signature(run, parameters)


def with_signature(
    command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """The command as typer is to read it: by ``inspect``, and by its annotations."""
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def _flag(each: Declared, kind: Any) -> inspect.Parameter:
    option = typer.Option(
        each.flag,
        metavar=each.option.metavar,
        help=each.option.help,
        min=each.option.min,
        max=each.option.max,
        show_default=each.default is not None and not isinstance(each.default, (bool, tuple)),
    )
    of_type = list[str] | None if each.is_many else each.type
    return inspect.Parameter(
        each.name,
        kind,
        default=None if each.is_many else each.default,
        annotation=Annotated[of_type, option],
    )

"""Parsers of argparse as Markdown, without running what they belong to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest.mock import patch

from docs.markdown import code, prose, sentence, table


class Caught(BaseException):
    """A parser that was about to parse."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(main: Callable[[list[str]], object], *words: str) -> argparse.ArgumentParser:
    """The parser of a command, stopped before it parses.

    Raises:
        AssertionError: the command parses no arguments.
    """

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Caught(parser)

    try:
        with patch.object(argparse.ArgumentParser, "parse_args", catch):
            main(list(words))
    except Caught as caught:
        return caught.parser
    raise AssertionError(f"{main} parses no arguments.")


def action_row(action: argparse.Action, parser: argparse.ArgumentParser) -> tuple[str, str]:
    formatter = parser._get_formatter()
    shown = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    name = names if not action.option_strings or action.nargs == 0 else f"{names} {shown}"
    told = formatter._expand_help(action) if action.help else ""
    needed = action.required and action.option_strings
    if not told and action.default not in (None, []) and not isinstance(action.default, bool):
        told = f"default: {action.default}"
    return code(name), sentence(f"required; {told}" if needed else told)


def verb_section(parser: argparse.ArgumentParser, level: int, what: str = "") -> str:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    rows = [
        action_row(a, parser)
        for a in parser._actions
        if a not in groups and not isinstance(a, argparse._HelpAction) and a.help != argparse.SUPPRESS
    ]
    parts = [
        f"{'#' * level} {parser.prog}\n",
        prose(parser.description) if parser.description else sentence(what) + "\n",
    ]
    parts.append(table(("argument", "what it is"), rows) if rows else "")
    for group in groups:
        told = {choice.dest: choice.help or "" for choice in group._choices_actions}
        parts += [verb_section(child, level + 1, told.get(name, "")) for name, child in group.choices.items()]
    return "\n".join(parts)

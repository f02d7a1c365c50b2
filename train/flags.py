"""Flags made from dataclasses, so that the code, the help and the log of a run cannot disagree.

    @dataclass
    class Config:
        batch_size: int = option(32, "examples per optimizer step")

    parser = Parser(prog="python -m train", description=...)  # of model/command.py
    add_flags(parser, Config)                               # --batch-size, also taken as --batch_size
    config = from_flags(Config, parser.parse_args())

A field's type makes its flag: bool gives --name/--no-name, Literal its choices, tuple[float, float] two values, and
`X | None` accepts the word "none". A bad command line is one line on stderr and exit status 2.
"""

import argparse
import dataclasses
import types
import typing


def option(default, meaning: str, may_change: bool = False):
    """A dataclass field with its default and what it means, units included.

    may_change: a run that is resumed may have another value than it began with (train/resume.py).
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "may_change": may_change})


def add_flags(parser: argparse.ArgumentParser, config_class, title: str | None = None) -> None:
    """Adds one flag for every field of a dataclass made with `option`, under a heading of its own."""
    group = parser.add_argument_group(title or config_class.__name__)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            help=f"{field.metadata['meaning']} (default: {_shown(field.default)})".replace("%", "%%"),
            **_argument_for(hints[field.name]),
        )
        # not through add_argument: before Python 3.13 BooleanOptionalAction would add the default to the help again
        parser.set_defaults(**{field.name: field.default})


def from_flags(config_class, arguments: argparse.Namespace):
    """The dataclass filled from parsed flags; its own validation may raise ValueError."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def given(parser: argparse.ArgumentParser, arguments: list[str] | None) -> set[str]:
    """The names of the flags that a command line states, be it with their default."""
    absent = object()
    names = vars(parser.parse_args([]))
    parsed = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name for name, value in vars(parsed).items() if value is not absent}


def _argument_for(hint) -> dict:
    """The keywords of add_argument for a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": kinds}
    if typing.get_origin(hint) is tuple:
        return {"type": kinds[0], "nargs": len(kinds), "metavar": tuple(kind.__name__.upper() for kind in kinds)}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (kind,) = (kind for kind in kinds if kind is not type(None))
        return {"type": _or_none(kind), "metavar": kind.__name__.upper()}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _or_none(kind):
    def parse(word):
        return None if word.lower() == "none" else kind(word)

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def _shown(default):
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()

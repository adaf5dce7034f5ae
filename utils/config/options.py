"""Builds a command line from dataclasses. Every option is declared once, as a field with its help."""

from __future__ import annotations

import argparse
import math
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from dataset.condition_frames import ConditionFrames
from dataset.video import NATIVE_STRIDE, Rate, Resolution
from utils.common.errors import UserError
from utils.common.filesystem import expand_user

Group = TypeVar("Group")
Budget = float | Literal["auto"]
Switch = bool | Literal["auto"]

# Timesteps of every published model.
NUM_TIMESTEPS = 1000
# Type with a `parse` method -> its form in the help.
WRITTEN_TYPES = {Resolution: "FxHxW", ConditionFrames: "first|first_last|prefix:N"}
# Old flag -> its replacement.
RENAMED_FLAGS = {
    "--keep_attention": "--gradient_checkpointing selective for true, full for false",
    "--release_gradients": "--optimizer_in_backward",
}


def option(
    default: Any = MISSING,
    *,
    help: str,
    aliases: dict[str, str] | None = None,
    positional: bool = False,
    alone: str | None = None,
) -> Any:
    """Declares a dataclass field that is a command-line flag.

    Args:
        default: default value; the flag is required without one.
        aliases: for a `Literal`, alternative spelling -> value. With an alias `true`, the flag alone means it too.
        positional: whether the value is given without a flag; it is required then.
        alone: value that the flag has without one; None if it needs one.
    """
    metadata = {"help": help, "aliases": aliases, "positional": positional, "alone": alone}
    return field(default=default, metadata=metadata)


def require_positive(group: Any, *names: str) -> Iterator[str]:
    """Yields an error for each named field that is set and is not a finite number above zero."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not 0 < value < math.inf:
            yield f"--{name} is {value}; it must be above 0."


def require_text(group: Any, *names: str) -> Iterator[str]:
    """Yields an error for each named field that was not UTF-8, which Python reads as lone surrogates."""
    for name in names:
        if any("\ud800" <= char <= "\udfff" for char in getattr(group, name)):
            yield f"--{name} {getattr(group, name)!a}: it must be UTF-8 text."


def require_finite(group: Any, *names: str) -> Iterator[str]:
    """Yields an error for each named field, a number or a tuple of them, that is or holds NaN or an infinite number."""
    for name in names:
        value = getattr(group, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                yield f"--{name} is {number}; it must be a finite number."


def require_seed(seed: int) -> Iterator[str]:
    """Yields an error if a seed is outside [0, 2^32)."""
    if not 0 <= seed < 2**32:
        yield f"--seed is {seed}; it must be at least 0 and below 2^32."


def require_steps(num_inference_steps: int) -> Iterator[str]:
    """Yields an error if there are more denoising steps than timesteps."""
    if num_inference_steps > NUM_TIMESTEPS:
        yield f"--num_inference_steps is {num_inference_steps}; the models have {NUM_TIMESTEPS} timesteps."


def require_unit_interval(group: Any, *names: str) -> Iterator[str]:
    """Yields an error for each named field outside [0, 1)."""
    for name in names:
        if not 0 <= getattr(group, name) < 1:
            yield f"--{name} is {getattr(group, name)}; it must be at least 0 and below 1."


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = {argument.partition("=")[0] for argument in (sys.argv[1:] if args is None else args)}
        if renamed := [flag for flag in RENAMED_FLAGS if flag in given]:
            raise UserError([f"{flag} was renamed; use {RENAMED_FLAGS[flag]}." for flag in renamed])
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage of sixty flags before the message
        raise UserError(f"{message} (--help lists every flag)")


def parse_bool(text: str) -> bool:
    """Parses true or false in any case."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return values[text.lower()]


def parse_switch(text: str) -> Switch:
    """Parses auto, true or false; the latter two in any case."""
    if text == "auto":
        return "auto"
    try:
        return parse_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is none of auto, true and false") from None


def parse_written(written_type: Any, text: str) -> Any:
    """Parses a value of a type with a `parse` method, whose ValueError is the message."""
    try:
        return written_type.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_number_or(word: str, text: str) -> float | str:
    """Parses a number, or returns `word` if the text equals it."""
    if text == word:
        return word
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor {word}") from None


def _argparse_keywords(annotation: Any, aliases: dict[str, str] | None = None) -> dict[str, Any]:
    """Returns the keyword arguments of `add_argument` for a field's type."""
    for union, word, metavar in ((Rate, NATIVE_STRIDE, "FPS"), (Budget, "auto", "GIB")):
        if set(typing.get_args(union)) <= set(typing.get_args(annotation)):
            return {"type": partial(parse_number_or, word), "metavar": f"{metavar}|{word}"}
    if set(typing.get_args(Switch)) <= set(typing.get_args(annotation)):
        return {"type": parse_switch, "nargs": "?", "const": True, "metavar": "auto|true|false"}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):  # X | None
        annotation = next(member for member in typing.get_args(annotation) if member is not type(None))
    if annotation is bool:
        return {"type": parse_bool, "nargs": "?", "const": True, "metavar": "true|false"}
    if annotation in WRITTEN_TYPES:
        return {"type": partial(parse_written, annotation), "metavar": WRITTEN_TYPES[annotation]}
    if typing.get_origin(annotation) is Literal and aliases:
        choices = typing.get_args(annotation)
        alone = {"nargs": "?", "const": aliases["true"]} if "true" in aliases else {}
        return {
            "type": lambda text: aliases.get(text.lower(), text),
            "choices": choices,
            "metavar": "|".join(choices),
            **alone,
        }
    if annotation is Path:
        return {"type": expand_user, "metavar": "PATH"}
    if typing.get_origin(annotation) is Literal:
        return {"choices": typing.get_args(annotation)}
    if typing.get_origin(annotation) is tuple:
        return {"nargs": "+", **_argparse_keywords(typing.get_args(annotation)[0])}
    return {"type": annotation}


def add_options(parser: argparse._ActionsContainer, group_type: type) -> None:
    """Adds one flag for each field of a dataclass whose fields are `option`s."""
    hints = typing.get_type_hints(group_type)
    for option_field in fields(group_type):
        is_positional = option_field.metadata["positional"]
        default: dict[str, Any] = {"default": option_field.default}
        if option_field.default is MISSING:
            default = {} if is_positional else {"required": True}
        if option_field.metadata["alone"] is not None:
            default |= {"nargs": "?", "const": option_field.metadata["alone"]}
        parser.add_argument(
            option_field.name if is_positional else f"--{option_field.name}",
            help=option_field.metadata["help"],
            **default,
            **_argparse_keywords(hints[option_field.name], option_field.metadata["aliases"]),
        )


def make_parser(description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser that raises UserError and does not accept abbreviated flags."""
    return _Parser(prog, description=description, allow_abbrev=False)


def collect(values: dict[str, Any], group_type: type) -> Any:
    """Creates a dataclass from parsed values, which may hold the fields of other dataclasses too."""
    own_values = {option_field.name: values[option_field.name] for option_field in fields(group_type)}
    return group_type(**{name: tuple(v) if isinstance(v, list) else v for name, v in own_values.items()})


def parse_group(parser: argparse.ArgumentParser, group_type: type[Group], argv: list[str] | None = None) -> Group:
    """Parses and checks a command line whose options form one dataclass with an `errors` method.

    Raises:
        UserError: an unknown flag, or an invalid value.
    """
    add_options(parser, group_type)
    group = collect(vars(parser.parse_args(argv)), group_type)
    if errors := list(group.errors()):
        raise UserError(errors)
    return group

"""What is named on a command line or in a configuration file, as the objects that the calls take."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Trainer

from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.config import as_method
from lightning_unlearn.methods.loss_method import LossMethod
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checkpoints import read_named
from lightning_unlearn.utilities.checks import expected

__all__ = ["checked_trainer", "read_ids", "read_method", "read_methods", "read_repair"]


def read_ids(forget: Sequence[str | int] | str) -> list[SampleId]:
    r"""The ids to forget: a list as it is, or the content of a file.

    A file holds one id a line, or a JSON list. A line that an integer would be printed as is that integer; any other,
    such as `007`, is a string. In JSON, as in a list, the quotes say what is a string.

    Args:
        forget: The ids, or a local path or fsspec URL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something in it is no id, or it is no text.

    >>> from lightning_unlearn.utilities.files import Files
    >>> Files("memory://doc-ids").publish("forget.txt", b"12\n007\nuser-7\n\n")
    >>> read_ids("memory://doc-ids/forget.txt")
    [12, '007', 'user-7']
    """
    found: Any = forget
    if isinstance(forget, str):
        try:
            text = read_named("forget", forget, "a list of ids or the path of a file with them").decode("utf-8-sig")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            found = json.loads(text) if text.lstrip().startswith("[") else [_number_or_text(line) for line in lines]
        except ValueError as error:  # neither UTF-8 nor JSON
            rule = "the path of a text file with one id a line, or a JSON list"
            raise ValueError(expected("forget", rule, f"{forget} ({error})")) from error
    wrong = [one for one in found if isinstance(one, bool) or not isinstance(one, int | str)]
    if wrong:
        raise ValueError(expected("forget", "ids that are integers or strings", wrong[0], "Put strings in quotes."))
    return list(found)


def read_method(name: str, argument: str = "method") -> UnlearningMethod:
    """A method by its name, with its defaults, or from a file that `save_method` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no such method, or a file that describes none.
    """
    try:
        return as_method(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(expected(argument, "the name of a method, or a file of one", name)) from error


def read_methods(names: Sequence[str] | str) -> list[UnlearningMethod]:
    """One method or several; see `read_method`."""
    return [read_method(name, "methods") for name in ([names] if isinstance(names, str) else names)]


def read_repair(name: str | None) -> LossMethod | None:
    """What is chained after a pass; see `read_method`.

    Raises:
        ValueError: it is no method that trains.
    """
    if name is None:
        return None
    method = read_method(name, "then")
    if not isinstance(method, LossMethod):
        raise ValueError(expected("then", "a method that trains, such as fine-tune", name))
    return method


def checked_trainer(arguments: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Arguments of `Trainer`, if each is one.

    Raises:
        ValueError: one of them is none.
    """
    unknown = sorted(set(arguments or {}) - set(inspect.signature(Trainer).parameters))
    if unknown:
        raise ValueError(expected("trainer", "arguments of lightning.Trainer", unknown))
    return arguments


def _number_or_text(line: str) -> SampleId:
    try:
        number = int(line)
    except ValueError:
        return line
    return number if str(number) == line else line

"""A method in a file, as users of LightningCLI know it: `class_path` and `init_args` in YAML."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_unlearn.methods.base import UnlearningMethod
from lightning_unlearn.methods.registry import METHODS, get_method
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.files import Files

__all__ = ["as_method", "load_method", "save_method"]

_SUFFIXES = (".yaml", ".yml", ".json")
_CLASS, _ARGUMENTS = "class_path", "init_args"
_PLAIN = (type(None), bool, int, float, str, list, tuple, Mapping)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """`SafeLoader`, which makes plain values only, without references and without a second value of a key."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a reference", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return made


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """`SafeDumper` without references between equal lists."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# YAML 1.1 takes 1e-05 for a string. JSON writes such numbers, people do, and LightningCLI reads them; the writer has to
# know as well, so that it puts a string of that form in quotes.
_EXPONENT = re.compile(r"^[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+$")
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def save_method(method: UnlearningMethod, path: str | os.PathLike[str], comment: str = "") -> None:
    """Write a method with all its arguments to a YAML file, wholly or not at all; `load_method` makes it anew.

    Numbers are read back as the same ones, bit for bit.

    Args:
        method: An instance of a registered method.
        path: A local path or an fsspec URL; an existing file is replaced.
        comment: Lines for the top of the file, such as what the values were tuned on.

    Raises:
        ValueError: before anything is written: an argument that is no plain value (a factory, tensors, an infinite
            number), something that was set beside the arguments (`with_updates`), a method that is not registered, a
            comment with characters that are no text, or a name that promises JSON.
        OSError: the file cannot be written.

    >>> from lightning_unlearn.methods import NegGradPlus
    >>> save_method(NegGradPlus(retain_weight=0.95), "memory://doc-config/method.yaml", comment="Chosen by hand.")
    >>> for line in Files("memory://doc-config").read("method.yaml").decode().splitlines()[:4]:
    ...     print(line)
    # Chosen by hand.
    class_path: lightning_unlearn.NegGradPlus
    init_args:
      max_steps: 50
    >>> load_method("memory://doc-config/method.yaml").retain_weight
    0.95
    """
    where, cls = os.fspath(path), type(method)
    if where.lower().endswith(".json"):
        raise ValueError(expected("path", "that of a YAML file", where, "Name it .yaml."))
    if METHODS.get(cls.__name__) is not cls:
        raise ValueError(expected("method", "a registered one", cls.__name__, "Decorate its class with `register`."))
    lines = comment.expandtabs().splitlines()
    if not all(line.isprintable() for line in lines):
        raise ValueError(expected("comment", "lines of text", comment))
    parameters = inspect.signature(cls).parameters
    arguments = {
        name: _plain(name, value, "Leave it out: make such a method in code.")
        for name, value in method.arguments.items()
        # A default that no file can hold will be the same one when the argument is left out.
        if isinstance(value, _PLAIN) or value is not parameters[name].default
    }
    made = cls(**method.arguments).settings
    beside = [name for name, value in method.settings.items() if made.get(name) != value]
    if beside:
        rule = f"what the arguments of {cls.__name__} make it"
        remedy = "A file holds arguments alone: call `with_updates` and the like on what is loaded."
        raise ValueError(expected(beside[0], rule, method.settings[beside[0]], remedy))
    package = "lightning_unlearn" if cls.__module__.split(".")[0] == "lightning_unlearn" else cls.__module__
    content = {_CLASS: f"{package}.{cls.__qualname__}", _ARGUMENTS: arguments}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    files, name = Files(where).sibling("")
    files.publish(name, "".join([*(f"# {line}".rstrip() + "\n" for line in lines), text]).encode())


def load_method(path: str | os.PathLike[str]) -> UnlearningMethod:
    """Make the method that a file describes; `save_method` writes such files, and JSON of that form is read as well.

    The class is looked up among the registered methods, by the last name of `class_path`: nothing that a file names is
    imported, and nothing in it is run. Arguments that are not there have their defaults.

    Args:
        path: A local path or an fsspec URL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such description, its class is not registered, or the class does not take the
            arguments.
    """
    where = os.fspath(path)
    files, name = Files(where).sibling("")
    content = _parsed(where, files.read(name))
    if not isinstance(content, Mapping) or not isinstance(content.get(_CLASS), str):
        raise ValueError(expected(where, f"a mapping with `{_CLASS}` and `{_ARGUMENTS}`", content))
    strange = [key for key in content if key not in (_CLASS, _ARGUMENTS)]
    if strange:
        raise ValueError(expected(f"keys of {where}", f"`{_CLASS}` and `{_ARGUMENTS}`", strange))
    last = content[_CLASS].rpartition(".")[2]
    try:
        cls = get_method(last)
    except ValueError as error:
        remedy = "Import the module that registers it first."
        raise ValueError(expected(_CLASS, "that of a registered method", content[_CLASS], remedy)) from error
    arguments = {} if content.get(_ARGUMENTS) is None else content[_ARGUMENTS]
    known = inspect.signature(cls).parameters
    if not isinstance(arguments, Mapping):
        raise ValueError(expected(f"{_ARGUMENTS} in {where}", "a mapping", arguments))
    unknown = [key for key in arguments if key not in known]
    if unknown:
        rule = f"arguments of {cls.__name__} ({', '.join(known) or 'it has none'})"
        raise ValueError(expected(f"{_ARGUMENTS} in {where}", rule, unknown))
    values = {key: _plain(key, value, f"See {where}.") for key, value in arguments.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} See {where}.") from error


def as_method(method: object) -> UnlearningMethod:
    """What `unlearn` takes as a method: an instance, a name (then with its defaults), or the path of a file.

    A string is a path if it ends in .yaml, .yml or .json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no such method, or see `load_method`.
        TypeError: neither.

    >>> as_method("neg-grad-plus").name
    'NegGradPlus'
    """
    if isinstance(method, UnlearningMethod):
        return method
    if isinstance(method, os.PathLike) or (isinstance(method, str) and method.lower().endswith(_SUFFIXES)):
        return load_method(method)
    return get_method(method)()


def _parsed(where: str, data: bytes) -> Any:
    try:
        return yaml.load(data.decode(), Loader=_Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected `{where}` to be YAML, but got what cannot be read: {reason}.") from error


def _plain(name: str, value: Any, remedy: str) -> Any:
    """The value of an argument as a file holds it: made of `None`, bool, int, float, str, list and dict alone."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(expected(name, "a finite number", value, remedy))
    for kind in (str, int, float):  # of subclasses, such as a number of NumPy's or an enumeration, the value
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, list | tuple):
        return [_plain(name, one, remedy) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(f"{name}[{key!r}]", one, remedy) for key, one in value.items()}
    raise ValueError(expected(name, "a number, text, or lists and mappings of those", value, remedy))

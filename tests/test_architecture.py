"""Layers point one way, exports exist, and everything public is annotated and documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import pytest

import lightning_unlearn

ROOT = Path(lightning_unlearn.__file__).parent
PACKAGE = "lightning_unlearn"

# A module may import from lower ranks, and inside its own folder. Two folders of one rank may not see each other.
RANK = {
    "__about__": 0,
    "exceptions": 0,
    "types": 0,
    "results": 1,
    "utilities": 2,
    "functional": 3,
    "data": 3,
    "store": 4,
    "deltas": 5,
    "shards": 5,
    "methods": 6,
    "metrics": 6,
    "modules": 7,
    "callbacks": 8,
    "procedures": 9,
    "tuning": 10,
    "report": 10,
    "api": 11,
    "commands": 12,
    "demo": 12,
    "cli": 13,
    "__init__": 14,
    "__main__": 14,
}


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    """Imported first-party modules, their line, and whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [node.module or ""]
            if node.module == PACKAGE:
                names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, id(node) in inside) for name in names if name.split(".")[0] == PACKAGE]
    return found


def violations(path: Path, name: str, imports: list[tuple[str, int, bool]]) -> list[str]:
    own = room_of(name)
    wrong = []
    for target, line, in_function in imports:
        other = room_of(target)
        if in_function:
            wrong.append(f"{path}:{line} imports {target} inside a function")
        if other != own and RANK[other] >= RANK[own]:
            wrong.append(f"{path}:{line} imports {target}: {own} may not see {other}")
    return wrong


def test_layers_point_one_way() -> None:
    wrong = [line for path in sources() for line in violations(path, module_name(path), imports_of(path))]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_a_wrong_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from lightning_unlearn.api import unlearn\n")
    assert len(violations(bad, f"{PACKAGE}.functional.bad", imports_of(bad))) == 2
    good = tmp_path / "good.py"
    good.write_text("from lightning_unlearn.types import SampleId\n")
    assert not violations(good, f"{PACKAGE}.functional.good", imports_of(good))
    with pytest.raises(KeyError):
        violations(good, f"{PACKAGE}.unknown_room.good", imports_of(good))


def test_every_file_has_a_room() -> None:
    assert {room_of(module_name(path)) for path in sources()} <= set(RANK)


def test_no_import_cycle() -> None:
    graph = {module_name(path): {name for name, _, _ in imports_of(path)} for path in sources()}
    # `from package import name` may name a module or an object of it; keep what is a module.
    graph = {name: {item for item in targets if item in graph and item != name} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_files_stay_readable() -> None:
    long = {str(path): count for path in sources() if (count := len(path.read_text().splitlines())) > 350}
    assert not long


def test_no_assert_and_no_bare_except() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts"
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(item, ast.Pass) for item in node.body)
                assert node.type is not None, f"{path}:{node.lineno} catches everything"
                assert not silent, f"{path}:{node.lineno} passes over an exception"


def modules() -> list[str]:
    return [info.name for info in pkgutil.walk_packages(lightning_unlearn.__path__, f"{PACKAGE}.")]


@pytest.mark.parametrize("name", [PACKAGE, *modules()])
def test_exports_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    if name.endswith("__main__"):
        return
    if not hasattr(module, "__all__"):
        has_public = any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            for node in ast.parse(Path(str(module.__file__)).read_text()).body
        )
        assert not has_public, f"{name} defines public names and no __all__"
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for export in module.__all__:
        value = getattr(module, export)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{export} has no docstring"
            if str(getattr(value, "__module__", "")).startswith(PACKAGE):
                check_annotated(value, f"{name}.{export}")


def check_annotated(value: object, where: str) -> None:
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        missing = [item.name for item in signature.parameters.values() if item.annotation is inspect.Parameter.empty]
        assert not missing, f"{where}: {missing} not annotated"
        assert signature.return_annotation is not inspect.Signature.empty, f"{where}: return not annotated"
        return
    for attribute, member in vars(typing.cast(type, value)).items():
        # Classes of the package only; a mixed-in or generated method has another home.
        if attribute.startswith("_") or not inspect.isfunction(member):
            continue
        if member.__module__.startswith(PACKAGE):
            assert inspect.getdoc(getattr(value, attribute)), f"{where}.{attribute} has no docstring"


def test_import_is_light() -> None:
    """`import lightning_unlearn` alone must not pull in lightning or torchvision."""
    import subprocess
    import sys

    code = "import sys, lightning_unlearn; print([m for m in ('lightning', 'torch', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert out.stdout.strip() == "[]"

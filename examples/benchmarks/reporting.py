"""What every benchmark says: the machine it ran on, a table for people, and JSON for machines."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["machine", "show", "write_json"]

_PACKAGES = ("torch", "lightning", "numpy", "numba", "zstandard", "safetensors")


def _processor() -> str:
    """The processor's name, as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, instruction set, threads, accelerator, versions; no name of the host."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
    }


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print rows as a table; numbers with four significant digits, a dash where a row has no value."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    Console().print(table)


def write_json(path: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `{"machine": ..., "rows": [...]}`, where a path was given."""
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1, allow_nan=False) + "\n")

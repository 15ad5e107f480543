"""`UnlearningReport`: a document that can be written as JSON or HTML and printed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_unlearn.__about__ import __version__
from lightning_unlearn.report.content import Document, Section
from lightning_unlearn.report.html import render_html
from lightning_unlearn.report.sections import results_section, say_and_do_not_say
from lightning_unlearn.report.terminal import print_document
from lightning_unlearn.results import EvaluationResult, to_dict
from lightning_unlearn.utilities.files import Files

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["UnlearningReport"]


class UnlearningReport(Document):
    """A report for someone who has to decide whether the data were forgotten.

    Build it from sections of your own, or from evaluations with :meth:`from_results`.

    >>> report = UnlearningReport("Request 7", "One contributor was forgotten.", (Section("What was asked"),))
    >>> report.to_dict()["sections"][0]["title"]
    'What was asked'
    """

    @classmethod
    def from_results(
        cls,
        title: str,
        arms: Mapping[str, Sequence[EvaluationResult]],
        *,
        asked: str,
        done: str,
        summary: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> UnlearningReport:
        """A report on several methods, each evaluated once or with several seeds.

        Args:
            title: Of the report.
            arms: Name of a method -> its evaluations, one a seed.
            asked: What was to be forgotten, in a sentence or two.
            done: What was done for it.
            summary: One paragraph that may be read alone; by default the verdicts.
            metadata: Name -> value, shown at the end; the version of this package is added.

        Returns:
            The report, with what the numbers say and what they do not say.

        Raises:
            ValueError: there is no arm, or an arm without an evaluation.
        """
        findings = results_section("What the numbers say", arms)
        sections = (
            Section("What was asked", (asked,)),
            Section("What was done", (done,)),
            findings,
            say_and_do_not_say(arms),
        )
        about = {**(metadata or {}), "lightning-unlearn": __version__}
        return cls(title, summary or findings.paragraphs[0], sections, about)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data; the figures' pictures are left out, their descriptions are not."""
        content = dict(to_dict(self))
        for section in content["sections"]:
            for figure in section["figures"]:
                del figure["svg"]
        return content

    def to_json(self, path: str | os.PathLike[str], *, data: Mapping[str, Any] | None = None) -> Path:
        """Write the report as JSON.

        Args:
            path: File to write; missing folders are made.
            data: More to store beside it under `"data"`, such as the single evaluations.

        Returns:
            The path written.
        """
        content = self.to_dict() if data is None else {**self.to_dict(), "data": to_dict(data)}
        return _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one self-contained HTML page and return its path; missing folders are made."""
        return _write(path, render_html(self))

    def print(self, console: Console | None = None) -> None:
        """Print the words and tables to a rich console, by default one on standard output."""
        from rich.console import Console as Terminal

        print_document(self, console or Terminal())


def _write(path: str | os.PathLike[str], text: str) -> Path:
    target = Path(path)
    # Whole or not at all, also where several processes write it at once.
    Files(target.parent).publish(target.name, text.encode())
    return target

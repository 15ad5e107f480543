"""A report as one self-contained HTML page: no script, no font, no file and no network beside it."""

from __future__ import annotations

from importlib.resources import files

from lightning_unlearn.report.content import Document, format_cell

__all__ = ["render_html"]


def render_html(document: Document) -> str:
    """Render the page. All text is escaped; only the figures' SVG is taken as it is.

    >>> "&lt;b&gt;" in render_html(Document("<b>"))
    True
    """
    from jinja2 import Environment, StrictUndefined

    source = files("lightning_unlearn.report").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    return template.render(document=document, cell=format_cell)

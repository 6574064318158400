"""What the pages of all reports share: the frame around them, `page.html`, and `page.css`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """A page that needs no other file.

    Args:
      template: extends ``page.html``, with a block ``body``.
      values: ``title``, ``about`` (name to value, at the top), and what the template asks for.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(autoescape=True, loader=FileSystemLoader(HERE))
    found = environment.get_template(template.relative_to(HERE).as_posix())
    return found.render(style=(HERE / "page.css").read_text(encoding="utf-8"), **values)

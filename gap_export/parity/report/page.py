"""Pages of HTML: one way to fill a template, which escapes all that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


def load_page(path: Path) -> Template:
    """A template of a page; the extra ``report`` is installed.

    Text is escaped, and a name that is not given is an error. The filter ``svg`` passes pictures as
    they are: matplotlib escapes what it writes.

    Args:
        path: Beside the module that fills it.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    return environment.from_string(path.read_text(encoding="utf-8"))

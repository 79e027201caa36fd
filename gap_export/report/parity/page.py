"""Pages of HTML: one way to fill a template, which escapes all that it is given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template

_STYLE = Path(__file__).with_name("page.css")


def load_page(path: Path) -> Template:
    """A template of a page; the extra ``report`` is installed.

    Text is escaped, and a name that is not given is an error. The filter ``svg`` passes pictures as
    they are: matplotlib escapes what it writes. ``breakable`` lets a browser break a line within a
    name, and ``shared_style`` is what all pages look like.

    Args:
        path: Beside the module that fills it.
    """
    import jinja2
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        # Of a string alone: a Markup would escape what is put in.
        return Markup(re.sub(r"(?<=[^\W\d])([_/.])(?=\w)", r"\1<wbr>", str(escape(text))))  # noqa: S704

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["breakable"] = breakable
    environment.globals["shared_style"] = Markup(_STYLE.read_text(encoding="utf-8").rstrip())  # noqa: S704 - ours
    return environment.from_string(path.read_text(encoding="utf-8"))

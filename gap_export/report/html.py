"""One page of HTML that needs nothing but itself, for people to read and to keep."""

from __future__ import annotations

import re
from pathlib import Path

from gap_export.report.document import STATUS_WORDS, Document
from gap_export.version import __version__

_FOLDER = Path(__file__).parent
# No one reads ten thousand rows on a page; all of them are in the JSON form.
_MAX_ROWS = 500


def to_html(document: Document) -> str:
    """Write a report as a page; the extra ``report`` is installed.

    The template escapes all text, and a name that it is not given is an error.
    """
    import jinja2
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        """Text in which a browser may break a line within a name."""
        # Of a string alone: a Markup would escape what is put in.
        return Markup(re.sub(r"(?<=[^\W\d])([_/.])(?=\w)", r"\1<wbr>", str(escape(text))))  # noqa: S704

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Figures are inserted as they are: matplotlib escapes what it writes.
    environment.filters.update(svg=Markup, breakable=breakable)
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    template = environment.from_string((_FOLDER / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        document=document,
        status_words=STATUS_WORDS,
        status_of={word: status for status, word in STATUS_WORDS.items()},
        style=Markup(style.rstrip()),  # noqa: S704 - ours
        max_rows=_MAX_ROWS,
        version=__version__,
    )

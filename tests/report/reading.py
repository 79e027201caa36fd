"""Reading what reports write."""

from __future__ import annotations

from html.parser import HTMLParser

from markdown_it import MarkdownIt


class Page(HTMLParser):
    """Tags, attributes and text of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.line = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def rendered(markdown: str) -> Page:
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def table_of(markdown: str, title: str) -> list[list[str]]:
    """Rows of the table below a title, cell by cell, as they are rendered."""
    lines = markdown.split(f"**{title}**")[1].split("\n\n")[1].splitlines()
    return [
        [rendered(cell).text.strip() for cell in line.strip("| ").split(" | ")] for line in lines
    ]

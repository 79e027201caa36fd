"""Text in Markdown reports: it stays text, and can be read as it stands."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.report.markdown import escape

# What there is to break out with.
PIECES = [
    *"\\`*_[]()<>|~$&#!@:./-+= \n\t", "a", "B9", "1. ", "- ", "# ", "```", "~~~", "---", "**",
    "![x](y)", "<img src=x>", "<!--", "&lt;", "&#64;", "https://a.b/c", "www.a.b", "__init__",
    "@user", "#12",
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "milliseconds by stage: median / 95th percentile",
        "Acc@0.5 by the protocol unpad",
        "refcoco:~/refer:val".replace("~", ""),
        "/home/me/bundle-0.3/vision_encoder.onnx, 12.5 %",
        "float32: 0.0001 + 0.0001 of the value; 2x2 (a, b) = c",
        "a 'quoted' \"name\", it's fine; x^2; {json}",
    ],
)
def test_what_needs_no_escaping_is_left_as_it_is(text):
    assert escape(text) == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", "a&#124;b"),
        ("<b>", "&#60;b&#62;"),
        ("![x](https://h/y)", "!\\[x\\](https&#58;//h/y)"),
        ("`rm`", "\\`rm\\`"),
        ("two\nlines", "two&#10;lines"),
        ("@user and a@b.com", "&#64;user and a&#64;b.com"),
        ("#12", "&#35;12"),
        ("- item", "&#45; item"),
        ("1. item", "&#49;. item"),
        ("_x_ but not x_y", "\\_x\\_ but not x_y"),
        ("www.host.org", "www&#46;host.org"),
        (":smile:", "&#58;smile:"),
        ("C:\\x", "C:\\\\x"),
        ("\x1b[31m", "\\\\x1b\\[31m"),
        ("a\u202eb", "a\\\\u202eb"),
    ],
)
def test_what_would_be_markup_is_escaped(text, escaped):
    assert escape(text) == escaped


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_reader_of_markdown_sees_the_text_and_nothing_else(text):
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py comes with rich")
    reader = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = reader.render(f"| head |\n| --- |\n| x{escape(text)}x |\n")
    (cell,) = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    assert html.unescape(cell) == f"x{text}x"
    assert "<" not in cell
    page = reader.render(f"- name: {escape(text)}x\n")
    assert re.fullmatch(r"<ul>\n<li>name:[^<]*</li>\n</ul>\n", page, flags=re.DOTALL)

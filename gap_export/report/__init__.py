"""Reports of ``check`` and ``eval``: tables, HTML, SVG, Markdown, JUnit."""

"""A page in one file: sections, styles and script inside, nothing to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from nngeom.page.blocks import Section

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, facts: dict[str, str], sections: Sequence[Section], footer: str) -> str:
    """The whole file: ``facts`` below the ``title``, then the ``sections``, a ``footer``."""
    links = "".join(f'<a href="#s{j}">{escape(section.title)}</a>' for j, section in enumerate(sections))
    told = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    body = "".join(_section(section, f"s{j}") for j, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><dl>{told}</dl></header>\n<nav><div>{links}</div></nav>\n<main>\n{body}"
        f"<footer>{escape(footer)}</footer></main>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, name: str) -> str:
    blocks = "".join(block.html(f"{name}b{j}") for j, block in enumerate(section.blocks))
    return f'<section id="{name}"><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{blocks}</section>\n'


def _asset(name: str) -> str:
    return (files("nngeom.page") / "assets" / name).read_text(encoding="utf-8")

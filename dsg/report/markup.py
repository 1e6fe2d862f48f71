"""The few HTML elements that the report is made of; whatever is not `Html` is escaped."""

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Markup that this package made itself and that must not be escaped again."""


def to_html(content: object) -> Html:
    """Escape anything but `Html`."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Concatenate, escaping what is not `Html`."""
    return Html(Html(separator).join(to_html(part) for part in parts))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """`<tag attributes>content</tag>`; write `class_` for the attribute `class`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{written}>{join(content)}</{tag}>")


def bullets(items: Iterable[object]) -> Html:
    """An unordered list."""
    return element("ul", *(element("li", item) for item in items))


def table(caption: object, headers: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table in a box that scrolls sideways; the first cell of a row is its heading."""
    head = element("tr", *(element("th", header, scope="col") for header in headers))
    body = join(
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell) for cell in rest),
        )
        for first, *rest in rows
    )
    whole = element(
        "table",
        element("caption", element("div", caption)),
        element("thead", head),
        element("tbody", body),
    )
    # A scrolling box must be reachable by keyboard, and then needs a name.
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label="Table")


def chart(svg: Html, caption: object) -> Html:
    """A figure with its caption."""
    return element("figure", svg, element("figcaption", caption))


def section(identifier: str, title: str, *content: object) -> Html:
    """A section with a heading that can be linked to."""
    return element("section", element("h2", title), *content, id=identifier)


def page(title: str, *content: object) -> str:
    """A complete HTML document that loads nothing from elsewhere."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = f"<main><h1>{html.escape(title)}</h1>{join(content)}</main>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


_STYLE = """
:root { color-scheme: light; --line: #c9ced6; --soft: #f3f5f8; --ink: #16191d; --dim: #515a66; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.25rem; margin: .25rem 0 .75rem; }
li { margin: .2rem 0; }
.dim, figcaption, caption, small { color: var(--dim); }
.absent { color: var(--dim); font-style: italic; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
.scroll:focus-visible { outline: 2px solid #0059b3; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-size: .875rem; }
caption div { position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .35rem .5rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--soft); vertical-align: bottom; border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 600; background: #fff; position: sticky; left: 0; }
thead th:first-child { position: sticky; left: 0; }
td small { display: block; white-space: nowrap; }
.number { white-space: nowrap; }
.flag { font-weight: 600; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.chart { width: 100%; max-width: 32rem; }
figure { margin: .5rem 0 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .875rem; margin-top: .4rem; }
mark { background: #ffe08a; font-weight: 600; padding: 0 .1em; border-bottom: 2px solid var(--ink);
  color: inherit; }
.contexts { min-width: 18rem; } .contexts div { margin-bottom: .25rem; }
details { margin: .75rem 0; } summary { cursor: pointer; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: .8125rem; }
@media print { .scroll { overflow: visible; } details { display: none; } }
"""

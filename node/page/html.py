"""HTML from small functions: whatever is not already `Html` is escaped. No template library: this is one page, and memory is short.

    tag("p", "1 < 2", class_="quiet")  ->  <p class="quiet">1 &lt; 2</p>

A value becomes HTML in two ways only: as a child or an attribute of `tag`, escaped; or by writing `Html(...)` around text of our own.
"""

from collections.abc import Iterable
from html import escape

VOID = frozenset(("br", "input", "link", "meta"))  # elements without an end tag


class Html(str):
    """Text that may stand in a page as it is."""

    __slots__ = ()


Child = object  # a string, Html, None (nothing), or an iterable of them


def text(value: Child) -> Html:
    """`value` as HTML: escaped, unless it is HTML already; the parts of an iterable one after the other; nothing for None and False."""
    if isinstance(value, Html):
        return value
    if value is None or value is False:
        return Html()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return Html("".join(text(part) for part in value))
    return Html(escape(str(value), quote=True))


def tag(element: str, /, *children: Child, **attributes: str | int | bool | None) -> Html:
    """One element. `class_` is the class, `aria_label` is aria-label; None and False leave an attribute out, True leaves it bare."""
    told = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    if element in VOID:
        return Html(f"<{element}{told}>")
    return Html(f"<{element}{told}>{text(children)}</{element}>")


def _attribute(key: str, value: str | int | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(value)}"'

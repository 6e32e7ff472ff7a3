"""A matplotlib figure as an SVG element inside a page: the page's font, and colours that follow its style sheet."""

import io
import re
from collections.abc import Mapping
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure


def element(name: str, title: str, figure: Figure, colors: Mapping[str, str]) -> str:
    """The figure as `<svg>`, without size, so that it fills its place, and without a background.

    Args:
      name: unique on the page: the element's references within it are made from it.
      title: for readers who do not see the figure.
      colors: by the figure's colour, such as `#0072B2`, the one that the page gives it, such as `var(--blue)`.
    """
    written = io.StringIO()
    # text stays text, and equal figures get equal references
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    # its style would be the whole page's
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    # groups of several figures have the same names, and nothing refers to those
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", re.sub(r"\s*\n\s*", " ", text))
    for ours, pages in colors.items():
        text = re.sub(rf"{ours}\b", pages, text, flags=re.IGNORECASE)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None, "matplotlib writes it always"
    head = f'<svg {box[0]} role="img" aria-label="{escape(title)}" fill="currentColor" stroke-linejoin="round">'
    return head + text[text.index(">") + 1 :].strip()

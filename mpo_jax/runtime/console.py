"""The console for all messages. Samples, paths and servers' messages are shown as text, whatever is in them."""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mpo_jax.runtime.words import UNSEEN, printable

PLAIN_WIDTH = 110
TAGS = "yellow|bold|dim|red|green"
"""The styles that messages use."""
_TAGGED = re.compile(rf"\s*\[(?:{TAGS})\]")
_OTHER_TAG = re.compile(rf"(?<!\\)(\\\\)*(?=\[(?!/?(?:{TAGS})\])[a-z#/@][^\[]*?\])")


class Console(RichConsole):
    """rich's console, which takes only a message that begins with one of TAGS for markup, and no control characters."""

    def print(self, *objects: Any, markup: bool | None = None, **options: Any) -> None:
        """As rich's, and text is as it is unless it begins with a style."""
        texts = [one for one in objects if isinstance(one, str)]
        if markup is None and texts and not any(map(_TAGGED.match, texts)):
            markup = False
        super().print(*objects, markup=markup, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, and tags other than TAGS are text."""
        if options.get("markup") is not False:
            text = _OTHER_TAG.sub(lambda found: f"{found[0]}\\", text)
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with control characters spelled out."""
        for segment in super().render(renderable, options):
            if segment.control is None and UNSEEN.search(segment.text):
                yield Segment(printable(segment.text), segment.style)
            else:
                yield segment


console = Console(highlight=False, emoji=False)
if not console.is_terminal:
    console = Console(highlight=False, emoji=False, width=PLAIN_WIDTH)

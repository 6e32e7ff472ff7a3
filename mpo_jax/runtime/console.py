"""The console for all messages."""

from rich.console import Console

PLAIN_WIDTH = 110
console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)

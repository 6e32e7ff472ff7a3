"""mpo_jax.runtime.console: text of others is text, on a terminal too."""

import io

from rich.markup import escape
from rich.table import Table

from mpo_jax.runtime.console import Console
from mpo_jax.runtime.words import printable


def shown(*objects: object) -> str:
    console = Console(highlight=False, emoji=False, file=io.StringIO(), width=100, force_terminal=True)
    for one in objects:
        console.print(one)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tags_in_a_path_are_its_name():
    path = "/a[red]b[/]/[link=http://x]c[/link]:smile:"
    assert shown(f"wrote {path}") == f"wrote {path}\n"


def test_a_message_has_its_own_style_and_no_other():
    assert shown("[yellow]cut: [blink]a[/b][/yellow]") == "\x1b[33mcut: [blink]a[/b]\x1b[0m\n"


def test_control_characters_are_spelled_out():
    found = shown("a\x1b]0;title\x07\x1b[2J\x9b31m\u202eb")
    assert found == r"a\x1b]0;title\x07\x1b[2J\x9b31m\u202eb" + "\n"


def test_cells_of_a_table_too():
    table = Table()
    table.add_column(escape("[bold]n"))
    table.add_row("[red]NO[/red]")
    table.add_row("[foo]\x1b[2J")
    found = shown(table)
    assert "\x1b[31mNO\x1b[0m" in found and r"[foo]\x1b[2J" in found and "\x1b[2J" not in found


def test_line_breaks_and_letters_stay():
    assert printable("a\n\tb \u00e9 \u4e2d \U0001f600") == "a\n\tb \u00e9 \u4e2d \U0001f600"

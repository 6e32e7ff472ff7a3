"""The page in a real Chromium, opened as a file: keys, progress, saving, going on, and no network."""

import json

import pytest

from mpo_jax.tools.human import export
from mpo_jax.tools.human.importing import read_sheet
from tests.tools.human.studies import study

STUDY = study()
COUNT = len(STUDY.items)


@pytest.fixture
def sheet(tmp_path):
    path = tmp_path / "study.html"
    path.write_text(export.page(STUDY), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, sheet):
    """Opens the page in a browser without a memory of other tests; `requests` are all that it asks for."""
    contexts = []

    def open_page(context=None):
        if context is None:
            context = browser.new_context(accept_downloads=True)
            contexts.append(context)
        page = context.new_page()
        page.requests, page.faults = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.goto(sheet.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def begin(page, name="Ann B"):
    page.fill("#annotator", name)
    page.press("#annotator", "Enter")


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def progress(page):
    assert page.inner_text("#count") == f"{page.evaluate('bar.value')} of {COUNT} done"
    return int(page.evaluate("bar.value"))


def item(page):
    return int(page.inner_text("#number").removeprefix("Item "))


def save(page, folder):
    with page.expect_download() as download:
        page.keyboard.press("s")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_all_items_by_keys_into_a_file_that_the_import_takes(opened, tmp_path):
    page = opened()
    begin(page)
    keys = {"left": ("1", "ArrowLeft"), "tie": ("2", "ArrowDown"), "right": ("3", "ArrowRight")}
    wanted = {}
    for number, asked in enumerate(STUDY.items):
        choice = ("left", "tie", "right")[number % 3]
        wanted[asked.number] = choice
        assert (item(page), progress(page)) == (asked.number, number)
        for part in ("prompt", "left", "right"):
            # as written: markup is text, and white space stays
            assert page.evaluate(f"document.getElementById('{part}').textContent") == getattr(asked, part).strip()
        press(page, keys[choice][number // 3 % 2])
    assert progress(page) == COUNT and page.is_visible("#done")
    path = save(page, tmp_path)
    assert path.name == f"study-{STUDY.id}-Ann_B.json"
    found = read_sheet(path, STUDY)
    assert found.annotator == "Ann B" and found.choices == wanted
    assert page.title().startswith("Which answer is better?"), "a text has run as a script"
    assert page.requests == [page.url] and page.url.startswith("file:") and page.faults == []


def test_going_back_and_changing_one_s_mind(opened, tmp_path):
    page = opened()
    begin(page)
    assert page.is_disabled("#back") and page.is_hidden("#done")
    press(page, "1", "Enter", "3")  # the second item is passed over
    assert (item(page), progress(page)) == (4, 2)
    press(page, "Backspace", "Backspace", "Backspace")
    assert item(page) == 1
    assert page.get_attribute("[data-choice=left]", "aria-pressed") == "true"
    press(page, "2", "o")
    assert (item(page), progress(page)) == (2, 2), "o opens the first item without a choice"
    page.click("[data-choice=right]")
    assert (item(page), progress(page)) == (3, 3)
    press(page, "Control+1", "x", "Backspace", "Backspace", "Backspace", "Backspace")
    assert (item(page), progress(page)) == (1, 3)
    choices = json.loads(save(page, tmp_path).read_text())["choices"]
    assert choices == {"1": "tie", "2": "right", "3": "right"}


def test_it_goes_on_after_it_was_closed(opened):
    """In the same browser by name; another name begins anew."""
    page = opened()
    begin(page)
    press(page, "1", "2", "3")
    assert page.inner_text("#unsaved") == "3 changes not in a file yet"
    context = page.context
    page.close()
    again = opened(context)
    begin(again)
    assert (item(again), progress(again)) == (4, 3) and again.inner_text("#unsaved").startswith("3 ")
    other = opened(context)
    begin(other, "Someone else")
    assert (item(other), progress(other)) == (1, 0)


def test_after_a_reload_it_says_that_choices_are_kept(opened):
    page = opened()
    assert page.is_hidden("#earlier"), "nothing is kept yet"
    begin(page)
    assert page.is_hidden("#kept")
    press(page, "1", "2")
    page.reload()
    assert "kept, under the name Ann B" in page.inner_text("#earlier")
    assert page.input_value("#annotator") == "Ann B"
    page.click("#begin")
    assert page.inner_text("#kept") == "Kept from before: 2 choices. Go on where you stopped."
    assert (item(page), progress(page)) == (3, 2)
    press(page, "3")
    assert page.is_hidden("#kept")
    begin(opened(page.context), "Someone else")
    page.reload()
    assert page.input_value("#annotator") == "Ann B", "who has chosen nothing is not offered"


def test_criteria_are_shown_before_and_at_hand_while_choosing(opened):
    page = opened()
    assert page.is_visible("#start .criteria li")
    begin(page)
    assert page.is_hidden("#work .criteria li")
    page.click("#work .criteria summary")
    assert page.is_visible("#work .criteria li")


def test_the_page_follows_the_system_s_colours(opened):
    page = opened()
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        begin(page) if page.is_visible("#start") else None
        colors = "const s = getComputedStyle(document.querySelector('[data-choice]')); [s.backgroundColor, s.color]"
        seen[scheme] = page.evaluate(colors)
    assert seen["light"] == ["rgb(255, 255, 255)", "rgb(29, 35, 41)"]
    assert seen["dark"] == ["rgb(20, 24, 28)", "rgb(226, 230, 234)"]


def test_it_goes_on_from_its_file_in_another_browser(opened, tmp_path):
    page = opened()
    begin(page)
    press(page, "3", "3")
    path = save(page, tmp_path)
    assert page.inner_text("#unsaved") == ""
    other = opened()
    other.set_input_files("#file", path)
    other.wait_for_selector("#work", state="visible")
    assert (item(other), progress(other)) == (3, 2)
    press(other, *"1" * (COUNT - 2))
    found = read_sheet(save(other, tmp_path), STUDY)
    assert found.annotator == "Ann B" and list(found.choices.values()) == ["right"] * 2 + ["left"] * (COUNT - 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "is no file that this page saved"),
        ('{"study": "x"}', "does not belong to this study"),
        ("null", "does not belong to this study"),
    ],
)
def test_a_file_of_something_else_is_refused(opened, tmp_path, text, says):
    page = opened()
    (tmp_path / "other.json").write_text(text)
    page.set_input_files("#file", tmp_path / "other.json")
    page.wait_for_selector("#trouble", state="visible")
    assert says in page.inner_text("#trouble") and page.is_hidden("#work")


def test_a_name_is_asked_for(opened):
    page = opened()
    page.click("#begin")
    assert "Give a name" in page.inner_text("#trouble") and page.is_hidden("#work")
    press(page, "1")
    assert page.input_value("#annotator") == "1", "a digit in the name is no choice"


def test_without_the_browser_s_storage(opened):
    page = opened()
    page.evaluate("Object.defineProperty(window, 'localStorage', { get() { throw new Error('forbidden'); } })")
    begin(page)
    press(page, "1", "2")
    assert (item(page), progress(page)) == (3, 2) and page.faults == []

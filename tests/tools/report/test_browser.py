"""The report in a real Chromium: nothing goes wrong, nothing sticks out, folded parts open on paper."""

import pytest

from mpo_jax.config.schema import Config
from mpo_jax.tools.report.page import write_report
from tests.tools.report import workdirs


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of rows like the paper's, so that folded tables are there; one word is wider than a phone."""
    config = Config(workdir="w", data={"kind": "hh", "path": ["train.jsonl"]})
    runs = ("sft", "dpo", "mpo")
    prompts = ["a" * 300, *(f"prompt {number}" for number in range(9))]
    sampled = {run: workdirs.samples(run, prompts) for run in runs}
    made = workdirs.make(
        tmp_path_factory.mktemp("work"), runs, metrics=True, select=True, sampled=sampled,
        configs=dict.fromkeys(runs, config),
    )  # fmt: skip
    return write_report(made, resamples=20).as_uri()


@pytest.fixture
def opened(browser, report):
    """Opens it at a size, in an order of colours; `faults` is what the browser complains of."""
    contexts = []

    def open_page(width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.goto(report)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_and_the_contents_stay_in_view(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("document.getElementById('calibration').scrollIntoView()")
    page.wait_for_selector("nav a[href='#calibration'][aria-current]")
    assert page.locator("nav [aria-current]").count() == 1
    assert page.evaluate("document.querySelector('nav').getBoundingClientRect().top") == 0
    # the heading that was asked for is not below the contents
    below = "document.querySelector('#calibration h2').getBoundingClientRect().top"
    assert page.evaluate(below) >= (page.evaluate("document.querySelector('nav').offsetHeight") if width < 1000 else 0)
    assert page.faults == []


def test_dark_pages_have_light_figures(opened):
    color = "getComputedStyle(document.querySelector('figure svg text')).fill"
    assert [opened(scheme=scheme).evaluate(color) for scheme in ("light", "dark")] == [
        "rgb(29, 35, 41)", "rgb(226, 230, 234)",
    ]  # fmt: skip


def test_paper_is_white_and_shows_what_is_folded(opened):
    page = opened(scheme="dark")
    folded = page.locator("details:not([open])").count()
    assert folded > 5
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0 and page.is_visible("#paper td")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.is_hidden("nav")
    assert page.evaluate("getComputedStyle(document.querySelector('.sample')).breakInside") == "avoid"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded


def test_the_contents_open_the_folded_part_that_they_lead_to(opened):
    page = opened()
    assert page.is_hidden("#claims td")
    page.click("nav a[href='#claims']")
    assert page.locator("#claims td").first.is_visible()


def test_samples_are_found_and_more_are_shown(opened):
    page = opened()
    shown = page.locator("#sample-list article:visible")
    assert shown.count() == 6
    page.click("#sample-more")
    assert shown.count() == 10
    page.fill("#sample-search", "AAAA")
    assert shown.count() == 1 and page.inner_text("#sample-count") == "1 of 10"

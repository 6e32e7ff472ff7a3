"""A real Chromium for the pages that the tools write."""

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")


def executable() -> str:
    named = os.environ.get("MPO_CHROMIUM")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on PATH, and MPO_CHROMIUM names none")
    return found


@pytest.fixture(scope="package")
def browser():
    path = executable()
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright: bash launch/setup.sh test")
    with sync_api.sync_playwright() as playwright:
        # as root, and in containers, Chromium's own sandbox does not start; the page is ours
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()

"""The page at `/`: what it says without a browser, and what it does in a real Chromium."""

import asyncio
import re
import shutil

import httpx
import pytest

from satchel.run.server.app import PAGE
from satchel.run.server.keys import Bucket, Client, Keys, _digest
from tests.run.server.toy import Running, client_of, toy_house

HTML = PAGE.read_text()
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def test_the_page_is_one_light_file_that_fetches_nothing_from_elsewhere():
    assert len(HTML) < 20_000
    assert not re.search(r"""(?:src|href)=["']|@import|url\(|https?://""", HTML)


def test_every_element_that_the_script_names_is_there_and_every_field_has_a_label():
    ids = set(re.findall(r'id="(\w+)"', HTML))
    assert set(re.findall(r'\$\("(\w+)"\)', HTML)) <= ids
    for tag, attributes in re.findall(r"<(input|select|textarea)([^>]*)>", HTML):
        name = re.search(r'id="(\w+)"', attributes)[1]
        assert f'for="{name}"' in HTML or re.search(rf'<label>[^<]+<{tag}[^>]*id="{name}"', HTML), name


def test_the_page_finds_its_figures_in_stats():
    async def run():
        async with client_of(toy_house()) as client:
            return (await client.get("/")).text, (await client.get("/stats")).json()

    page, stats = asyncio.run(run())
    assert page == HTML
    assert set(re.findall(r"\bnow\.(\w+)", HTML)) <= stats.keys()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1200, 800), (380, 700)], ids=["desk", "phone"])
def test_in_chromium_it_chats_and_shows_the_memory(browser, size):
    with Running(context=2048, blocks=200) as server:
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        faults = []
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.on("request", lambda request: request.url.startswith(server.url) or faults.append(request.url))
        page.goto(server.url)
        page.get_by_label("Longest answer, tokens").fill("20")
        page.get_by_label("Message").fill("<b>hello</b>")
        page.get_by_label("Message").press("Enter")
        page.wait_for_selector(".assistant")
        page.wait_for_function("!asking && turns.length == 2")
        assert page.locator(".user span").inner_text() == "<b>hello</b>"
        said = page.evaluate("turns[1].content")
        assert said and page.locator(".assistant span").text_content() == said
        page.wait_for_function("document.querySelector('#memory').textContent.includes('kv free')")
        page.wait_for_function("+[...document.querySelectorAll('#figures dd')][4].textContent > 0")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="New").click()
        assert page.locator(".turn").count() == 0
        page.get_by_label("Longest answer, tokens").fill("1500")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Message").fill("long")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_function("!asking")
        assert server.house.worker.stats["answered"] < 1500
        assert faults == []


@pytest.mark.slow
def test_in_chromium_a_wrong_key_is_told_and_the_right_one_opens(browser):
    client = Client("alice", Bucket(0, lambda: 0.0), Bucket(0, lambda: 0.0))
    with Running(Keys({_digest("sk-a"): client})) as server:
        page = browser.new_page()
        page.goto(server.url)
        for key, shown in (("wrong", ".fault"), ("sk-a", ".assistant:not(.fault)")):
            page.get_by_label("API key").fill(key)
            page.get_by_label("Longest answer, tokens").fill("5")
            page.get_by_label("Message").fill("hello")
            page.get_by_label("Message").press("Enter")
            page.wait_for_selector(shown)
            page.wait_for_function("!asking")
        assert "not known" in page.locator(".fault").inner_text()
        assert httpx.get(f"{server.url}/stats").json()["requests"] == 1

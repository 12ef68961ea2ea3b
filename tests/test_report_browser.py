"""The report in a real browser: rendering, mouse and keyboard, small pages with 10,000 tokens, no execution of text.

Chromium is the system's (``apt-get install chromium``), or Playwright's own (``playwright install chromium``).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import HOSTILE, hostile_run

from tokenseek_fx.report import Example, Run, Step, write_report

api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
LONG = 10_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), None) or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH. Run: playwright install chromium")
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request) -> str:
    return request.param


@pytest.fixture
def opened(browser, tmp_path) -> Iterator[Any]:
    """Open the report of a run; errors of the page and requests to a network fail the test at its end."""
    wrong: list[str] = []
    pages = []

    def show(run: Run, scheme: str = "light") -> Any:
        path = write_report(run, tmp_path / "report.html")
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 800})
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert not wrong


def long_run() -> Run:
    """10,000 tokens, every tenth of them kept; 3,000 steps."""
    tokens = [f" t{i}" + "\n" * (i % 17 == 0) for i in range(LONG)]
    values = [float(i % 101) for i in range(LONG)]
    labelled = [i % 2 == 0 for i in range(LONG)]
    kept = list(range(5, LONG, 10))
    first = Example(1, "long", tokens, kept, values, values[::-1], values, None, labelled)
    second = Example(2, "short", ["a", "b"], [1], [1.0, 2.0])
    steps = [Step(i, 3000 / (i + 100), 0.1, 0.1, 0.2, 2**20 + i, 0.3) for i in range(1, 3001)]
    plain = [Step(i, 2000 / (i + 100), 0.2, peak=2**22) for i in range(1, 3001)]
    parts = {"parameters": 2**20, "activations": 2**20, "keys/values": 2**10}
    memory = {"tokenseek": parts, "all tokens": {**parts, "logits": 2**22}}
    graph = (
        "block (operations: 3)\n  a: f32[2] = gather(x)  # rows\n"
        "  b: f32[2] = cumsum(a)  # barrier, runs over all tokens\n  c: f32[2] = add(b)  # rows"
    )
    return Run("long run", {"lr": "1"}, steps, plain, [first, second], memory, [0.5, 0.3, 0.2], [graph])


@pytest.fixture
def page(opened) -> Any:
    return opened(long_run())


#: The text of the chunk at the upper end of the map.
AT_TOP = """() => {
    const box = document.querySelector(".map").getBoundingClientRect();
    return document.elementFromPoint(box.left + 120, box.top + 100)?.closest(".chunk")?.innerText;
}"""


#: Records the milliseconds of every task above 50, including earlier ones.
WATCH_TASKS = """() => {
    window.tasks = [0];
    const keep = (seen) => seen.getEntries().forEach((task) => tasks.push(task.duration));
    new PerformanceObserver(keep).observe({ type: "longtask", buffered: true });
}"""


def scroll(page: Any, to: float) -> None:
    """Scroll the map, and wait until there is text."""
    page.locator(".map").scroll_into_view_if_needed()
    page.locator(".map").evaluate("(map, to) => (map.scrollTop = to)", to)
    page.wait_for_function(AT_TOP)


def active(page: Any) -> str:
    return page.locator(".token.active").inner_text()


@pytest.mark.slow
def test_the_report_of_the_example_draws_every_section(opened, scheme, example_run):
    page = opened(example_run, scheme)
    assert page.title() == example_run.title == page.locator("h1").inner_text()
    assert page.locator("figure path.curve").count() >= 6 and page.locator(".bar").count() == 20
    assert page.locator(".token").count() == len(example_run.examples[0].tokens)
    assert page.locator(".token.kept").count() == len(example_run.examples[0].kept)
    assert page.locator("#memory tr.total").count() == 1
    assert page.locator("#graph details").count() == len(example_run.graphs)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.fixture(scope="module")
def example_run() -> Run:
    """``examples/write_report.py``, cut short."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        import write_report
    finally:
        sys.path.pop(0)
    torch._dynamo.reset()
    return write_report.make_run(3, layers=1, length=48, batch=2, inner="eager", scorer="tokenseek")


def test_no_text_of_a_run_is_executed_or_hidden(opened):
    page = opened(hostile_run())
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    shown = page.locator(".token").all_inner_texts()
    assert shown[0] == HOSTILE[0] and shown[2] == HOSTILE[2] and shown[6] == HOSTILE[6]
    assert shown[4:6] == [r"\u2028\u2029", r"\u202eevil\u202c"] and shown[7:9] == [r"\ud800", r"\u0000\u001b"]
    assert page.locator("script").count() == 2, "the data and the program"
    page.locator("#graph summary").click()
    assert page.locator("#graph pre > div").count() == len(HOSTILE) - 1
    page.locator(".token").first.hover()
    assert page.locator(".tip b").inner_text() == HOSTILE[0]


def test_the_channel_and_its_scale_are_switched(page):
    last = page.locator("#t100")
    assert "h10" in last.get_attribute("class")
    page.get_by_label("attention received").check()
    assert "h10" not in last.get_attribute("class")
    page.get_by_label("kept only").check()
    assert "h0" in last.get_attribute("class")
    page.get_by_label("gradient").check()
    page.get_by_label("value", exact=True).check()
    assert "h5" in page.locator("#t50").get_attribute("class")
    assert page.get_by_label("loss", exact=True).count() == 0, "it is not known"
    page.get_by_label("dim").check()
    assert page.evaluate("getComputedStyle(document.getElementById('t4')).opacity") == "0.35"
    assert page.evaluate("getComputedStyle(document.getElementById('t5')).opacity") == "1"


def test_another_example_is_chosen(page):
    assert (
        "Kept 1000 of 10000 tokens (10.0 %), 0 of 5000 labelled tokens." in page.locator("#tokens .note").inner_text()
    )
    page.get_by_label("example").select_option(label="step 2: short")
    assert page.locator(".token").all_inner_texts() == ["a", "b"]
    assert "Kept 1 of 2 tokens (50.0 %)." in page.locator("#tokens .note").inner_text()


def test_the_keyboard_walks_through_the_tokens(page):
    page.locator("#dim").focus()
    page.keyboard.press("Tab")
    assert active(page).strip() == "t0↵"
    page.keyboard.press("ArrowRight")
    assert active(page) == " t1"
    for key, expected in {"n": 5, "N": 15, "p": 5, "End": LONG - 1, "PageUp": LONG - 193, "Home": 0}.items():
        page.keyboard.press(key)
        assert active(page).startswith(f" t{expected}"), key
    page.keyboard.press("ArrowDown")
    assert active(page) == " t1", "the first of the next line"
    page.keyboard.press("ArrowUp")
    assert page.locator(".map").get_attribute("aria-activedescendant") == "t0"
    tip = page.locator(".tip")
    assert "token 1 of 10000, not kept" in tip.inner_text() and "combined score\t0, rank 9901" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_click_chooses_a_token_and_does_not_scroll(page):
    scroll(page, 3000)
    seen = page.evaluate(AT_TOP).split()[0]
    page.locator(".token", has_text=seen).first.click()
    assert active(page).split()[0] == seen
    assert page.locator(".map").evaluate("map => map.scrollTop") > 2500


def test_the_page_holds_the_part_of_a_long_text_near_the_window(page):
    most = 0
    for part in range(11):
        scroll(page, page.locator(".map").evaluate("map => map.scrollHeight") * part / 10)
        most = max(most, page.locator(".token").count())
    assert 0 < most < LONG / 3
    assert page.locator(f"#t{LONG - 1}").is_visible()


def test_a_long_text_does_not_stall_the_page(page):
    """Opening it, scrolling through it and changing its colours.

    On two busy cores the longest task takes about 0.1 s, and 1.2 to 1.7 s if ranks are found by comparing all pairs of
    tokens. A second is between the two, and far from what other load adds.
    """
    page.evaluate(WATCH_TASKS)
    for part in range(11):
        scroll(page, page.locator(".map").evaluate("map => map.scrollHeight") * part / 10)
    page.get_by_label("gradient").check()
    page.wait_for_timeout(100)  # tasks are reported after they end
    assert page.evaluate("Math.max(...tasks)") < 1000


def test_all_tokens_are_printed(page):
    assert page.locator(".token").count() < LONG
    page.pdf()
    assert page.locator(".token").count() == LONG
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("(m => m.scrollHeight - m.clientHeight)(document.querySelector('.map'))") == 0


def test_charts_are_read_with_keys_and_pointer(page):
    chart = page.locator("figure", has_text="Training loss")
    chart.focus()
    page.keyboard.press("End")
    assert chart.locator("output").inner_text() == "step 3000: tokenseek 0.9677, all tokens 0.6452"
    page.keyboard.press("ArrowLeft")
    assert chart.locator("output").inner_text().startswith("step 2999")
    page.keyboard.press("Escape")
    assert chart.locator("output").inner_text() == ""
    chart.locator("svg").hover()
    assert chart.locator("output").inner_text().startswith("step 1")
    drawn = chart.locator("path.curve").first.get_attribute("d")
    assert drawn.count("L") < 2000, "no more points than can be seen"
    bars = page.locator("figure", has_text="by position")
    bars.focus()
    page.keyboard.press("ArrowRight")
    assert bars.locator("output").inner_text() == "0.0 % of the sequence: 50.0 %"


def test_gathers_and_barriers_are_marked_in_the_graph(page):
    page.get_by_role("button", name="open all").click()
    assert page.locator("#graph pre .gather").all_inner_texts() == ["  a: f32[2] = gather(x)  # rows"]
    assert page.locator("#graph pre .barrier").count() == 1
    page.get_by_label("only gathers and barriers").check()
    assert page.locator("#graph pre > div:visible").count() == 2
    page.get_by_role("button", name="close all").click()
    assert page.locator("#graph pre").is_hidden()


def test_the_page_says_what_was_not_recorded(opened):
    page = opened(Run("nothing"))
    assert page.locator(".note").all_inner_texts() == [
        "No step figures were recorded.",
        "Neither loss nor time was recorded.",
        "No examples were recorded.",
        "Statistics were not recorded.",
        "Peak memory was not recorded.",
        "The memory split was not recorded.",
        "The graph was not recorded.",
    ]

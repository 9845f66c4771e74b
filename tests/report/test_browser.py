"""The page in a real browser: charts drawn, nothing loaded or complained about; by keyboard, on a phone, in the dark.

Needs playwright, and a browser as the command chromium, chromium-browser or google-chrome, or named by PRUNUS_CHROMIUM.
Screenshots go to build/report/.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("PRUNUS_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
SCREENSHOTS = Path(__file__).parents[2] / "build" / "report"
SIZES = {"desktop": (1200, 900), "phone": (360, 740)}
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's own sandbox does not start as root, as in most containers.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a report; the test fails at the end if the page complained, or asked for anything but itself."""
    opened = []

    def visit(path: Path, size: str = "desktop", scheme: str = "light", **options):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        opened.append((context, said))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_function("document.documentElement.dataset.charts !== undefined", timeout=120_000)
        return page

    yield visit
    for context, said in opened:
        context.close()
        assert said == []


def fits(page) -> bool:
    """No part of the page is wider than the window, but for tables, which scroll by themselves."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("result", ["pruned", "comparison"])
def test_charts_are_drawn(request, visit, result, size, scheme):
    page = visit(request.getfixturevalue(result) / "report.html", size, scheme)
    charts = page.locator(".chart svg")
    assert charts.count() == page.locator("figure").count() == 3
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["height"] > 100
        assert 0.7 * SIZES[size][0] < box["width"] + 200 and box["width"] <= SIZES[size][0]  # noqa: PT018
        assert chart.locator("path").count() > 3
    assert fits(page)
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert contrast(ground, ink) > 7
    assert (luminance(ground) < luminance(ink)) == (scheme == "dark")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{result}-{size}-{scheme}.png", full_page=True)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`. Source: WCAG 2.2, relative luminance."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_by_keyboard(visit, pruned):
    page = visit(pruned / "report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    bars = page.locator("#chart-keep .chart svg .mark-rect.role-mark path")
    both = bars.count()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "keep_axis":
            break
    page.keyboard.press("ArrowDown")
    page.wait_for_function(f"document.querySelectorAll('#chart-keep .chart .mark-rect.role-mark path').length < {both}")
    assert bars.count() == both // 2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.locator("#chart-keep table").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"


def test_a_tooltip_names_the_bar(visit, pruned):
    page = visit(pruned / "report.html")
    page.locator("#chart-keep .chart svg .mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "attention groups" in page.locator("#vg-tooltip-element").inner_text()


def test_colours_follow_the_system(visit, pruned):
    page = visit(pruned / "report.html")
    mark = page.locator("#chart-keep .chart svg .mark-rect.role-mark path").first
    light = mark.get_attribute("fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "old => document.querySelectorAll('.chart svg').length === 3 && "
        "document.querySelector('#chart-keep .chart .mark-rect.role-mark path')?.getAttribute('fill') !== old",
        arg=light,
    )


def test_without_scripts_the_tables_are_there(visit, pruned):
    page = visit(pruned / "report.html", java_script_enabled=False)
    assert page.locator("noscript").count() == 1
    page.locator("#chart-keep summary").click()
    assert page.locator("#chart-keep table").is_visible()

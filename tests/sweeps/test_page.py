"""report.html in a real browser, headless Chromium: offline, tables and plots, on a desk and on a phone."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from sweeps.report import write
from tests.builders.packages import install
from tests.builders.sweep_folder import grid, write_sweep

pytestmark = pytest.mark.browser

SCREENSHOTS = os.environ.get("DP_LORA_SCREENSHOTS")
"""A folder that keeps the screenshots."""

STATES = ["done"] * 10 + ["failed", "missing"]
PACKAGES = ("chromium", "chromium-driver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    install(PACKAGES, lambda: bool(shutil.which("chromium") and shutil.which("chromedriver")))
    options = ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a partial sweep over rank, with the training loss released."""
    choices = grid(lora__rank=[2, 4, 8, 16], seed=[0, 1, 2])
    folder = write_sweep(tmp_path_factory.mktemp("page"), "rank-default", choices, STATES,
                         **{"tracking.private_loss": True})  # fmt: skip
    write(folder)
    return folder / "report.html"


def opened(browser: Chrome, page: Path, width: int, height: int) -> None:
    """Opens the page in a window of this size and waits until its plots are drawn."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Network.enable", {})
    nothing = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", nothing)
    browser.get(page.as_uri())
    state = "return document.documentElement.dataset.plots"
    WebDriverWait(browser, 300).until(lambda driver: driver.execute_script(state))
    assert browser.execute_script(state) == "drawn"


def shown(browser: Chrome, path: Path) -> Image.Image:
    """A screenshot of the whole page."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    width = browser.execute_script("return innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    words = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", words)["data"]))
    if SCREENSHOTS:
        shutil.copy(path, Path(SCREENSHOTS) / path.name)
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_offline_and_fits(browser: Chrome, page: Path, tmp_path: Path, width: int) -> None:
    opened(browser, page, width, 900)
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not severe, severe
    loaded: list[str] = browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    plots = browser.find_elements(By.CSS_SELECTOR, ".plot svg.marks")
    names = [figure.get_attribute("id") for figure in browser.find_elements(By.CSS_SELECTOR, ".plot")]
    assert names == ["metric-accuracy_cnn", "metric-fd_lite0", "metric-kid_lite0", "steps-epsilon",
                     "steps-private_loss", "steps-signal_to_noise"]  # fmt: skip
    assert len(plots) == len(names) and all(0 < plot.size["width"] <= width - 28 for plot in plots)
    image = shown(browser, tmp_path / f"report-{width}.png")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    assert (0, 114, 178) in colours, "a mark in the first colour"


def test_the_tables_hold_the_numbers(browser: Chrome, page: Path) -> None:
    opened(browser, page, 1280, 900)
    rows = browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    first = [cell.text for cell in rows[0].find_elements(By.CSS_SELECTOR, "th, td")]
    assert first[:4] == ["2", "3 of 3", "10", "1e-05"] and " ± " in first[6]
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == [
        "2", "4", "8", "16", "before fine-tuning", "real images"
    ]  # fmt: skip
    assert "10 of 12 runs are done" in browser.find_element(By.CSS_SELECTOR, ".partial").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#runs tbody tr")) == len(STATES)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#samples img")) == 4
    sizes = "return [...document.images].map((image) => image.naturalWidth)"
    assert min(browser.execute_script(sizes)) > 100
    assert "†" in browser.find_element(By.ID, "published").text


def test_a_plot_answers_to_the_pointer_and_has_every_mark(browser: Chrome, page: Path) -> None:
    opened(browser, page, 1280, 900)
    squares: Any = browser.find_elements(
        By.CSS_SELECTOR, "#metric-accuracy_cnn g.mark-symbol path[aria-roledescription='point']"
    )
    circles = browser.find_elements(
        By.CSS_SELECTOR, "#metric-accuracy_cnn g.mark-symbol path[aria-roledescription='circle']"
    )
    assert (len(squares), len(circles)) == (4, 10)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", squares[1])
    ActionChains(browser).move_to_element(squares[1]).perform()
    tip = WebDriverWait(browser, 300).until(
        lambda driver: driver.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible")
    )
    assert "lora.rank=4" in tip.text and "mean ± std" in tip.text


def test_a_click_on_the_legend_picks_one(browser: Chrome, tmp_path: Path) -> None:
    sets = ["a.b[0]:Q", "it's (x):T"]
    folder = write_sweep(tmp_path, "mine", grid(data__name=sets, lora__rank=[4, 8]))
    write(folder)
    opened(browser, folder / "report.html", 1280, 900)
    for plot, marks in (("metric-accuracy_cnn", "path[aria-roledescription='point']"),
                        ("steps-epsilon", "path[aria-roledescription='line mark']")):  # fmt: skip
        faint = f"#{plot} {marks}[opacity='0.12']"
        legend = browser.find_elements(By.CSS_SELECTOR, f"#{plot} .role-legend-symbol path")
        assert browser.find_elements(By.CSS_SELECTOR, faint) == [], plot
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", legend[0])
        ActionChains(browser).move_to_element(legend[0]).click().perform()
        others = len(browser.find_elements(By.CSS_SELECTOR, f"#{plot} {marks}")) // len(legend)
        WebDriverWait(browser, 300).until(
            lambda driver, faint=faint: driver.find_elements(By.CSS_SELECTOR, faint)
        )
        assert len(browser.find_elements(By.CSS_SELECTOR, faint)) == others * (len(legend) - 1), plot


def test_the_page_is_accessible(browser: Chrome, page: Path) -> None:
    opened(browser, page, 1280, 900)
    violations = Axe().run(browser)["violations"]
    assert not violations, [(v["id"], v["help"], [node["html"] for node in v["nodes"]]) for v in violations]


def test_a_plot_that_cannot_be_drawn_is_noticed(browser: Chrome, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('"mark":', '"remark":'))
    with pytest.raises(AssertionError):
        opened(browser, broken, 1280, 900)
    browser.get_log("browser")

"""The page in a real browser: Debian's chromium, driven by selenium. `make test-page` runs this."""

import shutil

import pytest
from asking import listening
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter.serve import Limits, Tenants, create_app

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: make test-page installs it")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
KEY = "a" * 16
TEXT = tiny_text(30)
AFTER = 120
"""Seconds that anything may take on a loaded machine."""


class Page:
    """The page, as a person uses it."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def __getitem__(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, true):
        return WebDriverWait(self.driver, AFTER).until(lambda _: true())

    def type(self, name, text):
        self[name].clear()
        self[name].send_keys(text)

    def press(self, selector):
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def write(self, text, steps=None):
        if self["memory"].is_displayed():
            self["new"].click()
        self.type("text", text)
        if steps is not None:
            self.type("steps", steps)
        before = len(self.all("#memories li"))
        self.press("#write .primary")
        self.until(lambda: len(self.all("#memories li")) > before)

    def ask(self, question):
        self.type("question", question)
        self.press("#ask-form .primary")
        return self.until(
            lambda: self.all("#answers li:first-child:not([aria-busy]) .line *") and self.all("#answers li")[0]
        )

    def severe(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,1000"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(AFTER)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, store):
    with listening(
        create_app(tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3"), store.path)
    ) as url:
        page = Page(driver, url)
        page.until(lambda: "6 vectors" in page["model"].text)
        yield page
        driver.get("about:blank")  # or the server waits for the browser


def test_write_recite_ask_and_delete(page, store):
    page.write(TEXT, steps="3")
    assert len(store) == 3
    assert len(page.all("#losses circle")) == 4
    assert page["source"].text == TEXT
    assert "30 tokens in 18 vectors" in page["ratio"].text
    assert "kB" in page["kv-bytes"].text
    page.until(lambda: "at their places" in page["recited-share"].text)
    assert page.all("#recital span")
    answer = page.ask("w4 w5")
    assert answer.find_element(By.CLASS_NAME, "answer").text
    assert "support 1.00" in answer.text  # of an untrained model, which refuses nothing
    assert page.driver.execute_script("return document.querySelector('#answers meter').value > 0")
    assert len(page.all("#source .place")) == 1
    assert 0 < len(page.all("#source .place")[0].text) < len(TEXT)
    page.press("#memories li button:last-child")
    page.driver.switch_to.alert.accept()
    page.until(lambda: page["none"].is_displayed())
    assert len(store) == 0
    assert page["text"].is_displayed()
    assert page.severe() == []


def test_a_memory_can_be_reopened_and_another_can_answer(page):
    page.write("w1 w2 w3")
    page.write(f"w6 w7 w8 w9\n\n{TEXT}")
    page.driver.refresh()
    page.until(lambda: len(page.all("#memories li")) == 2)
    small = next(
        one for one in page.all("#memories [data-id]") if "3 tokens" in one.text.splitlines()[-1].split(",")[0][:8]
    )
    small.click()
    page.until(lambda: page["source"].text == "w1 w2 w3")
    Select(page["from"]).select_by_value("auto")
    page.ask("w7 : Question")
    page.until(lambda: "w6 w7 w8 w9" in page["source"].text)
    assert "w7" in page.all("#source .place")[0].text
    assert len(page.all("#answers li")) == 1
    assert page.severe() == []


def test_a_refusal_is_shown_as_not_in_memory(driver, store, monkeypatch):
    pipeline = tiny_pipeline(num_memory_tokens=6, trained_length=12, refusal="w3 w3")
    state = pipeline.write("w1 w2")
    said = pipeline.generate([{"role": "user", "content": "w9"}], memory=state, max_new_tokens=2, do_sample=False)[0]
    pipeline.model.active_peft_config.refusal = said  # what the random model says counts as its refusal
    with listening(create_app(pipeline, store.path)) as url:
        page = Page(driver, url)
        page.until(lambda: page["model"].text)
        page.write("w1 w2")
        answer = page.ask("w9")
        assert answer.find_element(By.CLASS_NAME, "answer").text == "Not in memory"
        assert page.all("#source .place") == []
        driver.get("about:blank")


def test_the_page_asks_for_a_key_and_keeps_it_for_the_session_only(driver, pipeline, store):
    with listening(create_app(pipeline, store.path, tenants=Tenants({KEY: "anna"}))) as url:
        page = Page(driver, url)
        page.until(lambda: page["key"].is_displayed() and "The API key is missing" in page["error"].text)
        page.type("key", "b" * 16)
        page.press("#key-form button")
        page.until(lambda: "wrong" in page["error"].text)
        page.type("key", KEY)
        page.press("#key-form button")
        page.until(lambda: not page["key"].is_displayed() and not page["error"].is_displayed())
        page.write("w1 w2")
        assert driver.execute_script("return [localStorage.length, sessionStorage.length, document.cookie]") == [
            0,
            1,
            "",
        ]
        driver.get("about:blank")


def test_a_file_can_be_chosen_or_dropped(page, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("w1 w2 w3")
    page["file"].send_keys(str(path))
    page.until(lambda: page["text"].get_attribute("value") == "w1 w2 w3")
    assert page["name"].get_attribute("value") == "notes.txt"
    drop = """const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(arguments[0])], "dropped.txt"));
    for (const kind of ["dragover", "drop"])
      arguments[1].dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}));"""
    page.driver.execute_script(drop, list(b"w4 w5"), page["text"])
    page.until(lambda: page["text"].get_attribute("value") == "w4 w5")
    page.driver.execute_script(drop, [255, 254], page["text"])
    page.until(lambda: "dropped.txt is not a text file in UTF-8" in page["error"].text)
    assert page["text"].get_attribute("value") == "w4 w5"


def test_writing_can_be_cancelled(page, store):
    page.type("text", TEXT)
    page.type("steps", "200")
    page.press("#write .primary")
    page.until(lambda: page["cancel"].is_displayed())
    assert not page["ask"].is_displayed()
    page["cancel"].click()
    page.until(lambda: page["text"].is_displayed())
    assert page["text"].get_attribute("value") == TEXT
    assert not page["error"].is_displayed()


def test_errors_are_shown(driver, pipeline, store):
    with listening(create_app(pipeline, store.path, limits=Limits(writes=0))) as url:
        page = Page(driver, url)
        page.until(lambda: page["model"].text)
        page.type("text", "w1 w2")
        page.press("#write .primary")
        page.until(lambda: page["error"].is_displayed())
        assert page["error"].get_attribute("role") == "alert"
        assert "Try again in" in page["error"].text
        assert page["text"].get_attribute("value") == "w1 w2"
        driver.get("about:blank")


@pytest.mark.parametrize("width", [360, 1280])
def test_every_control_has_a_name_and_the_page_fits(page, width):
    page.driver.set_window_size(width, 900)
    for _ in range(2):
        unnamed = page.driver.execute_script(
            """return [...document.querySelectorAll("button, input, select, textarea, meter")].filter((one) =>
            one.checkVisibility() && !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
        )
        assert unnamed == []
        assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        if page["write"].is_displayed():
            page.write(TEXT)
            page.ask("w4 w5")
    page.driver.set_window_size(1280, 1000)

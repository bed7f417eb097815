"""The upload page in a real Chromium, on gunicorn."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import wsgi
from tests.support import HOSTS, MIB, Memcached, Proxy, Server, wait_for

Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: pathlib.Path, memcached: Memcached) -> Iterator[Start]:
    """Start the API with the given settings, and a browser on its page."""
    with contextlib.ExitStack() as stack:

        def start(*, script: bool = True, **environ: str) -> Any:
            environ = {"MEMCHUNK_SERVERS": memcached.server, **environ}
            server = Server(HOSTS["gunicorn-threads"], tmp_path / "log", **environ)
            stack.callback(server.stop)
            browser = chromium(tmp_path, script)
            stack.callback(browser.quit)
            browser.server = server.wait()
            browser.get(server.url("/"))
            return browser

        yield start


def chromium(downloads: pathlib.Path, script: bool) -> Any:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.fail(f"needs {program}; install it: 'apt-get install chromium chromium-driver'")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=900,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    preferences: dict[str, object] = {"download.default_directory": str(downloads)}
    if not script:
        preferences["profile.managed_default_content_settings.javascript"] = 2
    options.add_experimental_option("prefs", preferences)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options, service)


def make(folder: pathlib.Path, name: str, data: bytes) -> str:
    (folder / "files").mkdir(exist_ok=True)
    path = folder / "files" / name
    path.write_bytes(data)
    return str(path)


def choose(browser: Any, *paths: str) -> None:
    browser.find_element(By.ID, "file").send_keys("\n".join(paths))


def item(browser: Any, name: str) -> Any:
    """The list's item for the file of that name, newest first."""
    return browser.find_element(By.XPATH, f"//li[contains(div[@class='name'], '{name}')]")


def state(browser: Any, name: str) -> str:
    return str(item(browser, name).find_element(By.CLASS_NAME, "state").text)


def wait_until(browser: Any, name: str, text: str) -> None:
    wait_for(lambda: text in state(browser, name), f"{text!r}, not {state(browser, name)!r}")


def wait_until_sent(browser: Any, name: str, percent: int) -> None:
    def sent() -> bool:
        said = re.search(r"Sending, (\d+)", state(browser, name))
        return said is not None and int(said[1]) >= percent

    wait_for(sent, f"{percent} % to be sent, not {state(browser, name)!r}")


def wait_for_page(browser: Any, title: str) -> None:
    """Of the page that it leaves, the browser still finds elements for a moment."""
    wait_for(lambda: browser.title == title, f"the page {title!r}, not {browser.title!r}")


def wait_for_download(path: pathlib.Path, data: bytes) -> None:
    """Chromium first makes an empty file."""
    wait_for(lambda: path.exists() and path.stat().st_size == len(data), "the download")
    assert path.read_bytes() == data


def press(browser: Any, name: str, button: str) -> None:
    item(browser, name).find_element(By.CLASS_NAME, button).click()


def slow(browser: Any, rate: int) -> None:
    """Let uploads take time: so many bytes a second."""
    conditions = {
        "offline": False,
        "latency": 0,
        "downloadThroughput": -1,
        "uploadThroughput": rate,
    }
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def offline(browser: Any) -> None:
    conditions = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def link(browser: Any, name: str) -> Any:
    return item(browser, name).find_element(By.TAG_NAME, "a")


def test_50_mib_there_and_back(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start()
    data = os.urandom(50 * MIB)
    slow(browser, 100 * MIB)
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => {"
        "  const bar = document.querySelector('progress'); if (bar) seen.push(bar.value);"
        "}).observe(document.body, {subtree: true, childList: true, attributes: true});"
    )
    choose(browser, make(tmp_path, "big old file.dat", data))
    wait_until(browser, "big old file.dat", "Stored")
    seen = browser.execute_script("return seen")
    assert len({value for value in seen if 0.05 < value < 0.95}) >= 3
    assert seen == sorted(seen)
    link(browser, "big old file.dat").click()
    wait_for_download(tmp_path / "big old file.dat", data)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_several_at_once_one_of_them_cancelled(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start()
    slow(browser, MIB // 4)
    paths = [make(tmp_path, f"{number}.bin", os.urandom(MIB)) for number in range(4)]
    choose(browser, *paths, make(tmp_path, "cancelled.bin", bytes(40 * MIB)))
    wait_until(browser, "cancelled.bin", "Waiting")
    press(browser, "cancelled.bin", "cancel")
    wait_until(browser, "cancelled.bin", "Cancelled")
    slow(browser, 2 * MIB)
    for number in range(4):
        wait_until(browser, f"{number}.bin", "Stored")
    press(browser, "cancelled.bin", "again")
    wait_until(browser, "cancelled.bin", "Sending")
    press(browser, "cancelled.bin", "cancel")
    wait_until(browser, "cancelled.bin", "Cancelled. Nothing was stored.")
    slow(browser, -1)
    press(browser, "cancelled.bin", "again")
    wait_until(browser, "cancelled.bin", "Stored")


def test_a_line_that_breaks(start: Start, tmp_path: pathlib.Path) -> None:
    """The upload goes on where it broke, and sends no more twice than what was under way."""
    browser = start()
    data = os.urandom(50 * MIB)
    proxy = Proxy(browser.server.port, 1_000_000, 10_000_000, 40_000_000)
    with contextlib.closing(proxy):
        browser.get(proxy.url("/"))
        browser.execute_script(
            "window.said = ''; new MutationObserver(() => { said += document.body.innerText; })"
            ".observe(document.body, { childList: true, subtree: true })"
        )
        choose(browser, make(tmp_path, "big.dat", data))
        wait_until(browser, "big.dat", "Stored")
        said = browser.execute_script("return window.said")
        assert "The connection broke. Going on in 1 s." in said
        assert not proxy.cuts
        # Each break costs the piece under way, once more as Chromium repeats a request by itself,
        # and once more where the server, not done with it, answers that with 409.
        assert proxy.passed < len(data) + 3 * 3 * 4 * MIB
        link(browser, "big.dat").click()
        wait_for_download(tmp_path / "big.dat", data)
        browser.get("about:blank")


def test_a_network_that_is_away(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start()
    slow(browser, 4 * MIB)
    choose(browser, make(tmp_path, "big.dat", bytes(40 * MIB)))
    wait_until_sent(browser, "big.dat", 30)
    offline(browser)
    wait_until(browser, "big.dat", "The connection broke. Going on in 8 s.")
    slow(browser, -1)  # it's back: the page notices, and does not wait
    wait_until(browser, "big.dat", "Stored")


def test_a_cache_that_lost_all(start: Start, tmp_path: pathlib.Path, memcached: Memcached) -> None:
    browser = start()
    slow(browser, 4 * MIB)
    choose(browser, make(tmp_path, "big.dat", bytes(40 * MIB)))
    wait_until_sent(browser, "big.dat", 30)
    memcached.flush()
    wait_until(browser, "big.dat", "The cache lost what was sent.")
    slow(browser, -1)
    press(browser, "big.dat", "again")
    wait_until(browser, "big.dat", "Stored")


def test_what_is_cancelled_is_deleted(
    start: Start, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    browser = start()
    slow(browser, 4 * MIB)
    choose(browser, make(tmp_path, "big.dat", bytes(40 * MIB)))
    wait_until_sent(browser, "big.dat", 30)
    wait_for(lambda: len(memcached.keys()) > 8, "a block to be stored")
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Cancelled. Nothing was stored.")
    wait_for(lambda: memcached.keys() == [], "the pieces to be deleted")
    choose(browser, make(tmp_path, "other.dat", bytes(40 * MIB)))
    wait_until_sent(browser, "other.dat", 10)
    offline(browser)
    wait_until(browser, "other.dat", "The connection broke.")
    press(browser, "other.dat", "cancel")
    wait_until(browser, "other.dat", "Cancelled.")


def test_errors_in_words(start: Start, tmp_path: pathlib.Path, memcached: Memcached) -> None:
    browser = start(MEMCHUNK_MAX_SIZE="1000000")
    choose(browser, make(tmp_path, "large.bin", bytes(1_000_001)))
    wait_until(browser, "large.bin", "Too large")
    assert "POST" not in browser.server.output()  # it was not sent
    path = make(tmp_path, "a.txt", b"x")
    memcached.kill()
    choose(browser, path)
    wait_until(browser, "a.txt", "The cache did not answer.")
    memcached.start()  # the page tries again by itself
    wait_until(browser, "a.txt", "Stored")
    browser.server.stop()
    choose(browser, make(tmp_path, "b.txt", b"x"))
    wait_until(browser, "b.txt", "The connection broke.")


def test_token(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start(MEMCHUNK_TOKEN="s3cret")
    path = make(tmp_path, "a.txt", b"the content")
    choose(browser, path)
    wait_until(browser, "a.txt", "wants a token")
    field = browser.switch_to.active_element
    assert field.get_attribute("id") == "token"
    field.send_keys("wrong")
    press(browser, "a.txt", "again")
    wait_until(browser, "a.txt", "not the right one")
    field.clear()
    field.send_keys("s3cret")
    press(browser, "a.txt", "again")
    wait_until(browser, "a.txt", "Stored")
    # What the browser sends when its user has typed the token into the link's dialog.
    url = link(browser, "a.txt").get_attribute("href")
    browser.get(url.replace("http://", "http://:s3cret@"))
    wait_for_download(tmp_path / "a.txt", b"the content")


def test_drop(start: Start, memcached: Memcached) -> None:
    browser = start()
    browser.execute_script(
        "const data = new DataTransfer();"
        "for (const name of ['one.txt', 'two.txt']) data.items.add(new File(['12345'], name));"
        "const event = type => new DragEvent(type, "
        "  {dataTransfer: data, bubbles: true, cancelable: true});"
        "document.querySelector('.drop').dispatchEvent(event('dragover'));"
        "window.over = document.body.classList.contains('over');"
        "document.querySelector('.drop').dispatchEvent(event('drop'));"
    )
    assert browser.execute_script("return over")
    assert not browser.execute_script("return document.body.classList.contains('over')")
    for name in ("one.txt", "two.txt"):
        wait_until(browser, name, "Stored")
        assert "5 bytes" in item(browser, name).text


def test_expiry_and_copy(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start()
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions})
    browser.find_element(By.CSS_SELECTOR, "option[value='3600']").click()
    choose(browser, make(tmp_path, "a.txt", b"x"))
    wait_until(browser, "a.txt", "Stored until ")
    press(browser, "a.txt", "copy")
    wait_for(lambda: "Copied" in item(browser, "a.txt").text, "the button to say so")
    copied = browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == link(browser, "a.txt").get_attribute("href")


def test_keyboard_and_screen_reader(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start()
    choose(browser, make(tmp_path, "a.txt", b"x"))
    wait_until(browser, "a.txt", "Stored")
    news = browser.find_element(By.ID, "news")
    wait_for(lambda: news.get_attribute("textContent") == "a.txt is stored.", "the news")
    assert news.aria_role == "status"
    seen = []
    browser.execute_script("document.activeElement.blur()")
    for _ in range(4):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        seen.append(browser.switch_to.active_element.accessible_name)
    assert seen[0] == "Keep"
    assert seen[1].startswith("Choose files, or drop them here")
    assert seen[2] == "Copy link: a.txt"
    assert seen[3].startswith("http://127.0.0.1")


def test_without_script(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start(script=False)
    browser.find_element(By.CSS_SELECTOR, "option[value='86400']").click()
    choose(browser, make(tmp_path, "plain.txt", b"the content"))
    browser.find_element(By.TAG_NAME, "button").click()
    wait_for_page(browser, "Stored")
    assert "11 bytes, kept until 20" in browser.find_element(By.TAG_NAME, "body").text
    browser.find_element(By.TAG_NAME, "a").click()
    wait_for_download(tmp_path / "plain.txt", b"the content")


def test_words_without_script(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start(script=False, MEMCHUNK_MAX_SIZE="1000")
    choose(browser, make(tmp_path, "large.bin", bytes(10_000_000)))
    browser.find_element(By.TAG_NAME, "button").click()
    wait_for_page(browser, wsgi.TITLES[413])
    assert "Files may have up to" in browser.find_element(By.TAG_NAME, "body").text
    browser.find_element(By.LINK_TEXT, "Upload a file").click()
    wait_for_page(browser, "memchunk: upload files")


def test_nothing_is_loaded_from_elsewhere(start: Start) -> None:
    browser = start()
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert loaded == []

"""The upload page in a real Chromium, on gunicorn."""

from __future__ import annotations

import contextlib
import functools
import http.server
import itertools
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from werkzeug.http import HTTP_STATUS_CODES

from tests.support import (
    HOSTS,
    MIB,
    SECONDS,
    Memcached,
    Proxy,
    Server,
    snippet,
    wait_for,
)
from tests.test_proxies import Nginx

Start = Callable[..., Any]


# finds what screen readers, keyboards and poor eyes can't cope with
AXE = "axe-core/axe.min.js"
TUS = "tus-js-client/dist/tus.min.js"
UPPY = "uppy/dist/uppy.min.js"

# This machine by a name. Without TLS, browsers trust 127.0.0.1 more than that.
PLAIN = "plain.example"

# Uploads from a page of another site, and reads back; answers with the bytes that were
# the same.
ELSEWHERE = """
const [api, token, size, done] = arguments;
const headers = { Authorization: "Bearer " + token };
const data = new Uint8Array(size);
for (let start = 0; start < size; start += 65536) {
  crypto.getRandomValues(data.subarray(start, start + 65536));
}
let stored;
new tus.Upload(new Blob([data]), {
  endpoint: api + "uploads",
  headers,
  retryDelays: [500],
  onAfterResponse: (request, answer) => {
    const place = answer.getHeader("Content-Location");
    if (place) stored = new URL(place, request.getURL());
  },
  onError: error => done(String(error)),
  onSuccess: async () => {
    const answer = await fetch(stored, { headers });
    const got = new Uint8Array(await answer.arrayBuffer());
    const same = data.every((byte, at) => byte === got[at]);
    done([answer.headers.get("ETag"), got.length, same]);
  },
}).start();
"""

# A recipe of docs/uploads.md stands between these; what it logs is looked at.
BEFORE_RECIPE = """
const [site, done] = arguments;
const { Uppy, Tus, XHRUpload } = window.Uppy;
const text = "0123456789".repeat(500_000);  // two pieces for Tus
const console = { log: async (name, address) => {
  const answer = await fetch(address);
  done([name, new URL(address).origin, await answer.text() === text]);
} };
"""
AFTER_RECIPE = """
uppy.on("upload-error", (file, error) => done(String(error)));
uppy.addFile({ name: "a b.txt", type: "text/plain", data: new Blob([text]) });
uppy.upload();
"""


@pytest.fixture
def start(tmp_path: pathlib.Path, memcached: Memcached) -> Iterator[Start]:
    """Start the API with the given settings, and a browser on its page."""
    with contextlib.ExitStack() as stack:

        def start(refused: str = "", **environ: str) -> Any:
            environ = {"MEMCHUNK_SERVERS": memcached.server, **environ}
            server = Server(HOSTS["gunicorn-threads"], tmp_path / "log", **environ)
            stack.callback(server.kill)
            browser = chromium(tmp_path, refused)
            stack.callback(browser.quit)
            browser.server = server.wait()
            browser.get(server.url("/"))
            return browser

        yield start


@pytest.fixture
def browser(start: Start) -> Any:
    return start()


class Driver(webdriver.ChromeService):
    """chromedriver, which is ended by a signal: Selenium asks it to end, and sleeps a
    second."""

    def send_remote_shutdown_command(self) -> None:
        pass


def chromium(folder: pathlib.Path, refused: str = "") -> Any:
    """A browser that downloads to the folder, and remembers in it what it does.

    refused: what its user does not allow to pages, "javascript" or "cookies", with
    which goes all other storage."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.fail(f"needs {program}: 'apt-get install chromium chromium-driver'")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    arguments = "headless=new no-sandbox disable-dev-shm-usage window-size=900,900"
    for argument in (
        *arguments.split(),
        f"host-resolver-rules=MAP {PLAIN} 127.0.0.1",
        f"user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    preferences: dict[str, object] = {"download.default_directory": str(folder)}
    if refused:
        preferences[f"profile.managed_default_content_settings.{refused}"] = 2
    options.add_experimental_option("prefs", preferences)
    return webdriver.Chrome(options, Driver(shutil.which("chromedriver")))


def make(folder: pathlib.Path, name: str, data: bytes) -> str:
    """Once: the page knows a file by its time, too."""
    (folder / "files").mkdir(exist_ok=True)
    path = folder / "files" / name
    if not path.exists():
        path.write_bytes(data)
    return str(path)


def choose(browser: Any, *paths: str) -> None:
    browser.find_element(By.ID, "file").send_keys("\n".join(paths))


def store(browser: Any, *paths: str) -> list[str]:
    """Choose files, and wait for their links."""
    choose(browser, *paths)
    names = [pathlib.Path(path).name for path in paths]
    for name in names:
        wait_until(browser, name, "Stored")
    return [address(browser, name) for name in names]


def item(browser: Any, name: str) -> Any:
    """The list's item for the file of that name, newest first."""
    return browser.find_element(
        By.XPATH, f"//li[contains(div[@class='name'], '{name}')]"
    )


def link(browser: Any, name: str) -> Any:
    return item(browser, name).find_element(By.CLASS_NAME, "link")


def address(browser: Any, name: str) -> str:
    return str(link(browser, name).get_attribute("href"))


def state(browser: Any, name: str) -> str:
    return str(item(browser, name).find_element(By.CLASS_NAME, "state").text)


def wait_until(browser: Any, name: str, text: str) -> None:
    wait_for(
        lambda: text in state(browser, name), f"{text!r}, not {state(browser, name)!r}"
    )


def wait_until_sent(browser: Any) -> None:
    """Some of "big.dat": 15 % or more."""
    some = re.compile(r"Sending, (1[5-9]|[2-9]\d) %")
    wait_for(lambda: some.search(state(browser, "big.dat")), "some to be sent")


def send_slowly(browser: Any, folder: pathlib.Path, data: bytes = b"") -> str:
    """Choose "big.dat", and wait until some of it is sent; its path."""
    network(browser, 4 * MIB)
    path = make(folder, "big.dat", data or bytes(40 * MIB))
    choose(browser, path)
    wait_until_sent(browser)
    return path


def wait_for_page(browser: Any, title: str) -> None:
    """Of the page that it leaves, the browser still finds elements for a moment."""
    wait_for(
        lambda: browser.title == title, f"the page {title!r}, not {browser.title!r}"
    )


def wait_for_download(path: pathlib.Path, data: bytes) -> None:
    """Chromium first makes an empty file."""
    wait_for(lambda: path.exists() and path.stat().st_size == len(data), "the download")
    assert path.read_bytes() == data


def listed(browser: Any) -> list[str]:
    """Name and size in each row of the list, from top to bottom."""
    script = "return [...document.querySelectorAll('.name')].map(e => e.innerText)"
    return list(browser.execute_script(script))


def download(browser: Any, name: str, folder: pathlib.Path, data: bytes) -> None:
    """Wait until the file is stored, and follow its link."""
    wait_until(browser, name, "Stored")
    link(browser, name).click()
    wait_for_download(folder / name, data)


def press(browser: Any, name: str, button: str) -> None:
    item(browser, name).find_element(By.CLASS_NAME, button).click()


def network(browser: Any, rate: int = -1, offline: bool = False) -> None:
    """Let uploads take time, so many bytes a second; or take the network away."""
    conditions = {"offline": offline, "latency": 0, "downloadThroughput": -1}
    conditions["uploadThroughput"] = rate
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def loaded(browser: Any) -> list[str]:
    """The addresses that the page has asked, its own left out."""
    entries = "performance.getEntriesByType('resource')"
    return list(browser.execute_script(f"return {entries}.map(entry => entry.name)"))


def news(browser: Any) -> list[str]:
    """What screen readers have been told."""
    script = (
        "return [...document.querySelectorAll('[role=log] p')].map(p => p.innerText)"
    )
    return [line.replace("\xa0", " ") for line in browser.execute_script(script)]


def focused(browser: Any) -> str:
    return str(browser.switch_to.active_element.accessible_name)


def copied(browser: Any) -> str:
    """What is on the clipboard."""
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions})
    read = "navigator.clipboard.readText().then(arguments[0])"
    return str(browser.execute_async_script(read))


def delete(browser: Any, name: str, sure: bool = True) -> None:
    press(browser, name, "delete")
    question = browser.switch_to.alert
    question.accept() if sure else question.dismiss()


def library(path: str) -> str:
    """What npm has installed for the tests."""
    file = pathlib.Path(os.environ.get("NODE_PATH", "node_modules"), path)
    if not file.exists():
        package = path.partition("/")[0]
        pytest.fail(
            f"needs {file}; NODE_PATH says where 'npm install {package}' has put it"
        )
    return file.read_text("utf-8")


def resize(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def assert_accessible(browser: Any, state: str) -> None:
    """axe-core finds nothing, be the window narrow or wide, the page light or dark."""
    browser.execute_script(library(AXE))
    for width, scheme in itertools.product((320, 900), ("light", "dark")):
        resize(browser, width)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        found = browser.execute_async_script("axe.run().then(arguments[0])")
        assert found["passes"]
        assert found["violations"] == [], f"{state}, {width} pixels, {scheme}"
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{state} is wider than {width} pixels"


def test_50_mib_there_and_back(browser: Any, tmp_path: pathlib.Path) -> None:
    data = os.urandom(50 * MIB)
    network(browser, 100 * MIB)
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => {"
        "  const bar = document.querySelector('progress');"
        "  if (bar) seen.push(bar.value);"
        "}).observe(document.body, {subtree: true, childList: true, attributes: true});"
    )
    store(browser, make(tmp_path, "big old file.dat", data))
    seen = browser.execute_script("return seen")
    assert len({value for value in seen if 0.05 < value < 0.95}) >= 3
    assert seen == sorted(seen)
    download(browser, "big old file.dat", tmp_path, data)
    levels = [entry["level"] for entry in browser.get_log("browser")]
    assert "SEVERE" not in levels


def test_several_at_once_one_of_them_cancelled(
    browser: Any, tmp_path: pathlib.Path
) -> None:
    network(browser, MIB // 4)
    paths = [make(tmp_path, f"{number}.bin", os.urandom(MIB)) for number in range(4)]
    choose(browser, *paths, make(tmp_path, "cancelled.bin", bytes(40 * MIB)))
    wait_until(browser, "cancelled.bin", "Waiting")
    press(browser, "cancelled.bin", "cancel")
    wait_until(browser, "cancelled.bin", "Cancelled")
    network(browser, 4 * MIB)
    for number in range(4):
        wait_until(browser, f"{number}.bin", "Stored")
    network(browser)
    press(browser, "cancelled.bin", "again")
    wait_until(browser, "cancelled.bin", "Stored")


def test_a_line_that_breaks(browser: Any, tmp_path: pathlib.Path) -> None:
    """The upload goes on where it broke, and sends no more twice than what was under
    way."""
    data = os.urandom(40 * MIB)
    proxy = Proxy(browser.server.port, 1_000_000, 10_000_000, 30_000_000)
    with contextlib.closing(proxy):
        browser.get(proxy.url("/"))
        store(browser, make(tmp_path, "big.dat", data))
        assert not proxy.cuts
        # Each break costs the piece under way, once more as Chromium repeats a request
        # by itself, and once more where the server, not done with it, answers that with
        # 409.
        assert proxy.passed < len(data) + 3 * 3 * 4 * MIB
        download(browser, "big.dat", tmp_path, data)


def test_a_line_that_stalls(browser: Any, tmp_path: pathlib.Path) -> None:
    data, go_on = os.urandom(20 * MIB), threading.Event()
    proxy = Proxy(browser.server.port, 10_000_000)
    proxy.before_cut = go_on.wait
    with contextlib.closing(proxy), contextlib.ExitStack() as stack:
        stack.callback(go_on.set)
        browser.get(proxy.url("/"))
        browser.execute_script("document.body.dataset.patience = 3")  # seconds
        store(browser, make(tmp_path, "big.dat", data))
        assert "big.dat: The connection stalled. Going on in 1 s." in news(browser)
        download(browser, "big.dat", tmp_path, data)


def test_a_network_that_is_away(browser: Any, tmp_path: pathlib.Path) -> None:
    send_slowly(browser, tmp_path)
    network(browser, offline=True)
    wait_until(browser, "big.dat", "The connection broke. Going on in 8 s.")
    network(browser)  # it's back: the page notices, and does not wait
    wait_until(browser, "big.dat", "Stored")
    # Not at each attempt.
    assert len([line for line in news(browser) if "broke" in line]) == 1


def test_a_browser_that_is_closed(browser: Any, tmp_path: pathlib.Path) -> None:
    """Who chooses the file again sends the rest of it."""
    data = os.urandom(40 * MIB)
    proxy = Proxy(browser.server.port)
    with contextlib.closing(proxy):
        browser.get(proxy.url("/"))
        path = send_slowly(browser, tmp_path, data)
        browser.quit()
        with chromium(tmp_path) as later:
            later.get(proxy.url("/"))
            wait_until(later, "big.dat", "Choose this file again to go on.")
            assert proxy.passed < 40 * MIB
            choose(later, path)
            wait_until(later, "big.dat", "Stored")
            assert proxy.passed < 45 * MIB  # a piece is sent again
            download(later, "big.dat", tmp_path, data)
            later.refresh()
            assert [row.split()[0] for row in listed(later)] == ["big.dat"]
            wait_until(later, "big.dat", "Stored")


def test_a_page_that_is_loaded_again(
    browser: Any, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    for _ in range(2):
        path = send_slowly(browser, tmp_path)
        browser.refresh()
        wait_until(browser, "big.dat", "Not finished")
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Cancelled. Nothing was stored.")
    wait_for(lambda: memcached.keys() == [], "the upload to be deleted")
    send_slowly(browser, tmp_path)
    memcached.flush()
    browser.refresh()
    wait_until(browser, "big.dat", "no longer has what was sent. Choose this file")
    network(browser)
    choose(browser, path)
    wait_until(browser, "big.dat", "Stored")


def test_a_page_that_finds_no_upload_of_its_own_in_the_storage(
    browser: Any, tmp_path: pathlib.Path
) -> None:
    for value in (
        "no JSON",
        "null",
        '{"name": "a"}',
        '{"expires": 9e15, "bytes": 0, "offset": 0}',
    ):
        for key in ("memchunk / ", "memchunk stored / "):
            browser.execute_script(
                "localStorage.setItem(...arguments)", key + value, value
            )
    browser.refresh()
    assert listed(browser) == []
    store(browser, make(tmp_path, "a.txt", b"x"))
    assert browser.execute_script("return localStorage.length") == 1


def test_a_file_that_is_changed(browser: Any, tmp_path: pathlib.Path) -> None:
    pathlib.Path(send_slowly(browser, tmp_path)).unlink()
    wait_until(browser, "big.dat", "The file was changed or removed. Choose it again.")


def test_a_cache_that_lost_all(
    browser: Any, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    """The page starts over by itself, but once: it could go on like that for ever."""
    send_slowly(browser, tmp_path)
    memcached.flush()
    started_over = "Started over: the server lost what had been sent."
    wait_for(lambda: started_over in item(browser, "big.dat").text, "it to start over")
    assert "what was sent. Starting over in 1 s." in news(browser)[0]
    wait_until_sent(browser)
    memcached.flush()
    gone = "The server no longer has what was sent."
    wait_for(lambda: state(browser, "big.dat") == gone, "it to give up")
    network(browser)
    press(browser, "big.dat", "again")
    wait_until(browser, "big.dat", "Stored")


def test_cancelled_is_what_the_server_says(
    browser: Any, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    send_slowly(browser, tmp_path)
    network(browser, offline=True)
    wait_until(browser, "big.dat", "The connection broke.")
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Not cancelled yet. The connection broke.")
    assert memcached.keys() != []
    network(browser)
    wait_until(browser, "big.dat", "Cancelled. Nothing was stored.")
    wait_for(lambda: memcached.keys() == [], "the pieces to be deleted")


def test_errors_in_words(
    start: Start, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    browser = start(MEMCHUNK_MAX_SIZE="1000000")
    path = make(tmp_path, "large.bin", bytes(1_000_001))
    choose(browser, path, make(tmp_path, "larger.bin", bytes(3_000_000)))
    for name, size, limit in (
        ("large.bin", "1,000,001 bytes", "1,000,000 bytes"),
        ("larger.bin", "2.86 MiB", "977 KiB"),
    ):
        wait_until(browser, name, f"it has {size}, and files may have up to {limit}.")
    assert loaded(browser) == []  # they were not sent, and nothing is fetched elsewhere
    path = make(tmp_path, "a.txt", b"x")
    memcached.kill()
    choose(browser, path)
    # As its Retry-After says; without, it would be one second.
    wait_until(browser, "a.txt", "The cache did not answer.")
    wait_until(browser, "a.txt", "Trying again in 5 s.")
    memcached.start()  # the page tries again by itself
    wait_until(browser, "a.txt", "Stored")
    browser.server.stop()
    choose(browser, make(tmp_path, "b.txt", b"x"))
    wait_until(browser, "b.txt", "The connection broke.")


def test_a_server_without_tus(
    browser: Any, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    browser.execute_script("document.body.dataset.uploads = ''")  # as it says then
    choose(browser, make(tmp_path, "a b.txt", b"the content"))
    download(browser, "a b.txt", tmp_path, b"the content")
    kept = memcached.keys()
    send_slowly(browser, tmp_path)
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Cancelled. Nothing was stored.")
    wait_for(lambda: memcached.keys() == kept, "its chunks to be deleted")
    network(browser)
    press(browser, "big.dat", "again")
    wait_until(browser, "big.dat", "Stored")


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
    field.send_keys("s3cret", Keys.ENTER)
    wait_until(browser, "a.txt", "Stored")
    readers = browser.find_element(By.ID, "readers")
    wait_for(lambda: "need the token, too" in readers.text, "the page to say so")
    browser.refresh()
    why = browser.find_element(By.ID, "unchecked")
    wait_for(
        lambda: "not checked. This server wants a token." in why.text, "to be told"
    )
    assert "Stored" in state(browser, "a.txt")
    browser.find_element(By.ID, "token").send_keys("s3cret", Keys.ENTER)
    wait_for(lambda: why.text == "", "the file to be checked")
    # What the browser sends when its user has typed the token into the link's dialog.
    browser.get(address(browser, "a.txt").replace("http://", "http://:s3cret@"))
    wait_for_download(tmp_path / "a.txt", b"the content")


def test_token_that_recipients_do_not_need(
    start: Start, tmp_path: pathlib.Path
) -> None:
    browser = start(MEMCHUNK_TOKEN="s3cret", MEMCHUNK_PUBLIC_READ="1")
    browser.find_element(By.ID, "token").send_keys("s3cret")
    [url] = store(browser, make(tmp_path, "a.txt", b"x"))
    wait_for(lambda: url in loaded(browser), "the page to ask")
    assert not browser.find_element(By.ID, "readers").is_displayed()


def test_drop(browser: Any, memcached: Memcached) -> None:
    browser.execute_script(
        "const data = new DataTransfer();"
        "for (const name of ['one.txt', 'two.txt'])"
        "  data.items.add(new File(['12345'], name));"
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


def test_expiry_and_copy(browser: Any, tmp_path: pathlib.Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "option[value='3600']").click()
    [url] = store(browser, make(tmp_path, "a.txt", b"x"))
    info = browser.server.request("GET", url + "?info")
    shown = browser.execute_script(
        "return new Date(1000 * arguments[0])"
        ".toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' })",
        info.json["expires"],
    )
    assert f"Stored until {shown}" in state(browser, "a.txt")
    press(browser, "a.txt", "copy")
    wait_for(lambda: "Copied" in item(browser, "a.txt").text, "the button to say so")
    assert copied(browser) == url


def test_a_long_link_is_shortened_in_the_middle_and_copied_whole(
    browser: Any, tmp_path: pathlib.Path
) -> None:
    """Also without TLS, where browsers give pages no clipboard."""
    browser.get(f"http://{PLAIN}:{browser.server.port}/")
    assert browser.execute_script("return navigator.clipboard === undefined")
    [url], heights = store(browser, make(tmp_path, "a.txt", b"x")), []
    for width in (320, 900):
        resize(browser, width)
        heights.append(link(browser, "a.txt").size["height"])
        for part, is_cut in ((".start", width == 320), (".end", False)):
            seen = browser.find_element(By.CSS_SELECTOR, f"li {part}")
            needs = int(seen.get_property("scrollWidth"))
            assert (needs > seen.size["width"] + 2) == is_cut
    assert heights[0] == heights[1]  # one line
    select = "getSelection().selectAllChildren(document.querySelector('li .link'))"
    browser.execute_script(select)
    assert browser.execute_script("return getSelection().toString()") == url
    press(browser, "a.txt", "copy")
    wait_for(lambda: "Copied" in item(browser, "a.txt").text, "the button to say so")
    browser.get(browser.server.url("/"))
    assert copied(browser) == url


def test_speed_and_time_left(browser: Any, tmp_path: pathlib.Path) -> None:
    network(browser, 4 * MIB)
    choose(browser, make(tmp_path, "big.dat", bytes(32 * MIB)))
    pace = r"\d+ %, [\d.]+ [KM]iB/s, \d+ (s|min) left"
    wait_for(lambda: re.search(pace, state(browser, "big.dat")), "speed and time left")
    wait_until(browser, "big.dat", "Stored")
    assert re.search(f"big.dat: {pace}", " ".join(news(browser)))


def test_five_files_are_shared_in_one_go(browser: Any, tmp_path: pathlib.Path) -> None:
    files = {f"{n}.txt": b"the content" * n for n in range(5)}
    paths = [make(tmp_path, name, data) for name, data in files.items()]
    urls = store(browser, *paths)
    assert not browser.find_element(By.ID, "copy-new").is_displayed()
    browser.find_element(By.ID, "copy-all").click()
    wait_for(
        lambda: copied(browser).split("\n") == urls[::-1], "newest first, as shown"
    )
    for url, data in zip(urls, files.values()):
        assert browser.server.request("GET", url).data == data
    browser.refresh()
    assert [name[:5] for name in listed(browser)] == list(files)[::-1]
    urls = store(browser, *(make(tmp_path, name, b"new") for name in ("a", "b")))
    browser.find_element(By.ID, "copy-new").click()
    wait_for(lambda: copied(browser).split("\n") == urls[::-1], "those alone")


def test_the_list_the_next_day(
    browser: Any, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    sizes = {"deleted.txt": 1, "expired.txt": 1, "evicted.txt": MIB, "kept.txt": 1}
    paths = [make(tmp_path, name, bytes(size)) for name, size in sizes.items()]
    deleted, expired, *_ = store(browser, *paths)
    for url in (deleted, expired):
        assert browser.server.request("DELETE", url).status == 204
    browser.execute_script(
        "const key = 'memchunk stored / ' + arguments[0];"
        "const entry = JSON.parse(localStorage[key]);"
        "localStorage[key] = JSON.stringify({ ...entry, expires: 1e9 });",
        expired.rpartition("/")[2],
    )
    memcached.delete(next(filter(re.compile(r"\|#\|").search, memcached.keys())))
    browser.refresh()
    wait_until(browser, "deleted.txt", "The server no longer has this file.")
    wait_until(browser, "expired.txt", "It expired on Sep 9, 2001")
    wait_until(browser, "evicted.txt", "The server lost a part of this file.")
    wait_until(browser, "kept.txt", "Stored")
    told = "Files in the list that are gone from the server: 3."
    wait_for(lambda: told in news(browser), "the news")
    assert not link(browser, "deleted.txt").is_displayed()
    press(browser, "evicted.txt", "remove")
    assert focused(browser) == "Remove from list: expired.txt"
    browser.find_element(By.ID, "sweep").click()
    browser.refresh()
    assert listed(browser) == ["kept.txt 1 byte"]


def test_an_upload_that_another_client_ended(
    browser: Any, tmp_path: pathlib.Path
) -> None:
    """As the page itself does if it is closed before the last answer has come."""
    data = os.urandom(40 * MIB)
    send_slowly(browser, tmp_path, data)
    browser.refresh()
    wait_until(browser, "big.dat", "Not finished")
    script = "return JSON.parse(Object.values(localStorage)[0]).address"
    upload, tus = browser.execute_script(script), {"Tus-Resumable": "1.0.0"}

    def finish() -> bool:
        ask = browser.server.request
        offset = int(ask("HEAD", upload, headers=tus).headers["Upload-Offset"])
        tus["Upload-Offset"] = str(offset)
        tus["Content-Type"] = "application/offset+octet-stream"
        return bool(ask("PATCH", upload, data[offset:], tus).status == 204)

    wait_for(finish, "the page's last request to be over, and the rest to be taken")
    browser.refresh()
    download(browser, "big.dat", tmp_path, data)


def test_open_and_delete(browser: Any, tmp_path: pathlib.Path) -> None:
    names = ("a.bin", "b.bin")
    _, url = store(browser, *(make(tmp_path, name, b"12345") for name in names))
    press(browser, "b.bin", "open")
    wait_for_download(tmp_path / "b.bin", b"12345")
    delete(browser, "b.bin", sure=False)
    assert browser.server.request("GET", url).status == 200
    network(browser, offline=True)
    delete(browser, "b.bin")
    note = "Not deleted. The connection broke."
    wait_for(lambda: note in item(browser, "b.bin").text, note)
    network(browser)
    delete(browser, "b.bin")
    wait_for(lambda: len(listed(browser)) == 1, "the row to go")
    assert browser.server.request("GET", url).status == 404
    assert news(browser)[-1] == "b.bin: Deleted."
    assert focused(browser) == "Copy link: a.bin"
    browser.refresh()
    assert listed(browser) == ["a.bin 5 bytes"]


def test_the_list_in_two_windows(browser: Any, tmp_path: pathlib.Path) -> None:
    first = browser.current_window_handle
    browser.switch_to.new_window("window")
    second = browser.current_window_handle
    browser.get(browser.server.url("/"))
    for window, name in ((first, "a.txt"), (second, "b.txt")):
        browser.switch_to.window(window)
        store(browser, make(tmp_path, name, b"1"))
    both = {"a.txt 1 byte", "b.txt 1 byte"}
    for window in (first, second):
        browser.switch_to.window(window)
        wait_for(lambda: set(listed(browser)) == both, "both files in both windows")
    delete(browser, "a.txt")
    browser.switch_to.window(first)
    wait_for(lambda: listed(browser) == ["b.txt 1 byte"], "the other window to notice")
    browser.refresh()
    assert listed(browser) == ["b.txt 1 byte"]


@pytest.mark.parametrize("refused", ["cookies", "full"])
def test_a_browser_that_keeps_nothing(
    start: Start, tmp_path: pathlib.Path, refused: str
) -> None:
    browser = start("cookies" if refused == "cookies" else "")
    if refused == "full":
        browser.execute_script(
            "localStorage.filler = '';"
            "for (let size = 2 ** 23; size >= 1; size /= 2) {"
            "  try { localStorage.filler += 'x'.repeat(size); } catch {}"
            "}"
        )
    store(browser, make(tmp_path, "a.txt", b"x"), make(tmp_path, "b.txt", b"y"))
    kept = browser.find_element(By.ID, "kept").text
    assert kept.startswith("This browser does not keep the list. Copy the links")
    delete(browser, "b.txt")
    wait_for(lambda: listed(browser) == ["a.txt 1 byte"], "the row to go")


def test_paste(browser: Any, tmp_path: pathlib.Path) -> None:
    copied(browser)  # what is allowed for that allows to write there, too
    browser.execute_async_script(
        "const [done] = arguments, canvas = new OffscreenCanvas(5, 5);"
        "canvas.getContext('2d').fillRect(1, 1, 2, 2);"
        "const item = new ClipboardItem({ 'image/png': canvas.convertToBlob() });"
        "navigator.clipboard.write([item]).then(done)"
    )
    keys = webdriver.ActionChains(browser).key_down(Keys.CONTROL)
    keys.send_keys("v").key_up(Keys.CONTROL).perform()
    wait_for(lambda: listed(browser), "the picture")
    wait_until(browser, "image.png", "Stored")
    answer = browser.server.request("GET", address(browser, "image.png"))
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.data.startswith(b"\x89PNG")


def test_keyboard_and_screen_reader(browser: Any, tmp_path: pathlib.Path) -> None:
    store(browser, make(tmp_path, "a.txt", b"x"))
    wait_for(lambda: len(news(browser)) == 1, "the news")
    assert news(browser)[0].startswith("a.txt: Stored")
    seen = []
    browser.execute_script("document.activeElement.blur()")
    for _ in range(7):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        seen.append(focused(browser))
    assert seen[0] == "Keep"
    assert seen[1].startswith("Choose files, drop them here, or paste them")
    assert seen[2] == address(browser, "a.txt")
    actions = ("Copy link", "Open", "Delete", "Remove from list")
    assert seen[3:] == [f"{action}: a.txt" for action in actions]


def test_the_focus_stays_with_the_file(browser: Any, tmp_path: pathlib.Path) -> None:
    """A button that goes, as it was pressed or has become pointless, leaves it to
    another."""
    network(browser, MIB)
    choose(browser, make(tmp_path, "big.dat", bytes(20 * MIB)))
    wait_until(browser, "big.dat", "Sending")
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Cancelled")
    assert focused(browser).startswith("big.dat 20 MiB Cancelled.")  # the whole row
    press(browser, "big.dat", "again")
    wait_until(browser, "big.dat", "Sending")
    assert focused(browser) == "Cancel: big.dat"
    network(browser)
    wait_until(browser, "big.dat", "Stored")
    assert focused(browser) == "Copy link: big.dat"
    assert "big.dat: Cancelled. Nothing was stored." in news(browser)
    assert news(browser)[-1].startswith("big.dat: Stored")


def test_axe_finds_nothing(
    start: Start, tmp_path: pathlib.Path, memcached: Memcached
) -> None:
    browser = start(MEMCHUNK_TOKEN="s3cret")
    assert_accessible(browser, "idle")
    choose(browser, make(tmp_path, "small.txt", b"x"))
    wait_until(browser, "small.txt", "wants a token")
    assert_accessible(browser, "failed")
    browser.switch_to.active_element.send_keys("s3cret", Keys.ENTER)
    wait_until(browser, "small.txt", "Stored")
    assert_accessible(browser, "done")
    network(browser, MIB // 4)
    choose(browser, make(tmp_path, "big.dat", bytes(50 * MIB)))
    wait_until(browser, "big.dat", "Sending")
    assert_accessible(browser, "uploading")
    network(browser, offline=True)
    wait_until(browser, "big.dat", "Going on in")
    assert_accessible(browser, "retrying")
    network(browser, MIB // 4)
    wait_until(browser, "big.dat", "Sending")
    browser.refresh()
    wait_until(browser, "big.dat", "Not finished")
    assert_accessible(browser, "not finished, not checked")
    memcached.flush()
    browser.find_element(By.ID, "token").send_keys("s3cret", Keys.ENTER)
    wait_until(browser, "small.txt", "The server no longer has this file.")
    press(browser, "big.dat", "cancel")
    wait_until(browser, "big.dat", "Cancelled")
    assert_accessible(browser, "cancelled, lost")


def test_words_without_script(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start(MEMCHUNK_MAX_SIZE="1000")
    command = "Emulation.setScriptExecutionDisabled"
    disable = functools.partial(browser.execute_cdp_cmd, command)
    for data, title in ((b"x", "Stored"), (bytes(10_000_000), HTTP_STATUS_CODES[413])):
        disable({"value": True})
        browser.get(browser.server.url("/"))
        choose(browser, make(tmp_path, title, data))
        disable({"value": False})
        assert_accessible(browser, "without script")
        browser.find_element(By.TAG_NAME, "button").click()
        wait_for_page(browser, title)
        assert_accessible(browser, title)
    assert (
        "may have up to 1,000 bytes" in browser.find_element(By.TAG_NAME, "body").text
    )
    browser.find_element(By.LINK_TEXT, "Upload a file").click()
    wait_for_page(browser, "memchunk: upload files")


def test_without_script(start: Start, tmp_path: pathlib.Path) -> None:
    browser = start("javascript")
    browser.find_element(By.CSS_SELECTOR, "option[value='86400']").click()
    choose(browser, make(tmp_path, "plain.txt", b"the content"))
    browser.find_element(By.TAG_NAME, "button").click()
    wait_for_page(browser, "Stored")
    assert "11 bytes, kept until 20" in browser.find_element(By.TAG_NAME, "body").text
    browser.find_element(By.TAG_NAME, "a").click()
    wait_for_download(tmp_path / "plain.txt", b"the content")


def test_behind_a_proxy_that_takes_small_bodies(
    browser: Any, tmp_path: pathlib.Path
) -> None:
    """And that has the API below a path of which the API knows nothing."""
    data = os.urandom(10 * MIB)
    nginx = Nginx(tmp_path, browser.server.port)
    with contextlib.closing(nginx):
        browser.get(f"http://127.0.0.1:{nginx.plain}/small/")
        store(browser, make(tmp_path, "big.dat", data))
        assert f":{nginx.plain}/small/files/" in link(browser, "big.dat").text
        download(browser, "big.dat", tmp_path, data)


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path) -> Iterator[str]:
    """Another site, which has a page with tus-js-client and Uppy."""
    (tmp_path / "site").mkdir()
    for name, path in (("tus.js", TUS), ("uppy.js", UPPY)):
        (tmp_path / "site" / name).write_text(library(path), "utf-8")
    (tmp_path / "site" / "index.html").write_text(
        "<title>Elsewhere</title>"
        "<script src=tus.js></script><script src=uppy.js></script>"
    )
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_page_of_another_site(start: Start, elsewhere: str) -> None:
    browser = start(MEMCHUNK_ORIGINS=elsewhere, MEMCHUNK_TOKEN="s3cret")
    browser.set_script_timeout(SECONDS)
    browser.get(elsewhere)
    upload = functools.partial(
        browser.execute_async_script, ELSEWHERE, browser.server.url("/")
    )
    got = upload("s3cret", 20 * MIB)
    assert len(got) == 3, got  # else it is the text of an error
    etag, size, same = got
    assert etag
    assert (size, same) == (20 * MIB, True)
    assert "401" in upload("wrong", 1)  # an answer that it may read, too


@pytest.mark.parametrize("name", ["uppy tus", "uppy xhr"])
def test_uppy_uploads_by_the_recipe(start: Start, elsewhere: str, name: str) -> None:
    browser = start(MEMCHUNK_ORIGINS=elsewhere)
    browser.set_script_timeout(SECONDS)
    browser.get(elsewhere)
    recipe = snippet("docs/uploads.md", name)
    site = browser.server.url("")
    script = BEFORE_RECIPE + recipe + AFTER_RECIPE
    assert browser.execute_async_script(script, site) == ["a b.txt", site, True]


def test_a_page_of_a_site_that_is_not_allowed(
    start: Start, elsewhere: str, memcached: Memcached
) -> None:
    browser = start(MEMCHUNK_ORIGINS="https://other.example")
    browser.set_script_timeout(SECONDS)
    browser.get(elsewhere)
    refused = browser.execute_async_script(ELSEWHERE, browser.server.url("/"), "", 1)
    assert "failed to create upload" in refused
    assert memcached.keys() == []

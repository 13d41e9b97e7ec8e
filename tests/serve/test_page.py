"""The page at `/`: its files, what they refer to, its scripts under node, and a conversation in a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import CHROMIUM, Page, browser
from tests.serve.running import ask, running
from zerodraft.serve.app import FILES
from zerodraft.serve.load import serve_model

NODE = shutil.which("node")
TYPES = {
    ".html": {"text/html"},
    ".css": {"text/css"},
    ".mjs": {"text/javascript", "application/javascript"},
    ".svg": {"image/svg+xml"},
}
HTML = (FILES / "index.html").read_text(encoding="utf-8")
SCRIPTS = {file.name: file.read_text(encoding="utf-8") for file in FILES.glob("*.mjs")}
IDS = re.findall(r'\bid="([^"]+)"', HTML)


def test_its_files_are_served_as_what_they_are(url: str) -> None:
    for file in FILES.iterdir():
        status, text, headers = ask(url, f"/page/{file.name}")
        assert (status, text) == (200, file.read_text(encoding="utf-8"))
        assert headers["content-type"].partition(";")[0] in TYPES[file.suffix]
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-cache"
    assert ask(url, "/")[1] == HTML


def test_nothing_refers_elsewhere() -> None:
    for file in FILES.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w+://|@import|url\(", text), file
    referred = re.findall(r'\b(?:src|href)="([^"]+)"', HTML)
    assert {name for name in referred if not (FILES / name.removeprefix("page/")).is_file()} == set()
    for text in SCRIPTS.values():
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(SCRIPTS)
        # what the model wrote is text, and never HTML
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    # the policy lets nothing run that stands in the page itself
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", HTML)


def test_what_the_script_looks_for_is_there() -> None:
    assert len(IDS) == len(set(IDS))
    used = set(re.findall(r'\bat\("([^"]+)"\)', SCRIPTS["main.mjs"]))
    assert len(used) > 20
    assert used <= set(IDS)
    assert set(re.findall(r'\b(?:for|aria-labelledby|aria-describedby)="([^"]+)"', HTML)) <= set(IDS)
    labelled = set(re.findall(r'<label for="([^"]+)"', HTML)) | set(
        re.findall(r'<label><input [^>]*id="([^"]+)"', HTML)
    )
    assert set(re.findall(r'<(?:input|textarea)[^>]*\bid="([^"]+)"', HTML)) == labelled


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_its_scripts_read_what_the_server_tells(url: str) -> None:
    command = [str(NODE), str(Path(__file__).with_name("page_test.mjs")), str(FILES), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all held\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def text_of(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


def write(page: Page, text: str) -> None:
    """As a person does, with the keyboard."""
    page.run("document.querySelector('#text').focus()")
    page.tell("Input.insertText", text=text)
    page.key("Enter", "\r")


def set_value(page: Page, selector: str, value: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(value)}")


IDLE = "document.querySelector('#stop').disabled"
BUSY = "document.querySelectorAll('.message:nth-of-type(4) .token').length > 3"


def test_a_conversation_in_a_browser(page: Page, model: Any, tokenizer: Any) -> None:
    with running(serve_model(model, tokenizer, "tiny", "lookup"), key="secret") as url:
        page.open(url)
        # the server wants a key, and says so itself
        assert "Give the server's key" in text_of(page, "#problem")
        assert page.run("document.activeElement.id") == "key"
        page.tell("Input.insertText", text="secret")
        page.key("Enter", "\r")
        page.wait("!document.querySelector('#send').disabled")
        assert text_of(page, "#problem") == ""

        set_value(page, "#max-tokens", "24")
        write(page, "the <b>cat</b> sat on the mat. the cat sat on the mat.")
        page.wait(f"{IDLE} && document.querySelector('.answer .end').textContent")
        words = text_of(page, ".answer .words")
        messages = [{"role": "user", "content": "the <b>cat</b> sat on the mat. the cat sat on the mat."}]
        body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
        answer = ask(url, "/v1/chat/completions", body, Authorization="Bearer secret")[1]
        assert words == answer["choices"][0]["message"]["content"]
        assert page.run("document.querySelectorAll('#messages b').length") == 0
        assert "Answer of 24 tokens" in text_of(page, "#status")
        # the steps, from the first one on
        page.run("document.querySelector('.answer .token').click()")
        assert text_of(page, "#step-said").endswith("read the prompt and wrote the first token.")
        page.run("document.querySelector('#after').click()")
        assert text_of(page, "#step-said").startswith("Step 2 of ")
        assert page.run("document.querySelectorAll('#charts path[d^=M]').length") >= 3

        # the same answer without drafts
        page.run("document.querySelector('#compare').click()")
        page.wait(f"{IDLE} && document.querySelector('#compare').disabled")
        figures = text_of(page, "#figures")
        assert "Tokens a second without drafts" in figures
        assert "Text without draftsthe same" in figures
        assert page.run("document.querySelectorAll('.message').length") == 2

        # what the server refuses is said in its words, and nothing that was written is lost
        set_value(page, "#temperature", "9")
        write(page, "and then?")
        page.wait("document.querySelector('#problem').textContent")
        assert text_of(page, "#problem").startswith("'temperature' does not fit")
        assert page.run("document.querySelector('#text').value") == "and then?"
        assert page.run("document.querySelectorAll('.message').length") == 2

        # a long answer is stopped by a key, and the conversation cleared
        set_value(page, "#temperature", "0")
        set_value(page, "#max-tokens", "1800")
        write(page, "")
        page.wait(BUSY)
        page.key("Escape")
        page.wait(IDLE)
        assert "You stopped it here." in page.run("[...document.querySelectorAll('.end')].at(-1).textContent")
        page.run("document.querySelector('#clear').click()")
        assert page.run("document.querySelectorAll('.message').length") == 0

        for width in (400, 1280):
            page.look(width, 800)
            assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.documentElement.scrollHeight") <= 800
    # the refusals, and nothing else
    assert not [said for said in page.said if "status of 40" not in said]

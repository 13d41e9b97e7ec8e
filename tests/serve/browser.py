"""A real browser without a window: Chromium, told what to do through a pipe by its own debugging protocol."""

import base64
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = () if os.name == "nt" else ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Args:
        commands: Where the browser reads.
        answers: Where it writes.

    Attributes:
        said: Messages of the page's console, and of the browser about the page.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._number = commands, answers, b"", 0
        self._session: dict[str, str] = {}
        self.said: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        told = self.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        script = f"""new Promise((done, fail) => {{
            const end = Date.now() + {1000 * seconds};
            const look = () => {{
                if ({condition}) done();
                else if (Date.now() > end) fail(new Error("never"));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        self.run(script)

    def key(self, name: str, text: str = "") -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.tell("Input.dispatchKeyEvent", type=kind, key=name, code=name, text=text if kind == "keyDown" else "")

    def shot(self, path: Path) -> None:
        """A picture of what is to be seen."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size in pixels, and its colours."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Load a page, and wait until its script has the model's name."""
        self.tell("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && !document.querySelector('#model')?.textContent.includes('…')")


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser whose files lie in this folder."""
    import fcntl

    assert CHROMIUM is not None
    (its_read, commands), (answers, its_write) = os.pipe(), os.pipe()
    # the protocol's pipes are 3 and 4 of the browser, whatever they are here
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_read, its_write)]
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "about:blank"]
    with open(folder / "browser.log", "w") as log:
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in zip((3, 4), ends, strict=True)]
        actions.append((os.POSIX_SPAWN_DUP2, log.fileno(), 2))
        process = os.posix_spawn(CHROMIUM, [CHROMIUM, *flags], os.environ, file_actions=actions)
    for end in (its_read, its_write, *ends):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
        os.close(commands)
        os.close(answers)

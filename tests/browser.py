"""A headless Chromium for tests that click: Chrome's DevTools protocol, nothing between."""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOADED = "new Promise(r => document.readyState == 'complete' ? r(1) : addEventListener('load', () => r(1)))"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._asked = 0

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        self._connection.send(json.dumps({"id": self._asked, "method": method, "params": parameters}))
        while True:
            answer: dict[str, Any] = json.loads(self._connection.recv(timeout=30))
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """What JavaScript makes of it."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of what a reader would see of it."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.value(
            f"(() => {{ const r = {found}.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        )
        hit = f"{found}.contains(document.elementFromPoint({x}, {y}))"
        assert self.value(hit), f"{selector} is covered by something else"
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@contextlib.contextmanager
def opened(url: str, *, width: int = 1100, height: int = 900) -> Iterator[Page]:
    """The page at a URL, loaded."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            port = next(found[1] for line in process.stderr if (found := re.search(r"127\.0\.0\.1:(\d+)/", line)))
            with _tab(int(port)) as connection:
                page = Page(connection)
                page.ask("Page.navigate", url=url)
                page.value(LOADED)
                yield page
        finally:
            process.terminate()
            process.wait(20)


def _tab(port: int) -> ClientConnection:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
        tabs = json.loads(answer.read())
    url = next(each["webSocketDebuggerUrl"] for each in tabs if each["type"] == "page")
    return connect(url, max_size=2**26)

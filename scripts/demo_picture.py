"""The picture of the demo in docs/demo.md: its page as a visitor first sees it, in Chromium.

python -m scripts.demo_picture

Needs Chromium and ``pip install playwright``. The demo runs in another process, on a free port of this machine.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from gemma_scope_tl.files import write_atomically
from scripts.artefacts.inputs import ROOT
from scripts.artefacts.steps import CHROMIUM

PICTURE = ROOT / "docs" / "demo-app.png"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
START_SECONDS = 900


def main() -> None:
    """Start the demo, wait until its page shows the first result, and write the picture."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gemma_scope_tl.cli", "demo", "--port", str(port), "--rows", "16"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        address = f"http://127.0.0.1:{port}/"
        _wait_for(address, demo)
        write_atomically(PICTURE, _picture(address))
    finally:
        demo.terminate()
        demo.wait(20)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


def _wait_for(address: str, demo: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while demo.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise SystemExit("The demo did not start.")


def _picture(address: str) -> bytes:
    from playwright.sync_api import expect, sync_playwright  # not in the environment of the tests

    with sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(executable_path=str(Path(CHROMIUM)), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        expect(page.locator("#gs-words")).to_contain_text(re.compile(r"Latent \d+ is active on"), timeout=300_000)
        page.mouse.move(0, 0)
        shot = page.screenshot()
        browser.close()
    return shot


if __name__ == "__main__":
    main()

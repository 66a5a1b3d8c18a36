"""A headless Chromium for tests of pages, and the packages that check and build them; reasons where there are none."""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

WEB = Path(__file__).parents[1] / "autoprune" / "result" / "report" / "web"
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
_SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def why_no_browser() -> str:
    """Reason why no page can be tried here; empty if one can."""
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium: pip install autoprune[dev]"
    if not (_CHROMIUM and _DRIVER):
        return "needs Chromium and its driver: apt-get install chromium chromium-driver"
    return ""


def node_modules() -> tuple[Path | None, str]:
    """Folder of the packages of the lock file, installed once for this machine; None with the reason without."""
    if not shutil.which("npm"):
        return None, "needs npm: apt-get install npm"
    lock = (WEB / "package-lock.json").read_bytes()
    kept = Path(tempfile.gettempdir()) / f"autoprune-node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not kept.exists():
        fresh = Path(tempfile.mkdtemp(prefix="autoprune-node-"))
        for name in ("package.json", "package-lock.json"):
            shutil.copy(WEB / name, fresh)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            return None, "npm ci took longer than four minutes"
        if done.returncode:
            shutil.rmtree(fresh)
            return None, f"npm ci failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]:.200}"
        try:
            os.rename(fresh, kept)
        except OSError:  # another process was first
            shutil.rmtree(fresh)
    return kept / "node_modules", ""


class Browser:
    """Chromium that records console messages and requests; use it in a ``with``."""

    def __init__(self, downloads: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = _CHROMIUM
        for switch in _SWITCHES:
            options.add_argument(switch)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
        self.downloads = downloads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def show(self, width=1280, height=900, dark=False, media="screen"):
        """Set the size of the window and the colours that the system asks for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def open(self, address, **shown):
        """Open a page and wait until it is complete."""
        self.show(**shown)
        self.messages(), self.requests()  # of the page before
        self.driver.get(address.as_uri() if isinstance(address, Path) else address)
        self.wait("document.documentElement.dataset.ready === 'complete'")

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition, seconds=30.0):
        """Wait until a condition in JavaScript holds."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}; {self.messages()}"
            time.sleep(0.05)

    def messages(self):
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that were asked for since the last call, pages and data in place left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        asked = [one["request"]["url"] for one in sent if one["type"] != "Document"]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def texts(self, selector):
        """Texts of all elements that match."""
        return self.run("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.find(selector).click()

    def press(self, *keys):
        """Press keys where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def picture(self):
        """Picture of the window, as PNG."""
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])

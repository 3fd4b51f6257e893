"""The pages in a real browser: nothing complains, every picture loads, a phone shows all of it, and
no name is taken for a part of the page."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the extra idml_fast[train] is not installed")

from test_benchmarks import made_up_run
from test_compare import written
from test_report import outcome
from test_reproduce import made_up

from idml_fast.benchmarks import records
from idml_fast.benchmarks.report import report as benchmarks
from idml_fast.evaluation import pictures
from idml_fast.train.compare import compare
from idml_fast.train.config import Config, DataConfig, LossConfig
from idml_fast.train.criterion import TASKS
from idml_fast.train.data import load_data
from idml_fast.train.report import write_report
from idml_fast.train.reproduce import TITLES, Comparison, write_comparison
from idml_fast.train.table import SETS, Table, write_table

BROWSERS = "chromium", "chromium-browser", "google-chrome"
PROGRAM = next(filter(None, map(shutil.which, BROWSERS)), None)
NAME = '<script>alert(1)</script>&"' + "x" * 60  # broader than a phone
PHONE, DESK = 390, 1200  # pixels
SECONDS = 60  # to wait for an answer at most
# What a page says of itself, once all that folds is unfolded.
ASKED = """(() => {
  document.querySelectorAll("details").forEach(x => { x.open = true })
  const found = (selector, holds) => [...document.querySelectorAll(selector)].filter(holds)
  return {
    text: document.body.innerText,
    title: document.title,
    scripts: document.scripts.length,
    width: document.documentElement.scrollWidth,
    images: document.images.length,
    missing: found("img", x => !x.complete || !x.naturalWidth).map(x => x.alt),
    sticking_out: found(".card:not(.wide)", x => x.scrollWidth > x.clientWidth).map(
      x => x.innerText
    ),
  }
})()"""

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"there is none of {', '.join(BROWSERS)}")


@dataclass
class Visit:
    """A page at one width.

    Args:
        asked: the answers to `ASKED`.
        told: messages of the console that are errors or warnings, exceptions and dialogues.
        fetched: addresses that were asked for, but for those that hold what they name.
    """

    asked: dict[str, Any]
    told: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)


class Browser:
    """A browser without a window, spoken to through its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(SECONDS)
        theirs.set_inheritable(True)
        self.received, self.events, self.session, self.calls = b"", [], {}, 0
        with (folder / "stderr").open("w") as log, theirs:
            self.process = subprocess.Popen(
                # No sandbox: it cannot be had in every container, and the pages are our own.
                [
                    *(PROGRAM, "--headless", "--no-sandbox", "--disable-gpu"),
                    *("--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"),
                ],
                close_fds=False,
                # The browser reads from 3 and writes to 4.
                preexec_fn=lambda: [os.dup2(theirs.fileno(), place) for place in (3, 4)],
                stderr=log,
            )
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Log", "Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a call; what happens until it comes is in `events`."""
        self.calls += 1
        told = {"id": self.calls, "method": method, "params": parameters, **self.session}
        self.socket.sendall(json.dumps(told).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.received:
            part = self.socket.recv(2**16)
            assert part, "the browser has gone"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def visit(self, path: Path, width: int) -> Visit:
        """A page as it is when all of it is there."""
        device = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.call("Emulation.setDeviceMetricsOverride", **device)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        asked = self.call("Runtime.evaluate", expression=ASKED, returnByValue=True)
        visit = Visit(asked["result"]["value"])
        for event in self.events:
            told = event["params"]
            match event["method"]:
                case "Network.requestWillBeSent":
                    visit.fetched.append(told["request"]["url"])
                case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                    visit.told.append(told["entry"]["text"])
                case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                    visit.told.append(str(told["args"]))
                case "Runtime.exceptionThrown" | "Page.javascriptDialogOpening":
                    visit.told.append(str(told))
        visit.fetched = [x for x in visit.fetched if not x.startswith("data:")]
        return visit

    def close(self) -> None:
        """End the browser."""
        try:
            self.session = {}
            self.call("Browser.close")
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            self.socket.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def report(folder: Path, task: str) -> Path:
    """The report of a run whose names are like parts of a page."""
    config = Config(data=DataConfig(task=task))
    data = load_data(config.data)
    outcomes = {
        name: outcome(metric, seed, data.test_labels)
        for seed, (name, metric) in enumerate(config.metrics.items())
    }
    for found in outcomes.values():
        found.epochs = [epoch | {"top_1": 0.5} for epoch in found.epochs]
        if task == "classification":
            names = [name for name in found.results if not name.startswith("recall")]
            found.results = {"top_1": 0.5} | {name: found.results[name] for name in names}
    config.name = config.data.name = NAME  # which a configuration refuses
    path = folder / f"{task}.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAPPED", 50)
        write_report(path, config, data, outcomes, seconds=12.3)
    return path


def comparison(folder: Path) -> Path:
    """Six runs, told apart by their folders, since they have one name."""
    runs = [
        written(
            folder / str(number) / NAME,
            name="same",
            loss=LossConfig(options={"margin": number / 8}),
        )
        for number in range(6)
    ]
    return compare(runs, folder / "comparison.html")


def every_loss(folder: Path) -> Path:
    """All losses, three seeds."""
    classifies = TASKS["classification"]
    rows = [
        made_up([0.01, 0.03, -0.02], task, name)
        for name in TITLES
        for task in ["classification" if name.startswith(classifies) else "retrieval"]
    ]
    write_comparison(folder / "all.html", Comparison(NAME, (0, 1, 2), rows, [Config()]))
    return folder / "all.html"


def papers_table(folder: Path) -> Path:
    """Two losses on every data set, three seeds."""
    names = "proxy_anchor", "margin"
    rows = {x: [made_up([0.01, 0.03, -0.02], name=name) for name in names] for x in SETS}
    write_table(folder / "table.html", Table((0, 1, 2), rows, {NAME: Config()}, (NAME,)))
    return folder / "table.html"


def recorded_runs(folder: Path) -> Path:
    """Eight runs of two cases, each with a name that is broader than a phone, on two devices."""
    for number in range(8):
        ours = [0.1 + number / 50, 0.12 + number / 50, 0.14]
        times = {"ours": ours, "ours again": ours, "eager": [1.0] * 3, NAME: [0.2] * 3}
        cases = {"pairwise, fp32": times, NAME: times, "without a peer": {"ours": [1.0]}}
        for device in ("A CPU", NAME):
            found = made_up_run(cases, commit=f"{number}abcdef", device=device, notes=[NAME])
            records.write(found, folder / "results")
    (page,) = benchmarks(folder / "results", folder / "benchmarks.html")
    return page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "retrieval": report(folder, "retrieval"),
        "classification": report(folder, "classification"),
        "comparison": comparison(folder),
        "every loss": every_loss(folder),
        "the paper's table": papers_table(folder),
        "benchmarks": recorded_runs(folder),
    }


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize(
    "page",
    ["retrieval", "classification", "comparison", "every loss", "the paper's table", "benchmarks"],
)
def test_a_page_is_shown_whole_and_quietly(browser, pages, page, width):
    visit = browser.visit(pages[page], width)
    assert visit.told == []
    assert visit.fetched == [pages[page].as_uri()]
    assert visit.asked["images"] >= 2
    assert visit.asked["missing"] == []
    assert visit.asked["width"] <= width
    assert visit.asked["sticking_out"] == []
    assert visit.asked["scripts"] == 0
    assert NAME in visit.asked["text"]


@pytest.mark.parametrize("page", ["retrieval", "every loss"])
def test_the_name_is_in_the_title_as_it_is(browser, pages, page):
    assert NAME in browser.visit(pages[page], DESK).asked["title"]


def test_what_is_wrong_with_a_page_is_seen(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        """<!doctype html><meta name="viewport" content="width=device-width">
        <script>console.warn("of a script"); nothing.there</script>
        <img src="nowhere.png" alt="lost"><p style="width: 500px">broad</p>
        <div class="card" style="width: 50px"><div style="width: 60px">wide</div></div>"""
    )
    visit = browser.visit(path, PHONE)
    assert len(visit.told) == 3
    assert "of a script" in "".join(visit.told)
    assert visit.fetched == [path.as_uri(), (tmp_path / "nowhere.png").as_uri()]
    assert (visit.asked["images"], visit.asked["missing"]) == (1, ["lost"])
    assert visit.asked["width"] > PHONE
    assert visit.asked["sticking_out"] == ["wide"]
    assert visit.asked["scripts"] == 1

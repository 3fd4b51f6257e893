"""The report: one file that asks for nothing, shows what happened, and escapes what it is told."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("jinja2", reason="the extra idml_fast[train] is not installed")

from idml_fast import Metric
from idml_fast.evaluation import (
    CORRUPTIONS,
    Estimate,
    UncertaintyTable,
    aurc,
    pictures,
    uncertainty_table,
    wrong_answers,
)
from idml_fast.train.config import Config
from idml_fast.train.data import load_data
from idml_fast.train.outcome import Outcome
from idml_fast.train.report import (
    CANDIDATES,
    MEASURES,
    ROWS,
    _reliability,
    _risks,
    table,
    text_table,
    uncertainty_text,
    write_report,
)

VOID = {"meta", "link", "img", "br", "hr"}
NAMES = [name for rows in ROWS.values() for _, name, _ in rows if name != "top_1"]
# What a metric has whose uncertainty nobody reads.
ALWAYS = [*NAMES[: NAMES.index("map") + 1], "ece_distance", "brier_distance"]


class Page(HTMLParser):
    """The page's elements, and whether every one that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for found, attributes in self.elements if found == tag]


def known(alive: bool) -> UncertaintyTable:
    """A made-up table; of some candidate a number is undefined."""
    nan = float("nan")
    rows = {
        name: {measure: Estimate(0.25, 0.125, 0.5) for measure in MEASURES}
        for name in CANDIDATES
        if alive or name != "unc_norm"
    }
    rows["mc_dropout"]["error_auroc"] = Estimate(nan, nan, nan)
    distance = {name: Estimate(0.0625, 0.0, 0.125) for name in ("ece", "brier")}
    return UncertaintyTable(Estimate(0.9, 0.875, 0.925), distance, rows, 0)


def outcome(metric: Metric, seed: int, labels: torch.Tensor) -> Outcome:
    """A made-up outcome."""
    images = len(labels)
    draw = torch.Generator().manual_seed(seed)
    sem = torch.nn.functional.normalize(torch.randn(images, 8, generator=draw), dim=1)
    unc = torch.randn(images, 4, generator=draw)
    alive = metric.reads_unc
    norms = {name: torch.rand(6, images, generator=draw) for name in CORRUPTIONS if alive}
    results = {name: 0.25 if alive or name in ALWAYS else None for name in NAMES}
    epochs = [{"epoch": n, "loss": 3.0 / n, "recall_at_1": 0.8 + n / 100} for n in (1, 2, 3)]
    uncertainties = {name: torch.rand(images, generator=draw) for name in CANDIDATES}
    uncertainties["unc_norm"] = unc.norm(dim=1)
    if not alive:
        del uncertainties["unc_norm"]
    wrong, _ = wrong_answers(sem, labels)
    return Outcome(metric, epochs, results, sem, unc, norms, uncertainties, wrong, known(alive))


@pytest.fixture(autouse=True, scope="module")
def small_maps():
    """Maps of a few images: what takes longest is tested with the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAPPED", 50)
        yield


@pytest.fixture(scope="module")
def told():
    """What a report is made of."""
    config = Config(name="a <b>&amp; 'run'")
    data = load_data(config.data)
    outcomes = {
        "conventional": outcome(Metric.plain("cosine"), 0, data.test_labels),
        "introspective": outcome(config.metrics["introspective"], 1, data.test_labels),
    }
    return config, data, outcomes


@pytest.fixture(scope="module")
def text(told, tmp_path_factory):
    """A report."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, *told, seconds=12.3)
    return path.read_text("utf-8")


def test_the_table_has_the_ranks_of_the_data_set():
    found = dict.fromkeys(("recall_at_1", "recall_at_1000", "map_at_r"), 0.5)
    assert table({"one": found}) == {
        "Retrieval": [
            ["Recall@1", "50.0 %"],
            ["Recall@1000", "50.0 %"],
            ["MAP@R", "50.0 %"],
        ]
    }


def test_it_is_well_formed(text):
    page = Page(text)
    assert page.open == []
    assert [tag for tag, _ in page.elements][:2] == ["html", "head"]
    assert page.of("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))


def test_it_asks_for_nothing(text):
    page = Page(text)
    assert not page.of("script")
    assert not page.of("iframe")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "@import" not in text
    assert "url(" not in text


def test_every_image_is_whole_and_described(text):
    images = Page(text).of("img")
    assert all(image["alt"] for image in images)
    for image in images:
        kind, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", image["src"]).groups()
        content = b64decode(content, validate=True)
        if kind == "image/svg+xml":
            svg = ElementTree.fromstring(content)
            for element in svg.iter():
                for name, value in element.attrib.items():
                    own = value.startswith(("#", "data:image/png;base64,"))
                    assert not name.endswith("href") or own
        else:
            assert kind == "image/png"
            assert content.startswith(b"\x89PNG")
    # 16 queries with five neighbours, 20 extremes, five strips of six, and twelve figures.
    assert len(images) == 16 * 6 + 20 + 5 * 6 + 12


def test_it_escapes_what_it_is_told(text):
    assert "<b>" not in text
    assert "a &lt;b&gt;&amp;amp; &#39;run&#39;" in text
    assert "a <b>&amp; 'run'" in Page(text).words


def test_neighbours_are_marked_right_and_wrong(told, text):
    _, data, outcomes = told
    page = "".join(Page(text).words)
    right, wrong = page.count("✓ "), page.count("✗ ")
    assert right + wrong == 16 * 5
    sem = outcomes["introspective"].sem
    distances = torch.cdist(sem, sem).fill_diagonal_(torch.inf)
    missed = data.test_labels[distances.argmin(dim=1)] != data.test_labels
    assert f"Wrong, the most certain first: 8 of {missed.sum()}" in page
    assert wrong >= 8


def test_queries_go_from_the_most_to_the_least_certain(told, text):
    _, data, outcomes = told
    shown = outcomes["introspective"]
    norm, order = shown.unc.norm(dim=1).sort()
    wrong = order[shown.wrong[order]]
    sorted_so = torch.cat([order[:4], order[-4:], wrong[:8]])
    captions = [word for word in Page(text).words if re.fullmatch(r"\d\n\d\.\d\d", word)]
    assert captions == [
        f"{data.test_labels[i]}\n{shown.unc[i].norm():.2f}" for i in sorted_so.tolist()
    ]
    assert norm[0] < norm[-1]


def test_no_mistakes_is_said(told, tmp_path):
    config, data, outcomes = told
    # One direction for every class: whatever is nearest is of the same class.
    sem = torch.nn.functional.one_hot(data.test_labels, 10).float()
    none = torch.zeros_like(outcomes["introspective"].wrong)
    perfect = replace(outcomes["introspective"], sem=sem, wrong=none)
    write_report(tmp_path / "r.html", config, data, {**outcomes, "introspective": perfect}, 1.0)
    page = "".join(Page((tmp_path / "r.html").read_text("utf-8")).words)
    assert page.count("✓ ") == 8 * 5
    assert "✗ " not in page
    assert "Wrong, the most certain first: none" in page


def test_the_area_under_the_risks_is_the_table_s(told, monkeypatch):
    shown, drawn = told[2]["introspective"], {}
    monkeypatch.setattr(pictures, "risk_coverage", lambda coverage, risks: drawn.update(risks))
    _risks(shown)
    assert list(drawn) == list(CANDIDATES.values())
    for name, title in CANDIDATES.items():
        area = aurc(shown.uncertainties[name], shown.wrong)
        assert drawn[title].mean().item() == pytest.approx(area.item())


def test_the_reliability_is_that_of_the_table_s_forecasts(told, monkeypatch):
    _, data, outcomes = told
    shown, drawn = outcomes["introspective"], {}
    monkeypatch.setattr(pictures, "reliability", drawn.update)
    _reliability(shown, data, seed=3)
    judged = uncertainty_table(
        {"unc_norm": shown.unc}, shown.sem, data.test_labels, resamples=1, seed=3
    )
    errors = {
        name: ((told - came).abs() * count).nansum() / count.sum()
        for name, (told, came, count) in drawn.items()
    }
    assert errors == {
        "by D and β": pytest.approx(judged.rows["unc_norm"]["ece"].value),
        "by D alone": pytest.approx(judged.distance["ece"].value),
    }
    assert errors["by D and β"] != errors["by D alone"]


def test_the_least_certain_are_the_longest(told, text):
    norm = told[2]["introspective"].unc.norm(dim=1).sort().values
    words = "".join(Page(text).words)
    least = words[words.index("Least certain images") :]
    certain = words[words.index("Most certain images") : words.index("Least certain images")]
    assert re.findall(r"\d\.\d\d", certain) == [f"{x:.2f}" for x in norm[:10]]
    assert re.findall(r"\d\.\d\d", least)[:10] == [f"{x:.2f}" for x in norm[-10:].flip(0)]


def test_the_same_run_gives_the_same_report(told, text, tmp_path):
    write_report(tmp_path / "again.html", *told, seconds=12.3)
    assert (tmp_path / "again.html").read_text("utf-8") == text


def test_colour_images(told, tmp_path):
    config, data, outcomes = told
    images, labels = data.test.tensors
    colour = replace(data, test=TensorDataset(images.expand(-1, 3, -1, -1), labels))
    write_report(tmp_path / "colour.html", config, colour, outcomes, seconds=1.0)
    assert Page((tmp_path / "colour.html").read_text("utf-8")).open == []


def test_the_released_form_is_drawn(told, tmp_path):
    config, data, outcomes = told
    config = replace(config, metric=Metric.official())
    ours = replace(outcomes["introspective"], metric=Metric.official())
    write_report(tmp_path / "r.html", config, data, {**outcomes, "introspective": ours}, 1.0)
    assert Page((tmp_path / "r.html").read_text("utf-8")).open == []


def test_the_metric_that_is_drawn_is_the_library_s():
    import idml_fast
    from idml_fast.train.report import _adaptive_gradient, _distance

    metric = Metric(tau=1.0, gamma=1.0)
    alpha, beta = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])
    # On a line: items alpha apart, with uncertainties that add up to beta.
    for a, b, drawn in zip(alpha, beta, _distance(metric, alpha, beta), strict=True):
        sem, unc = torch.stack([a * 0, a])[:, None], torch.stack([b / 2, b / 2])[:, None]
        assert drawn == pytest.approx(idml_fast.pairwise(sem, unc, metric=metric)[0, 1].item())
    # The two values that the paper's figure gives.
    assert _adaptive_gradient(metric, alpha[:1], beta[:1]).item() == pytest.approx(0.7358, abs=1e-4)
    metric = Metric(tau=1.0, gamma=0.0)
    assert _adaptive_gradient(metric, alpha[1:], beta[1:]).item() == pytest.approx(0.4060, abs=1e-4)


def test_the_table_has_dashes_where_there_is_no_uncertainty():
    results = {
        "conventional": dict.fromkeys(NAMES) | dict.fromkeys(ALWAYS, 0.5),
        "introspective": dict.fromkeys(NAMES, 0.5) | {"spearman_blur": float("nan")},
    }
    sections = table(results)
    rows = {title: cells for section in sections.values() for title, *cells in section}
    assert len(rows) == len(NAMES)
    dashes = [title for title, (cell, _) in rows.items() if cell == "–"]
    assert len(dashes) == len(NAMES) - len(ALWAYS)
    assert rows["Recall@1"] == ["50.0 %", "50.0 %"]
    assert rows["Alive"] == ["–", "yes"]
    assert rows["R-AUROC"] == ["–", "0.50"]
    assert rows["ECE by D alone"] == ["0.500", "0.500"]
    assert rows["Spearman with blur"] == ["–", "undefined"]
    assert rows["Spearman with contrast"] == ["–", "+0.50"]


def test_a_dead_uncertainty_is_said():
    results = {"introspective": dict.fromkeys(NAMES, 0.0)}
    assert ["Alive", "no"] in table(results)["Uncertainty"]


def test_the_table_of_a_classification():
    names = ["top_1", *NAMES[7:]]
    results = {metric: dict.fromkeys(names, 0.5) for metric in ("conventional", "introspective")}
    sections = table(results)
    assert list(sections) == ["Classification", "Uncertainty"]
    assert sections["Classification"] == [["Top-1", "50.0 %", "50.0 %"]]


def test_the_terminal_s_table_lines_up():
    results = {
        "conventional": dict.fromkeys(NAMES) | dict.fromkeys(ALWAYS, 0.5),
        "introspective": dict.fromkeys(NAMES, 1.0),
    }
    lines = text_table(results).splitlines()
    assert lines[0].split() == ["Retrieval", "conventional", "introspective"]
    rows = [line for line in lines[1:] if line and "─" not in line and line != "Uncertainty"]
    assert len(rows) == len(NAMES)
    assert len({len(line) for line in rows}) == 1
    for title in ("Recall@1", "Recall@8", "NMI", "R-precision", "MAP@R", "Spearman with noise"):
        assert any(line.startswith(title) for line in rows)


def test_candidates_are_compared_in_the_terminal_beside_the_recall(told):
    text = uncertainty_text(told[2])
    first, _, conventional, head, *rows = text.splitlines()
    assert "less is better: AURC, ECE, Brier" in first
    assert conventional == "conventional, Recall@1 90.0 % (87.5 % to 92.5 %)"
    assert head.split() == [title for title, _, _ in MEASURES.values()]
    end = rows.index("")
    assert [row.split("  ")[0] for row in rows[:end]] == [
        *list(CANDIDATES.values())[1:],
        "distance alone",
    ]
    assert {len(row) for row in rows[:end]} == {len(head)}
    numbers = "0.25 0.250 0.25 0.250 0.250 +0.25 +0.25 +0.25 +0.25 +0.25 0.25"
    assert rows[0].split() == ["−‖s‖", *numbers.split()]
    assert "undefined" in rows[3]
    assert rows[4].split()[2:] == ["–", "–", "–", "0.062", "0.062", "–", "–", "–", "–", "–", "–"]
    assert rows[end + 1].startswith("introspective, Recall@1")
    assert rows[end + 3].startswith("‖u‖ ")
    assert max(map(len, text.splitlines())) < 120


def test_candidates_are_compared_in_the_report_with_intervals(text):
    words = Page(text).words
    for title in CANDIDATES.values():
        assert words.count(title) == (1 if title == "‖u‖" else 2)
    assert words.count("distance alone") == 2
    assert words.count("+0.12 to +0.50") == 9 * 5  # four candidates and five, five corruptions
    assert words.count("0.000 to 0.125") == 2 * 2
    assert "introspective, Recall@1 90.0 % (87.5 % to 92.5 %)" in words
    assert words.count("undefined") == 2
    for title in ("R-AUROC ↑", "AURC ↓", "Spearman with contrast ↑"):
        assert words.count(title) == 2
    assert "undefined to" not in text

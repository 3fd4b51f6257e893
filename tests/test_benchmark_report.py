"""What is written of recorded runs: the README's section, the page, the same as Markdown."""

from __future__ import annotations

import shutil

import pytest
from conftest import ROOT
from test_benchmarks import RESULTS, made_up_run

pytest.importorskip("jinja2", reason="the extra idml_fast[train] is not installed")

from idml_fast.benchmarks.newest import Measured, duration, newest, of_machines, per_second
from idml_fast.benchmarks.records import RecordError, of, read_folder, write
from idml_fast.benchmarks.report import page, report
from idml_fast.benchmarks.speed import BEGIN, END, section, with_section

STALE = "not what the records say: run `idml-fast bench report --readme README.md`"


def test_the_readme_and_the_document_are_what_the_records_say():
    runs = read_folder(RESULTS)
    readme = (ROOT / "README.md").read_text("utf-8")
    made = section(RESULTS.parent / "speed.md.j2", runs, "bench/results")
    assert with_section(readme, made) == readme, f"README.md is {STALE}"
    path = ROOT / "docs" / "benchmarks.md"
    assert page(path, runs, RESULTS) == path.read_text("utf-8"), f"docs/benchmarks.md is {STALE}"


def test_a_second_report_writes_the_same(tmp_path):
    bench = shutil.copytree(ROOT / "bench", tmp_path / "bench")
    readme = shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    written = report(bench / "results", tmp_path / "docs", readme)
    first = [path.read_bytes() for path in written]
    assert [path.name for path in written] == ["benchmarks.html", "benchmarks.md", "README.md"]
    assert report(bench / "results", tmp_path / "docs", readme) == written
    assert [path.read_bytes() for path in written] == first
    assert first[2] == (ROOT / "README.md").read_bytes()


@pytest.fixture
def bench(tmp_path):
    """A folder with two runs, the second one of one case alone."""
    steady = {"ours": [1.0, 2.0, 9.0], "ours again": [1.0, 2.0, 9.0], "peer": [2.0, 5.0, 9.0]}
    bf16 = {"ours": [0.25], "eager": []}
    cases = {"a case": steady, "bf16 case": bf16}
    write(made_up_run(cases, commit="first", rates={}, notes=["Old."]), tmp_path / "results")
    faster = {"ours": [0.5], "peer": [2.0]}
    write(made_up_run({"a case": faster}, commit="second", notes=["Busy."]), tmp_path / "results")
    return tmp_path


def of_template(bench, text):
    (bench / "speed.md.j2").write_text('{% set cpu = recorded(device="A (CPU)") %}' + text)
    return section(bench / "speed.md.j2", read_folder(bench / "results"), "there")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ('{{ cpu.case("a case").of("ours").time }}', "500 ms"),
        ('{{ cpu.case("a case").of("peer").ratio }}', "0.25"),
        ('{{ cpu.case("a case").of("peer").memory }}', "1 MiB"),
        ('{{ cpu.case("a case").record.commit }}', "second"),
        ('{{ cpu.case("bf16 case").record.commit }}', "first"),
        ('{{ cpu.case("a case").ratios.peer }}', "0.25"),
        ('{{ cpu.case("a case").memory_ratios.peer }}', "1.0"),
        ('{% set x = cpu.case("a case") %}{{ cpu.torch }}', "2.13.0"),
        ("{{ results }} {{ [3, 1, 2] | median }}", "there 2"),
        (
            '{% set rows = {"b": cpu.case("bf16 case"), "a": cpu.case("a case")} %}'
            "{% for run, names in rows | by_record %}{{ run.commit }} {{ names }} {% endfor %}",
            "first ['b'] second ['a'] ",
        ),
    ],
)
def test_what_a_template_can_ask(bench, asked, told):
    assert of_template(bench, asked) == told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ('{{ cpu.case("no case") }}', "no record of device A .CPU. has the case 'no case'"),
        ('{{ cpu.case("a case").of("faiss") }}', "second.json has no time of faiss in 'a case'"),
        ('{{ cpu.case("bf16 case").of("eager") }}', "has no time of eager in 'bf16 case'"),
        ('{{ recorded(device="B") }}', "there is no record of device B"),
    ],
)
def test_what_no_record_has_is_an_error_that_names_it(bench, asked, told):
    with pytest.raises(RecordError, match=told):
        of_template(bench, asked)


def test_no_number_comes_from_another_kind_of_device(bench):
    faster = {"ours": [1e-3], "peer": [1e-3]}
    write(made_up_run({"a case": faster}, device="B", date="2027-01-01"), bench / "results")
    assert of_template(bench, '{{ cpu.case("a case").of("ours").time }}') == "500 ms"


def test_the_section_goes_between_its_markers_and_nowhere_else():
    before = f"# Title\n{BEGIN}\nold\n{END}\n\nThe rest.\n"
    after = f"# Title\n{BEGIN}\nnew\n{END}\n\nThe rest.\n"
    assert with_section(before, "new\n") == after
    assert with_section(after, "new\n") == after


@pytest.mark.parametrize(
    "readme", ["", BEGIN, END, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END * 2]
)
def test_a_readme_without_its_markers_is_an_error(readme):
    with pytest.raises(RecordError, match="must have <!-- benchmarks: begin -->"):
        with_section(readme, "new")


def test_a_failed_report_writes_nothing(bench):
    (bench / "README.md").write_text("no markers")
    (bench / "speed.md.j2").write_text("")
    with pytest.raises(RecordError, match="must have"):
        report(bench / "results", bench / "docs", bench / "README.md")
    assert not (bench / "docs").exists()
    (bench / "speed.md.j2").unlink()
    with pytest.raises(RecordError, match=r"speed\.md\.j2 is not there"):
        report(bench / "results", bench / "docs", bench / "README.md")
    with pytest.raises(RecordError, match=r"--output must be a folder or end with \.html or \.md"):
        report(bench / "results", bench / "page.pdf")
    (bench / "none").mkdir()
    with pytest.raises(RecordError, match="none holds no record"):
        report(bench / "none", bench / "docs")


@pytest.mark.parametrize("name", ["page.html", "page.md"])
def test_one_page_alone(bench, name):
    assert report(bench / "results", bench / "docs" / name) == [bench / "docs" / name]
    assert [path.name for path in (bench / "docs").iterdir()] == [name]


def test_the_document_has_the_newest_number_of_every_case(bench):
    text = page(bench / "docs" / "page.md", read_folder(bench / "results"), bench / "results")
    lines = text.splitlines()
    link = "../results/2026-11-22-a-cpu-{}.json"
    second, first = (f"[{commit}]({link.format(commit)})" for commit in ("second", "first"))
    assert "## A (CPU), 2 threads, AVX512" in lines
    assert "\n".join(["", f"Of the run of {second}:", "", "- Busy.", ""]) in text
    assert "\n".join(["", f"Of the run of {first}:", "", "- Old.", ""]) in text
    table = lines[lines.index("### pairwise") + 2 :]
    assert [line.strip() for line in table] == [
        "| | | median | rate | share | extra memory | ours / it | error |",
        "|---|---|---|---|---|---|---|---|",
        f"| a case, {second} | ours | 500 ms | 4.00 GFLOP/s | 100 % | 1 MiB |  | 1.0e-07 |",
        "| | peer | 2.00 s | 1.00 GFLOP/s | 25 % | 1 MiB | 0.25 |  |",
        f"| bf16 case, {first} | ours | 250 ms | 8.00 GFLOP/s |  | 1 MiB |  | 1.0e-07 |",
        "| | eager | no room |  |  | 1 MiB |  |  |",
    ]


@pytest.mark.parametrize(
    ("keys", "who", "rate", "share"),
    [
        ({}, "ours", "4.00 GFLOP/s", "100 %"),
        ({"dtype": "bf16"}, "ours", "4.00 GFLOP/s", "50 %"),
        ({"case": "in bf16"}, "ours", "4.00 GFLOP/s", "50 %"),  # a record without dtype
        ({"dtype": "fp16"}, "ours", "4.00 GFLOP/s", ""),
        ({"product_flop": 1e9}, "product", "1.00 GFLOP/s", "25 %"),
        ({"product_flop": None}, "product", "2.00 GFLOP/s", "50 %"),
        ({"bytes": 1e9}, "ours", "2.00 GB/s", "20 %"),
        ({"flop": 0}, "ours", "", ""),
    ],
)
def test_a_rate_and_its_share_of_what_the_machine_reached(keys, who, rate, share):
    found = made_up_run({"a case": {"ours": [0.5], "product": [1.0]}})
    found["cases"][0] |= keys
    record = of(found)
    (case,) = record.cases.values()
    told = Measured(record, case).of(who)
    assert (told.rate, told.share) == (rate, share)


def test_what_nearest_finds_is_told_where_it_was_compared(bench):
    found = made_up_run({"nearest": {"ours": [0.5]}}, commit="third")
    found["cases"][0] |= {"agreement": {"ours": 0.9999}, "errors": {}}
    write(found, bench / "nearest")
    text = page(bench / "page.md", read_folder(bench / "nearest"), bench / "nearest")
    assert "| | | median | rate | share | extra memory | found alike |" in text
    assert "| ours | 500 ms | 4.00 GFLOP/s | 100 % | 1 MiB | 99.99 % |" in text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (1e-5, "0.01 ms"), (0.00999, "9.99 ms"), (0.009996, "10.0 ms"), (0.0999, "99.9 ms"),
        (0.09996, "100 ms"), (0.9999, "1000 ms"), (1, "1.00 s"), (16.21, "16.2 s"), (1e3, "1000 s"),
    ],
)  # fmt: skip
def test_times_have_three_digits(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("rate", "what", "told"),
    [(1.5e9, "FLOP", "1.50 GFLOP/s"), (1.5e14, "FLOP", "150 TFLOP/s"), (4.3e12, "B", "4300 GB/s")],
)
def test_rates_have_three_digits_too(rate, what, told):
    assert per_second(rate, what) == told


def test_the_newest_run_comes_first():
    runs = [
        of(made_up_run({"old": {"ours": [1.0]}, "both": {"ours": [1.0]}}, commit="a")),
        of(made_up_run({"new": {"ours": [1.0]}, "both": {"ours": [2.0]}}, commit="b")),
        of(made_up_run(device="B", date="2026-11-23")),
    ]
    found = newest(runs[:2])
    assert [(title, x.record.commit) for title, x in found.items()] == [
        ("new", "b"), ("both", "b"), ("old", "a"),
    ]  # fmt: skip
    assert [[run.commit for run in machine] for machine in of_machines(runs)] == [
        ["0123abc"],
        ["a", "b"],
    ]

"""The study: does the uncertainty help where the training data is damaged?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control, ttest_rel

from .._files import write_text
from ..evaluation import CORRUPTIONS
from ..metric import Metric
from .paper import merged
from .processes import is_main
from .reproduce import load_recipe
from .runs import Results, over, results_of, seeded, written

PREFIX = "study_"  # of a recipe's file
# Who takes part: the settings, and which metric of the configuration is trained.
CONTESTANTS = {
    "conventional": ({}, "conventional"),
    "introspective": ({}, "introspective"),
    "released": ({"metric": asdict(Metric.official())}, "introspective"),
}
RIVALS = ("conventional", "released")  # of the introspective metric
# What is compared: numbers of a run's results. What no run has gets no table.
MEASURES = {
    "recall_at_1": "Recall@1",
    "map_at_r": "MAP@R",
    "nmi": "NMI",
    "error_auroc": "R-AUROC: does ‖u‖ rank wrong answers above right ones (0.5: no)",
    "error_auroc_sem_norm": "R-AUROC of the baseline −‖s‖, before s is normalised",
    "error_auroc_mc_dropout": "R-AUROC of the baseline MC-dropout",
    "aurc": "AURC: area under the risk-coverage curve by ‖u‖ (less is better)",
    "pair_auroc": "AUROC of β for wrong decisions about pairs",
    "ood_auroc": "AUROC of ‖u‖ for out-of-distribution images",
    "ece": "ECE of P(match | D, β) (less is better)",
    **{
        f"spearman_{kind}": f"Spearman's ρ of ‖u‖ with the severity of {kind}"
        for kind in CORRUPTIONS
    },
}
# What is told but not compared: neither more nor less of it is better.
DESCRIBED = {
    "unc_norm_mean": "Mean of ‖u‖",
    "unc_norm_std": "Standard deviation of ‖u‖",
    "unc_grad_norm": "Norm of the gradient at the uncertainty head, mean over the steps",
}
NUMBERS = MEASURES | DESCRIBED
ROUNDING = 1e-12  # differences that vary by less are the same


@dataclass(frozen=True)
class Difference:
    """What a number has more with the introspective metric than with a rival, seed by seed.

    Args:
        mean: of the differences.
        half: half the width of their 95 % interval, by Student's t.
        p: of the paired t test, two-sided.
        corrected: p, corrected for the number of comparisons in the study.
    """

    mean: float
    half: float
    p: float
    corrected: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class Study:
    """All numbers of all runs, and how they are written.

    Args:
        dataset: whose study it is.
        seeds: of the runs.
        results: by condition and contestant, one mapping of numbers for each seed, in their order.
    """

    dataset: str
    seeds: tuple[int, ...]
    results: dict[tuple[str, str], list[Results]]

    @property
    def conditions(self) -> list[str]:
        """What was done to the training data."""
        return list(dict.fromkeys(condition for condition, _ in self.results))

    @property
    def numbers(self) -> list[str]:
        """Those of `NUMBERS` that some run has."""
        runs = [result for results in self.results.values() for result in results]
        return [name for name in NUMBERS if any(run.get(name) is not None for run in runs)]

    def values(self, name: str, condition: str, contestant: str) -> np.ndarray:  # [seeds]
        """A number of every seed; NaN where there is none."""
        found = [result.get(name) for result in self.results[condition, contestant]]
        return np.array([np.nan if value is None else value for value in found], dtype=float)

    def mean(self, name: str, condition: str, contestant: str) -> tuple[float, float]:
        """Mean and standard deviation (of a sample) over the seeds."""
        values = self.values(name, condition, contestant)
        return values.mean(), values.std(ddof=1) if len(values) > 1 else np.nan

    @cached_property
    def differences(self) -> dict[tuple[str, str, str], Difference]:
        """By number, condition and rival, each `Difference` that the seeds can judge: none of their
        values is missing, and they do not all differ by the same.

        The correction is that of Benjamini and Hochberg: among the comparisons whose corrected p is
        below 0.05, a share of at most 5 % is there by chance, on average.
        """
        tests = {}
        for name, condition, rival in product(MEASURES, self.conditions, RIVALS):
            ours = self.values(name, condition, "introspective")
            theirs = self.values(name, condition, rival)
            if np.isfinite(ours - theirs).all() and np.ptp(ours - theirs) > ROUNDING:
                tests[name, condition, rival] = ttest_rel(ours, theirs)
        if not tests:
            return {}
        corrected = false_discovery_control([test.pvalue for test in tests.values()], method="bh")
        found = {}
        for (key, test), p in zip(tests.items(), corrected, strict=True):
            low, high = test.confidence_interval(0.95)
            found[key] = Difference((low + high) / 2, (high - low) / 2, test.pvalue, p)
        return found

    def verdicts(self) -> list[str]:
        """In words: how many comparisons there are, and which of them stand the correction."""
        if len(self.seeds) < 2:
            return ["One seed cannot tell the metrics apart."]
        count = len(self.differences)
        clear = sum(difference.p < 0.05 for difference in self.differences.values())
        stand = {key: x for key, x in self.differences.items() if x.corrected < 0.05}
        return [
            f"Of {count} comparisons {clear} have an interval that leaves out zero; chance alone "
            f"would give about {0.05 * count:.0f}. {len(stand)} stand the correction for their "
            "number (corrected p < 0.05).",
            *(
                f"{MEASURES[name]}, {shown(condition)}: introspective less {rival} {difference}."
                for (name, condition, rival), difference in stand.items()
            ),
        ]

    def table(self, name: str) -> list[list[str]]:
        """The head and the rows of a number's table, as text."""
        rivals = [x for x in RIVALS if any(key[::2] == (name, x) for key in self.differences)]
        head = ["training data", *CONTESTANTS]
        table = [head + [x for rival in rivals for x in (f"less {rival}", "p (corrected)")]]
        for condition in self.conditions:
            cells = [spread(*self.mean(name, condition, contestant)) for contestant in CONTESTANTS]
            for rival in rivals:
                x = self.differences.get((name, condition, rival))
                cells += [str(x), f"{x.p:.2g} ({x.corrected:.2g})"] if x else ["", ""]
            table.append([shown(condition), *cells])
        return table

    def to_markdown(self) -> str:
        """A table for each number, and the verdicts."""
        parts = [self.note]
        for name in self.numbers:
            head, *body = self.table(name)
            rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
            parts += [
                f"### {NUMBERS[name]}",
                "\n".join(f"| {' | '.join(cells)} |" for cells in rows),
            ]
        return "\n\n".join([*parts, "### All comparisons", *self.verdicts()])

    @property
    def note(self) -> str:
        """What the numbers of the tables are."""
        return (
            f"Numbers are {over(self.seeds)}; beside a kind of damage stands its share of the "
            "training images in percent. *less*: the introspective metric less another, seed by "
            "seed, ± half of the 95 % interval; p of the paired t test, in brackets corrected for "
            "the number of all comparisons (Benjamini-Hochberg)."
        )

    def to_csv(self) -> str:
        """A line for each number, condition and contestant, with mean, standard deviation and what
        the introspective metric has more than it: difference, half of its 95 % interval, p."""
        head = ["dataset", "number", "condition", "contestant", "seeds", "mean", "std"]
        lines = [[*head, "difference", "interval", "p", "p_corrected"]]
        for name in self.numbers:
            for condition, contestant in self.results:
                about = [self.dataset, name, condition, contestant, len(self.seeds)]
                difference = self.differences.get((name, condition, contestant))
                more = astuple(difference) if difference else [np.nan] * 4
                cells = *self.mean(name, condition, contestant), *more
                lines.append([*about, *("" if np.isnan(x) else float(x) for x in cells)])
        return written(lines)

    def runs_to_csv(self) -> str:
        """Every number of every run: a line for each condition, contestant and seed."""
        names = self.numbers
        lines = [["dataset", "condition", "contestant", "seed", *names]]
        for key, results in self.results.items():
            for seed, result in zip(self.seeds, results, strict=True):
                lines.append([self.dataset, *key, seed, *(result.get(name) for name in names)])
        return written(lines)


def study(
    dataset: str = "digits",
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: int | None = None,
    folder: str | Path = "runs/study",
) -> Study:
    """Train every contestant on training data that is damaged in several ways, and compare them.

    A run is written as soon as it is done, to ``<folder>/<condition>/<contestant>-<seed>.json``; a
    second call goes on where the first one stopped. At the end there are the tables, ``study.md``
    and ``study.csv``, and ``study_runs.csv`` with every run.

    Args:
        dataset: which study: a recipe ``study_<dataset>.yaml``.
        seeds: of the weights, the order of the images and the damage.
        epochs: of every run; None: as the recipe says.
        folder: where it is written.

    Raises:
        SettingsError: an argument does not fit; the message says which, and what would.
        FileExistsError: the folder holds a run of another configuration.
        Interrupted: SIGTERM or SIGINT has come.
        RunError: a checkpoint is damaged, or of another run.
    """
    folder = Path(folder)
    recipe = load_recipe(dataset, PREFIX)
    runs = {}
    for condition, damage in recipe["conditions"].items():
        for contestant, (settings, metric) in CONTESTANTS.items():
            values = merged(merged(recipe["common"], damage), settings | {"name": condition})
            for seed, config in seeded(values, seeds, epochs, folder).items():
                runs[condition, contestant, seed] = config, metric
    found = results_of(runs, folder)
    results: dict[tuple[str, str], list[Results]] = {}
    for (condition, contestant, _), result in found.items():
        results.setdefault((condition, contestant), []).append(result)
    outcome = Study(dataset, tuple(seeds), results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("idml_fast", "torch"))
    text = f"{outcome.to_markdown()}\n\n{versions}\n"
    if is_main():
        write_text(folder / "study.md", text)
        write_text(folder / "study.csv", outcome.to_csv())
        write_text(folder / "study_runs.csv", outcome.runs_to_csv())
        print(f"\n{text}\n{folder / 'study.md'}")
    return outcome


def shown(condition: str) -> str:
    """A condition's name in words."""
    return condition.replace("_", " ")


def spread(middle: float, deviation: float) -> str:
    """A mean and its standard deviation; nothing where there is none."""
    if np.isnan(middle):
        return ""
    return f"{middle:.3f}" if np.isnan(deviation) else f"{middle:.3f} ± {deviation:.3f}"

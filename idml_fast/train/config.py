"""What a training run is told: dataclasses, recipes in YAML, overrides on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from ..metric import Metric

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class DataConfig:
    """The images, and which classes are seen in training.

    Args:
        name: the data set; ``digits`` is scikit-learn's 1797 handwritten digits of 8 x 8 pixels.
        train_classes: classes to train on.
        test_classes: unseen classes to retrieve among; none of them in ``train_classes``.
        batch_size: images a step, in every process.
    """

    name: Literal["digits"] = "digits"
    train_classes: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    test_classes: list[int] = field(default_factory=lambda: [5, 6, 7, 8, 9])
    batch_size: int = 120


@dataclass
class ModelConfig:
    """A small ConvNet with two heads.

    Args:
        width: channels of the first convolution; the last has twice as many.
        sem_dim: width of the semantic embedding.
        unc_dim: width of the uncertainty embedding.
    """

    width: int = 32
    sem_dim: int = 512
    unc_dim: int = 64


@dataclass
class LossConfig:
    """Proxy-Anchor.

    Args:
        alpha: scale of the similarities.
        margin: margin of the similarities.
        proxy_unc: the proxies' uncertainty: fixed at zero, or learned like the proxies.
    """

    alpha: float = 32.0
    margin: float = 0.1
    proxy_unc: Literal["zero", "learned"] = "zero"


@dataclass
class OptimConfig:
    """AdamW with a learning rate that falls in steps.

    Args:
        epochs: passes over the training images.
        warmup_epochs: first epochs in which only the heads and the proxies learn; for a trunk that
            comes pre-trained.
        lr: learning rate of the network.
        proxy_lr: learning rate of the proxies, as a multiple of ``lr``.
        weight_decay: of AdamW.
        clip: gradient values are clipped to [-clip, clip].
        step: the learning rates are multiplied by ``decay`` every so many epochs.
        decay: see ``step``.
    """

    epochs: int = 15
    warmup_epochs: int = 0
    lr: float = 5e-4
    proxy_lr: float = 100.0
    weight_decay: float = 1e-4
    clip: float = 10.0
    step: int = 5
    decay: float = 0.5


@dataclass
class RunConfig:
    """Where and how to run.

    Args:
        folder: the run is written to ``<folder>/<name>``.
        overwrite: replace a run of another configuration that is already there.
        seed: of the weights, the order of the images and k-means; the same for both metrics.
        mixed_precision: precision of the network; the loss is always computed in float32.
        cpu: stay on the CPU where there is a GPU; it is said and done without asking as long as no
            kernel of idml_fast serves that GPU.
        threads: of PyTorch on the CPU; the digits are too small to share out, and threads that wait
            for each other are slow on a busy machine. null leaves PyTorch its choice.
    """

    folder: str = "runs"
    overwrite: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False
    threads: int | None = 1


@dataclass
class Config:
    """One run of the trainer. The defaults are the recipe ``digits``.

    Args:
        name: of the run.
        data: the images.
        model: the network.
        loss: the loss.
        metric: the introspective metric; the conventional one is trained beside it.
        optim: the optimiser.
        run: where and how to run.

    Raises:
        ValueError: a value is out of its range.
    """

    name: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    metric: Metric = field(default_factory=lambda: Metric.paper("cosine"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be the name of one folder, got {self.name!r}")
        if self.metric.form == "distance":
            raise ValueError("metric.form must be 'cosine' or 'official', got 'distance'")
        if not self.metric.reads_unc:
            raise ValueError("metric.tau must be finite, got inf (the conventional metric)")
        for name in ("train_classes", "test_classes"):
            classes = getattr(self.data, name)
            if len(set(classes)) < 2 or not set(classes) <= set(range(10)):
                raise ValueError(f"data.{name} must be two or more of 0 to 9, got {classes}")
        seen = sorted(set(self.data.train_classes) & set(self.data.test_classes))
        if seen:
            raise ValueError(f"data.test_classes must be unseen, got {seen} from train_classes")
        positive = {
            "data.batch_size": self.data.batch_size,
            "model.width": self.model.width,
            "model.sem_dim": self.model.sem_dim,
            "model.unc_dim": self.model.unc_dim,
            "optim.epochs": self.optim.epochs,
            "optim.lr": self.optim.lr,
            "optim.clip": self.optim.clip,
            "optim.step": self.optim.step,
            "run.threads": 1 if self.run.threads is None else self.run.threads,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.run.folder) / self.name

    def to_yaml(self) -> str:
        """The configuration as YAML; ``--config`` takes it back.

        ``run.overwrite`` is left out: it is a permission for one command, not a part of the run.
        """
        values = asdict(self)
        del values["run"]["overwrite"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(arguments: Sequence[str] = (), prog: str = "idml-fast train") -> Config:
    """The configuration for command-line arguments, later ones overriding earlier ones.

    Exits with usage help, as argparse does, for ``--help`` and for arguments that do not fit.

    Args:
        arguments: such as ``["--config", "digits", "--optim.lr", "1e-3"]``; ``--config`` takes a
            YAML file or the name of a packaged recipe.
        prog: the command to name in the help.
    """
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config RECIPE] [--name NAME] [--GROUP.OPTION VALUE ...]",
        allow_abbrev=False,
        description="Train the conventional and the introspective metric with the same seed, "
        "compare them on unseen classes, and write a report.",
    )
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument(
        "--config",
        action=_RecipeOrFile,
        metavar="RECIPE",
        help=f"a YAML file, or the name of a packaged recipe: {recipes}",
    )
    parser.add_class_arguments(Config)
    parsed = parser.parse_args(list(arguments))
    del parsed.config
    try:
        return Config(**parser.instantiate(parsed).as_dict())
    except (TypeError, ValueError) as error:
        parser.error(str(error))


class _RecipeOrFile(ActionConfigFile):
    """``--config`` that also knows the packaged recipes by name."""

    def __call__(self, parser, cfg, values, option_string=None):
        packaged = {path.stem: str(path) for path in RECIPES.glob("*.yaml")}
        super().__call__(parser, cfg, packaged.get(values, values), option_string)

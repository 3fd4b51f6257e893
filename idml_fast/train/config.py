"""What a training run is told: dataclasses, recipes in YAML, overrides on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from ..metric import Metric
from .criterion import LOSSES, TASKS, Criterion, own_form
from .datasets import DOMAINS, NAMES
from .paper import cells, recipe

RECIPES = Path(__file__).parent / "recipes"
SHORT = {
    "--data-root": "--data.root",
    "--weights": "--model.weights",
    "--tracker": "--run.tracker",
}
OF_DIGITS = "train_classes", "test_classes", "label_noise", "blurred", "mixed"


@dataclass
class DataConfig:
    """The images, and which of them are seen in training.

    Args:
        name: the data set; ``digits`` is scikit-learn's 1797 handwritten digits of 8 x 8 pixels.
            The others are image files: cub, cars, sop, inshop, domainnet, domains or folder, see
            `idml_fast.train.datasets.read`.
        root: the folder of a data set of image files; ``--data-root`` for short.
        source: the domain to learn from, of domainnet and domains.
        target: the domain to test with; null: ``source``.
        resize: the shorter side of a test image, in pixels.
        image_size: side of the square that a network sees: of a test image the centre, of a
            training image a random part, enlarged or reduced to that size, and half of the time its
            mirror image.
        workers: processes that read image files, in training and in the test; 0: the trainer reads
            them itself.
        task: ``retrieval``: some classes are learned, others retrieved; ``classification``, of the
            digits: all ten are learned, and a quarter of the images of each is held out, by the
            seed.
        train_classes: digits to train on; for retrieval.
        test_classes: unseen digits to retrieve among; none of them in ``train_classes``.
        batch_size: images a step, of all processes together.
        per_class: a batch is made of so many images of a class at a time, which losses of pairs
            need where the classes are many. Of a class whose number of images is no multiple of it,
            some are seen twice in an epoch. 0: images are shuffled.
        label_noise: share of the training images whose label is replaced by another class, each of
            the others as likely. Which images are damaged, by this and the two below, is drawn by
            ``run.seed``, for each kind apart; test images and their labels stay as they are. Only
            of the digits, as are the two below.
        blurred: share of the training images that are blurred, as many at each of the five
            severities of the evaluation.
        mixed: share of the training images that are ambiguous: the mean of the image and of one of
            another class, under the label of the first.
    """

    name: str = "digits"
    root: str | None = None
    source: str | None = None
    target: str | None = None
    resize: int = 256
    image_size: int = 224
    workers: int = 4
    task: Literal["retrieval", "classification"] = "retrieval"
    train_classes: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    test_classes: list[int] = field(default_factory=lambda: [5, 6, 7, 8, 9])
    batch_size: int = 120
    per_class: int = 0
    label_noise: float = 0.0
    blurred: float = 0.0
    mixed: float = 0.0


@dataclass
class ModelConfig:
    """A network with two linear heads.

    Args:
        backbone: ``small``, a ConvNet of four layers whose last map is averaged to 2 x 2; or a
            network of timm, such as ``resnet50.tv_in1k`` (``pip install 'idml_fast[vision]'``).
        width: channels of the first convolution of ``small``; its last has twice as many.
        pooling: what the heads are given of timm's feature map: ``avgmax``, the sum of its mean and
            its maximum over all places; ``avg`` or ``max``, one of them; or ``own``, what the
            network itself makes of its features, which serves those without such a map too.
        pretrained: take the weights that timm has for the network, fetched once; false: random.
        weights: a file with weights of the backbone instead, safetensors or PyTorch's;
            ``--weights`` for short.
        freeze_norm: the batch norms of the backbone stay as they are: neither their statistics nor
            their weights learn. Not for random weights.
        sem_dim: width of the semantic embedding.
        unc_dim: width of the uncertainty embedding.
    """

    backbone: str = "small"
    width: int = 32
    pooling: Literal["avgmax", "avg", "max", "own"] = "avgmax"
    pretrained: bool = True
    weights: str | None = None
    freeze_norm: bool = True
    sem_dim: int = 512
    unc_dim: int = 64


@dataclass
class LossConfig:
    """The loss, and whether it remembers earlier batches.

    Args:
        name: proxy_anchor, proxy_nca, multi_similarity, contrastive, triplet_margin, margin,
            fast_ap, npairs, nca, ntxent or supcon for retrieval, softmax for classification. null:
            proxy_anchor or softmax, whichever suits the task.
        options: arguments of the loss in idml_fast.losses, such as ``--loss.options.alpha 2``.
        memory: how many items of earlier batches every batch is compared with as well; 0: none.
        memory_epoch: the first epoch whose items are remembered: before, the network changes too
            fast for them to be worth it.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    memory: int = 0
    memory_epoch: int = 2


@dataclass
class MetricConfig:
    """The introspective metric.

    Args:
        tau: temperature; a larger one weakens the effect of the uncertainty.
        gamma: offset of the uncertainty.
        form: distance, cosine or official, as in idml_fast.Metric; null: the one that the loss was
            defined with.
    """

    tau: float = 5.0
    gamma: float = 0.0
    form: str | None = None


@dataclass
class OptimConfig:
    """AdamW with a learning rate that falls in steps.

    Args:
        epochs: passes over the training images.
        warmup_epochs: first epochs in which only the heads and the proxies learn; for a trunk that
            comes pre-trained.
        lr: learning rate of the network.
        proxy_lr: learning rate of what the loss learns (proxies, a boundary), as a multiple of
            ``lr``.
        weight_decay: of AdamW.
        clip: gradient values are clipped to [-clip, clip].
        accumulation: a batch goes through the network in so many parts, one after the other, and
            once more for their gradients: activations take that part of the memory. The loss stays
            that of the whole batch, which a mean of the losses of its parts would not be.
        step: the learning rates are multiplied by ``decay`` every so many epochs.
        decay: see ``step``.
    """

    epochs: int = 15
    warmup_epochs: int = 0
    lr: float = 5e-4
    proxy_lr: float = 100.0
    weight_decay: float = 1e-4
    clip: float = 10.0
    accumulation: int = 1
    step: int = 5
    decay: float = 0.5


@dataclass
class RunConfig:
    """Where and how to run.

    Args:
        folder: the run is written to ``<folder>/<name>``.
        overwrite: replace a run of another configuration that is already there.
        checkpoint_every: write a checkpoint every so many steps, besides those after every epoch
            and at a signal (SIGTERM, SIGINT); 0: only these. The same command goes on from the
            newest one, and ends as if it had never stopped.
        keep_checkpoints: how many of each metric are kept; none once the run is finished.
        seed: of the weights, the order of the images and k-means; the same for both metrics.
        mixed_precision: precision of the network; the loss is always computed in float32. On
            the CPU there is no fp16.
        compile: ``torch.compile`` the backbone.
        tracker: where the numbers of every epoch go besides ``metrics.jsonl``, with the images
            per second and the share of time spent waiting for them: ``csv``, a table beside it,
            tensorboard, wandb or mlflow; ``--tracker`` for short.
        cpu: stay on the CPU where there is a GPU; it is said and done without asking as long as no
            kernel of idml_fast serves that GPU.
        threads: of PyTorch on the CPU; the digits are too small to share out, and threads that wait
            for each other are slow on a busy machine. null leaves PyTorch its choice: the better
            one for anything larger, since what is learned is judged on the CPU.
    """

    folder: str = "runs"
    overwrite: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    tracker: Literal["csv", "tensorboard", "wandb", "mlflow"] | None = None
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
        mix: whether images are mixed, see `idml_fast.train.mixing`. Classifying, the mixed images
            replace the others; retrieving, as in the paper, they are learned beside them.
        mix_alpha: the shares of the two images come from Beta(mix_alpha, mix_alpha).
        optim: the optimiser.
        run: where and how to run.

    Raises:
        ValueError: a value is out of its range.
    """

    name: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be the name of one folder, got {self.name!r}")
        self._check_data()
        self._check_model()
        for name in ("train_classes", "test_classes"):
            classes = getattr(self.data, name)
            if len(set(classes)) < 2 or not set(classes) <= set(range(10)):
                raise ValueError(f"data.{name} must be two or more of 0 to 9, got {classes}")
        seen = sorted(set(self.data.train_classes) & set(self.data.test_classes))
        if seen:
            raise ValueError(f"data.test_classes must be unseen, got {seen} from train_classes")
        for name in ("label_noise", "blurred", "mixed"):
            share = getattr(self.data, name)
            if not 0 <= share <= 1:
                raise ValueError(f"data.{name} must be in [0, 1], got {share}")
        positive = {
            "data.batch_size": self.data.batch_size,
            "data.image_size": self.data.image_size,
            "model.width": self.model.width,
            "model.sem_dim": self.model.sem_dim,
            "model.unc_dim": self.model.unc_dim,
            "optim.epochs": self.optim.epochs,
            "optim.lr": self.optim.lr,
            "optim.clip": self.optim.clip,
            "optim.accumulation": self.optim.accumulation,
            "optim.step": self.optim.step,
            "loss.memory_epoch": self.loss.memory_epoch,
            "mix_alpha": self.mix_alpha,
            "run.keep_checkpoints": self.run.keep_checkpoints,
            "run.threads": 1 if self.run.threads is None else self.run.threads,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        not_negative = {
            "run.seed": self.run.seed,
            "run.checkpoint_every": self.run.checkpoint_every,
            "data.workers": self.data.workers,
            "data.per_class": self.data.per_class,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self._check_loss()

    def _check_data(self) -> None:
        """What is given suits the data set, which is not looked at yet."""
        data = self.data
        if data.per_class and data.batch_size % data.per_class:
            raise ValueError(
                f"data.batch_size must be a multiple of data.per_class {data.per_class}, "
                f"got {data.batch_size}"
            )
        if data.name != "digits" and data.name not in NAMES:
            names = ", ".join(("digits", *NAMES))
            raise ValueError(f"data.name must be one of {names}, got {data.name}")
        for name in ("source", "target"):
            value = getattr(data, name)
            if data.name not in DOMAINS and value is not None:
                raise ValueError(f"data.{name} must be null for {data.name}, got {value}")
        if data.name == "digits":
            if data.root is not None:
                raise ValueError(f"data.root must be null for digits, got {data.root}")
            return
        if data.root is None:
            raise ValueError(f"data.root must be the folder of {data.name}, got null")
        if data.name in DOMAINS and data.source is None:
            raise ValueError(f"data.source must be a domain of {data.name}, got null")
        if data.task != "retrieval":
            raise ValueError(f"data.task must be retrieval for {data.name}, got {data.task}")
        default = DataConfig()
        for name in OF_DIGITS:
            value = getattr(data, name)
            if value != getattr(default, name):
                raise ValueError(f"data.{name} is only for digits, got {value} for {data.name}")
        if data.resize < data.image_size:
            raise ValueError(
                f"data.resize must be >= data.image_size {data.image_size}, got {data.resize}"
            )

    def _check_model(self) -> None:
        """The backbone suits the images; whether there is one of that name is timm's to say."""
        model = self.model
        if model.backbone != "small" and self.data.name == "digits":
            raise ValueError(f"model.backbone must be small for digits, got {model.backbone}")
        if model.backbone == "small" and model.weights is not None:
            raise ValueError(f"model.weights must be null for small, got {model.weights}")

    def _check_loss(self) -> None:
        """Names the loss, and makes it once with each metric: its own checks come before a run."""
        fitting = TASKS[self.data.task]
        if self.loss.name is None:
            self.loss = replace(self.loss, name=fitting[0])
        if self.loss.name not in LOSSES:
            raise ValueError(f"loss.name must be one of {', '.join(LOSSES)}, got {self.loss.name}")
        if self.loss.name not in fitting:
            wanted = ", ".join(fitting)
            raise ValueError(
                f"loss.name must be {'one of ' * (len(fitting) > 1)}{wanted} "
                f"for data.task {self.data.task}, got {self.loss.name}"
            )
        if self.loss.memory < 0:
            raise ValueError(f"loss.memory must be >= 0, got {self.loss.memory}")
        if self.loss.memory and self.data.task == "classification":
            raise ValueError(
                f"loss.memory must be 0 for data.task classification, got {self.loss.memory}"
            )
        if not self.metric.tau < math.inf:
            raise ValueError(
                f"metric.tau must be finite, got {self.metric.tau} (the conventional metric)"
            )
        # Of image files the number is not yet known: `criterion` checks again.
        num_classes = self.num_classes or self.loss.options.get("num_classes") or 2
        with torch.device("meta"):  # no memory, and no random numbers
            for metric in self.metrics.values():
                self.criterion(metric, num_classes)

    @property
    def metrics(self) -> dict[str, Metric]:
        """The conventional metric and the introspective one, both of the same form."""
        form = self.metric.form or own_form(self.loss.name)
        return {
            "conventional": Metric.plain("cosine" if form == "official" else form),
            "introspective": Metric(self.metric.tau, self.metric.gamma, form),
        }

    @property
    def num_classes(self) -> int | None:
        """How many classes are learned; None: the image files will tell."""
        if self.data.name != "digits":
            return None
        return 10 if self.data.task == "classification" else len(set(self.data.train_classes))

    def criterion(self, metric: Metric, num_classes: int | None = None) -> Criterion:
        """The loss of this run with one of its metrics.

        Args:
            metric: it compares by.
            num_classes: how many classes are learned; None: of the digits, as many as there are.

        Raises:
            SettingsError: ``loss.options`` says another number.
        """
        widths = self.model.sem_dim, self.model.unc_dim
        return Criterion(self.loss, metric, num_classes or self.num_classes, *widths)

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.run.folder) / self.name

    def to_yaml(self) -> str:
        """The configuration as YAML; ``--config`` takes it back.

        ``run.overwrite`` is left out, a permission for one command, and so is how often checkpoints
        are written, how many are kept, and who keeps track: the run is the same whatever they are.
        """
        values = asdict(self)
        for name in ("overwrite", "checkpoint_every", "keep_checkpoints", "tracker"):
            del values["run"][name]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(arguments: Sequence[str] = (), prog: str = "idml-fast train") -> Config:
    """The configuration for command-line arguments, later ones overriding earlier ones.

    Exits with usage help, as argparse does, for ``--help`` and for arguments that do not fit.

    Args:
        arguments: such as ``["--config", "digits", "--optim.lr", "1e-3"]``; ``--config`` takes a
            YAML file or the name of a packaged recipe.
        prog: the command to name in the help.
    """
    parser = _parser(prog)
    parsed = parser.parse_args([_in_full(argument) for argument in arguments])
    try:
        return _config(parser, parsed)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _in_full(argument: str) -> str:
    """An option by its whole name, if it is one that has a short name."""
    name, equals, value = argument.partition("=")
    return SHORT.get(name, name) + equals + value


def config_of(values: dict[str, Any], arguments: Sequence[str] = ()) -> Config:
    """The configuration of nested values, as a YAML file has them; what is left out is default.

    Args:
        arguments: of the command line, such as ``["--optim.lr", "1e-3"]``, which override them.

    Raises:
        argparse.ArgumentError, TypeError, ValueError: a value or an argument does not fit.
    """
    parser = _parser("idml-fast", exit_on_error=False)
    if not arguments:
        return _config(parser, parser.parse_object(values))
    words = ["--config", yaml.safe_dump(values), *map(_in_full, arguments)]
    return _config(parser, parser.parse_args(words))


def _parser(prog: str, **settings: Any) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config RECIPE] [--name NAME] [--GROUP.OPTION VALUE ...]",
        allow_abbrev=False,
        description="Train the conventional and the introspective metric with the same seed, "
        "compare them on images that neither has seen, and write a report.",
        **settings,
    )
    parser.add_argument(
        "--config",
        action=_RecipeOrFile,
        metavar="RECIPE",
        help=f"a YAML file, or the name of a packaged recipe: {', '.join(_recipes())}; a cell of "
        "the paper's table, such as cub_proxy_anchor",
    )
    parser.add_class_arguments(Config)
    return parser


def _config(parser: ArgumentParser, parsed: Namespace) -> Config:
    del parsed.config
    return Config(**parser.instantiate(parsed).as_dict())


def _recipes() -> dict[str, str]:
    """The packaged recipes of single runs, by name; those of comparisons are of another kind."""
    paths = sorted(RECIPES.glob("*.yaml"))
    comparisons = ("reproduce_", "study_")
    return {path.stem: str(path) for path in paths if not path.stem.startswith(comparisons)}


class _RecipeOrFile(ActionConfigFile):
    """``--config`` that also knows the packaged recipes, and the paper's cells, by name."""

    def __call__(self, parser, cfg, values, option_string=None):
        if values in cells():
            values = yaml.safe_dump(recipe(values))
        super().__call__(parser, cfg, _recipes().get(values, values), option_string)

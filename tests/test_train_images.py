"""The trainer on image files: data sets on disk, networks of timm, galleries, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")
pytest.importorskip("timm", reason="the extra idml_fast[vision] is not installed")

import timm
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.modules.batchnorm import _BatchNorm

from idml_fast import cli
from idml_fast.evaluation import CORRUPTIONS, retrieval, shuffled
from idml_fast.train import Config, TwoHeaded, load, outcome, run
from idml_fast.train import data as data_module
from idml_fast.train import report as report_module
from idml_fast.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from idml_fast.train.criterion import SettingsError
from idml_fast.train.data import batches, in_memory, load_data
from idml_fast.train.datasets import DataError
from idml_fast.train.evaluate import Settings, evaluate_files
from idml_fast.train.folder import FILES
from idml_fast.train.images import to_float
from idml_fast.train.loop import train
from idml_fast.train.outcome import embed, embed_all, uncertainties
from idml_fast.train.processes import Processes
from idml_fast.train.vision import Backbone, transforms

TINY = "test_resnet.r160_in1k"
FIRST = "conv1.0.weight"  # of its tensors
PUBLISHED = "cub in .* has 40 images of 4 classes for train; published are 5,864 images of 100"


def draw(root: Path, digit: int, names: list[str]) -> None:
    """Photographs of a digit, each of another size and colour."""
    found = load_digits()
    pictures = found.images[found.target == digit]
    for number, name in enumerate(names):
        colour = np.random.default_rng([digit, number]).uniform(0.5, 1, 3)
        pixels = (255 / 16 * pictures[number][:, :, None] * colour).astype(np.uint8)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40 + number, 50 - number)).save(path)


def write_birds(root: Path) -> Path:
    """Eight classes laid out as CUB-200-2011, of which four are learned."""
    for digit in range(8):
        folder = f"{digit + 1 if digit < 4 else digit + 101:03}.Bird_{digit}"
        names = [f"{folder}/{digit}_{n}.{'png' if n % 2 else 'jpg'}" for n in range(10)]
        draw(root / "CUB_200_2011" / "images", digit, names)
    return root


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return write_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Six items laid out as In-shop Clothes Retrieval: three are learned, three looked for."""
    root = tmp_path_factory.mktemp("clothes")
    lines = []
    for digit in range(6):
        for part, count in (("train", 8),) if digit < 3 else (("query", 4), ("gallery", 6)):
            names = [f"img/id_{digit:08}/{part}_{n}.jpg" for n in range(count)]
            draw(root, digit, names)
            lines += [f"{name} id_{digit:08} {part}" for name in names]
    head = [str(len(lines)), "image_name item_id evaluation_status"]
    (root / "list_eval_partition.txt").write_text("\n".join([*head, *lines]) + "\n")
    return root


def tiny(folder: Path, root: Path, name: str = "cub", **changes) -> Config:
    """Two epochs of a very small network of timm."""
    config = Config(
        name=name,
        data=DataConfig(
            name=name, root=str(root), resize=36, image_size=32, workers=0, batch_size=16
        ),
        model=ModelConfig(backbone=TINY, pretrained=False, sem_dim=8, unc_dim=4),
        optim=OptimConfig(epochs=2, warmup_epochs=1, lr=1e-3),
        run=RunConfig(folder=str(folder), cpu=True),
    )
    return replace(config, **changes)


def trained(config: Config, name: str = "introspective") -> TwoHeaded:
    """A network that one metric has trained."""
    processes, data = Processes(Accelerator(cpu=True)), load_data(config.data)
    metric = config.metrics[name]
    return train(processes, config, data, name, metric, [].append, watch=False)[0]


@pytest.fixture(scope="module")
def finished(birds, tmp_path_factory):
    """A finished run, and its results."""
    config = tiny(tmp_path_factory.mktemp("runs"), birds)
    return config, run(config)


@pytest.fixture(scope="module")
def found(clothes, tmp_path_factory):
    """A finished run with a gallery, and its results."""
    config = tiny(tmp_path_factory.mktemp("runs"), clothes, "inshop")
    return config, run(config)


# ------------------------------------------------------------------------------ the images


def test_images_are_squares_in_0_to_1_and_as_large_as_the_network_wants(birds):
    config = tiny(Path(), birds)
    data = load_data(config.data)
    assert (len(data.train), len(data.test), data.num_classes) == (40, 40, 4)
    assert data.shape == (3, 32, 32)
    for part, dtype in ((data.train, torch.uint8), (data.test, torch.float32)):
        for image, label, _ in part:
            assert image.shape == data.shape
            assert image.dtype == dtype
            image = to_float(image)
            assert image.dtype == torch.float32
            assert 0 <= image.min() < image.max() <= 1
            assert label in range(4)
    assert data.test_labels.tolist() == [x for x in range(4) for _ in range(10)]
    assert data.classes == tuple(f"Bird {x}" for x in range(4, 8))
    assert re.search(PUBLISHED, data.remarks[0])


def test_a_test_image_is_resized_and_its_centre_cut_out(birds):
    config = tiny(Path(), birds)
    data = load_data(config.data)
    path = Path(data.test.root) / data.test.listing.paths[2]
    with Image.open(path) as image:
        assert (path.suffix, image.size) == (".jpg", (42, 48))
        wanted = image.convert("RGB").resize((36, 41), Image.Resampling.BILINEAR)
    wanted = np.asarray(wanted.crop((2, 4, 34, 36)))
    np.testing.assert_allclose(255 * data.test[2][0].movedim(0, 2), wanted, atol=0.01)


def test_training_images_vary_and_test_images_do_not(birds, tmp_path):
    data = load_data(tiny(Path(), birds).data)
    assert not torch.equal(data.train[3][0], data.train[3][0])
    assert torch.equal(data.test[3][0], data.test[3][0])
    Image.new("RGB", (100, 60), (255, 128, 0)).save(tmp_path / "orange.png")
    for transform in transforms(36, 32):
        wanted = torch.tensor([1, 128 / 255, 0])[:, None, None].expand(3, 32, 32)
        torch.testing.assert_close(to_float(transform(tmp_path / "orange.png")), wanted)


def test_seeded_images_vary_by_epoch_and_place_alone(birds):
    train = load_data(tiny(Path(), birds).data).train
    state = torch.get_rng_state()
    train.reseed(0, 1)
    first, second = train[3][0], train[4][0]
    assert torch.equal(train[3][0], first)  # whatever was read before it
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    for other in ((0, 2), (1, 1)):
        train.reseed(*other)
        assert not torch.equal(train[3][0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_order_whoever_reads_them(birds, workers):
    config = replace(tiny(Path(), birds).data, workers=workers)
    data = load_data(config)
    state = torch.get_rng_state()
    everything = torch.cat(list(batches(data.test, config)))
    some = in_memory(data.test, config, torch.tensor([3, 30]))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(everything, torch.stack([data.test[i][0] for i in range(40)]))
    assert torch.equal(some, everything[[3, 30]])


def test_a_bounded_sample_is_drawn_by_the_seed(birds, monkeypatch):
    config = tiny(Path(), birds).data
    assert load_data(config).sampled.tolist() == list(range(40))
    monkeypatch.setattr(data_module, "SAMPLED", 12)
    drawn = load_data(config, 3).sampled
    assert drawn.unique().tolist() == drawn.tolist()  # in order, none of them twice
    assert len(drawn) == 12
    assert torch.equal(load_data(config, 3).sampled, drawn)
    assert not torch.equal(load_data(config, 4).sampled, drawn)


# ------------------------------------------------------------------------------ a whole run


def test_a_run_writes_its_files_and_learns(finished):
    config, results = finished
    assert sorted(path.name for path in config.folder.iterdir()) == sorted(FILES)
    for result in results.values():
        assert 0.25 < result["recall_at_1"] <= 1  # by chance 0.23
    assert results["introspective"]["unc_grad_norm"] > 1e-3
    assert results["introspective"]["unc_alive"] == 1


def test_the_same_seed_gives_the_same_network_whoever_reads_the_images(birds, tmp_path):
    config = tiny(tmp_path, birds, mix="mixup")
    one, *others = (
        trained(replace(config, data=replace(config.data, workers=workers))).state_dict()
        for workers in (0, 0, 1, 2)
    )
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_reads_well(finished, birds):
    config, _ = finished
    page = (config.folder / "report.html").read_text("utf-8")
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert (
        "Both learn 4 classes of the data set cub; both are compared on 4 classes, which" in words
    )
    assert re.search(PUBLISHED, words)
    assert f"backbone {TINY}" in words
    assert "over all 40 images" in words
    for digits in ("digits", "0, 1, 2, 3, 4", "small data set"):
        assert digits not in words.partition("Configuration")[0]
    assert len(page) < 3e6


def test_of_many_large_images_the_report_shows_small_ones(finished, monkeypatch, tmp_path, birds):
    config, _ = finished
    small = re.findall(
        'data:image/(?:png|jpeg);base64,[^"]*', (config.folder / "report.html").read_text("utf-8")
    )
    assert all(x.startswith("data:image/png") for x in small)
    monkeypatch.setattr(report_module, "THUMBNAIL", 24)
    monkeypatch.setattr(data_module, "SAMPLED", 12)
    run(replace(config, run=replace(config.run, folder=str(tmp_path))))
    page = (tmp_path / "cub" / "report.html").read_text("utf-8")
    shown = re.findall('data:image/(?:png|jpeg);base64,[^"]*', page)
    assert len(shown) == len(small)
    assert all(x.startswith("data:image/jpeg") for x in shown)
    assert "over 12 of the images" in " ".join(page.split())
    assert "raw pixels" not in page  # among fewer images it is an easier task


def test_the_eval_command_finds_what_the_run_has_found(finished, capsys):
    config, results = finished
    path = config.folder / "introspective.safetensors"
    found = evaluate_files([path], settings=Settings(seed=config.run.seed))
    for name in ("recall_at_1", "map_at_r", "mrr"):
        assert found["retrieval"][name] == pytest.approx(results["introspective"][name])
    assert found["queries"]["classes"] == 4
    said = capsys.readouterr().out
    assert re.search(PUBLISHED, said)
    assert "40 queries of 4 classes among themselves" in said


def test_a_gallery_is_what_queries_are_looked_for_in(found, capsys):
    config, results = found
    data = load_data(config.data)
    assert (len(data.test), len(data.gallery)) == (12, 18)
    for name, result in results.items():
        model, _ = load(config.folder / f"{name}.safetensors")
        sem, _, sem2, _ = embed_all(model, config, data)
        nearest = torch.cdist(sem, sem2).argmin(dim=1)
        right = data.gallery_labels[nearest] == data.test_labels
        assert result["recall_at_1"] == right.double().mean().item()
        told = evaluate_files([config.folder / f"{name}.safetensors"])
        assert told["retrieval"]["recall_at_1"] == result["recall_at_1"]
        assert told["gallery"]["items"] == 18
    assert "12 queries of 3 classes in a gallery of 18" in capsys.readouterr().out
    page = (config.folder / "report.html").read_text("utf-8")
    assert "<dt>found among</dt><dd>18 images</dd>" in page


def test_pictures_of_what_was_found_are_those_of_the_gallery(found):
    config, _ = found
    data = load_data(config.data)
    page = (config.folder / "report.html").read_text("utf-8")
    rows = re.findall('<div class="row">(.*?)\n        </div>', page, flags=re.DOTALL)
    query, *others = re.findall('src="([^"]*)"', rows[0])
    pictures = [
        [report_module._picture(part[i][0]) for i in range(len(part))]
        for part in (data.test, data.gallery)
    ]
    assert query in pictures[0]
    assert len(others) == 5
    assert set(others) <= set(pictures[1])


def test_a_class_with_one_image_is_in_no_average(birds, tmp_path):
    root = tmp_path / "images"
    for digit in range(4):
        draw(
            root / ("train" if digit < 2 else "test"), digit, [f"{digit}/{n}.png" for n in range(6)]
        )
    draw(root / "test", 4, ["4/alone.png"])
    config = tiny(tmp_path, root, "folder")
    results = run(config)["introspective"]
    data = load_data(config.data)
    model, _ = load(config.folder / "introspective.safetensors")
    sem = embed(model, batches(data.test, config.data))["sem"]
    values = retrieval(sem, data.test_labels)
    assert values.unmatched.tolist() == [12]
    assert results["recall_at_1"] == values.values["recall_at_1"]


def test_uncertainties_are_those_of_the_batches(finished):
    config, _ = finished
    data = load_data(config.data)
    model, metric = load(config.folder / "introspective.safetensors")
    told = uncertainties(model, config.criterion(metric, 4), batches(data.test, config.data))
    _, unc = model(torch.stack([image for image, *_ in data.test]))
    torch.testing.assert_close(told["unc_norm"], unc.norm(dim=1).detach(), rtol=1e-4, atol=1e-6)


def test_damaged_in_blocks_images_give_the_same_numbers(finished, monkeypatch):
    config, _ = finished
    data = replace(load_data(config.data), sampled=torch.tensor([1, 5, 7, 20, 21, 33, 39]))
    model, metric = load(config.folder / "introspective.safetensors")
    criterion = config.criterion(metric, 4)
    images = torch.stack([data.test[i][0] for i in data.sampled.tolist()])
    monkeypatch.setattr(outcome, "BLOCK", 3 * images[0].numel() * 4)
    damaged, foreign = outcome.made_worse(model, criterion, config, data)

    def measured(images):
        return model(images)[1].detach().norm(dim=1)

    def assert_same(one, other):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    assert_same(foreign["unc_norm"], measured(shuffled(images)))
    for kind, norms in damaged["unc_norm"].items():
        assert norms.shape == (6, 7)
        assert_same(norms[0], measured(images))
        for severity in (1, 5):
            blocks = [measured(CORRUPTIONS[kind](x, severity)) for x in images.split(3)]
            assert_same(norms[severity], torch.cat(blocks))


# ------------------------------------------------------------------------------ the network


def configured(**settings) -> ModelConfig:
    given = {"backbone": TINY, "pretrained": False, "sem_dim": 8, "unc_dim": 4}
    return ModelConfig(**given | settings)


def test_the_heads_get_mean_and_maximum_of_normalised_images():
    images = torch.rand(3, 3, 64, 64)
    found = {}
    for pooling in ("avg", "max", "avgmax", "own"):
        torch.manual_seed(0)
        model = TwoHeaded(configured(pooling=pooling), 3, (64, 64)).eval()
        found[pooling] = model.features(images)
    mean, std = (torch.tensor(model.trunk.network.pretrained_cfg[x]) for x in ("mean", "std"))
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    map_ = model.trunk.network.forward_features(normalised).flatten(2)
    torch.testing.assert_close(found["avg"], map_.mean(2))
    torch.testing.assert_close(found["max"], map_.amax(2))
    torch.testing.assert_close(found["avgmax"], map_.mean(2) + map_.amax(2))
    torch.testing.assert_close(found["own"], found["avg"])
    sem, unc = model(images)
    torch.testing.assert_close(sem.norm(dim=1), torch.ones(3))
    assert (sem.shape, unc.shape) == ((3, 8), (3, 4))


def test_a_feature_map_may_have_its_channels_last():
    images = torch.rand(2, 3, 64, 64)
    network = timm.create_model("test_convnext", num_classes=0).eval()

    class Last(torch.nn.Module):
        num_features, pretrained_cfg = network.num_features, network.pretrained_cfg

        def forward_features(self, x):
            return network.forward_features(x).movedim(1, 3)

    with pytest.MonkeyPatch.context() as patch:
        found = []
        for made in (network, Last()):
            patch.setattr("idml_fast.train.vision.network", lambda _, made=made: made)
            found.append(Backbone(configured(), 3, (64, 64)).eval()(images))
    torch.testing.assert_close(*found)


def test_a_network_without_a_feature_map_pools_by_itself():
    message = r"model.pooling must be own for test_vit, whose features \[1, 17, 64\] are no map"
    with pytest.raises(SettingsError, match=message):
        TwoHeaded(configured(backbone="test_vit"), 3, (64, 64))
    model = TwoHeaded(configured(backbone="test_vit", pooling="own"), 3, (64, 64))
    assert model.features(torch.rand(2, 3, 64, 64)).shape == (2, 64)


@pytest.mark.parametrize("side", [8, 30, 224])
def test_the_heads_of_the_small_network_stay_small(side):
    model = TwoHeaded(ModelConfig(width=8, sem_dim=4, unc_dim=2), 3, (side, side))
    assert model.sem.in_features == 2 * 8 * 2 * 2
    map_ = model.trunk[:-2](images := torch.rand(2, 3, side, side))
    assert map_.shape == (2, 16, side // 4, side // 4)
    if side == 8:  # the map itself
        assert torch.equal(model.features(images), map_.flatten(1))
    if side == 224:
        quarters = map_.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean((3, 5))
        torch.testing.assert_close(model.features(images), quarters.flatten(1))


def norms(model: TwoHeaded) -> dict[str, torch.Tensor]:
    """All that the batch norms have."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            found |= {f"{name}.{key}": x for key, x in module.state_dict().items()}
    return found


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_stay_frozen_after_the_warm_up(birds, tmp_path, frozen):
    config = tiny(tmp_path, birds, model=configured(freeze_norm=frozen))
    torch.manual_seed(config.run.seed)
    before, after = (norms(x) for x in (TwoHeaded(config.model, 3, (32, 32)), trained(config)))
    assert before
    for name, x in after.items():
        assert torch.equal(x, before[name]) == frozen, name


@pytest.mark.parametrize("warmup", [2, 1])
def test_only_the_heads_and_the_proxies_learn_in_the_warm_up(birds, tmp_path, warmup):
    config = tiny(tmp_path, birds, optim=OptimConfig(epochs=2, warmup_epochs=warmup))
    torch.manual_seed(config.run.seed)
    before = dict(TwoHeaded(config.model, 3, (32, 32)).named_parameters())
    for name, x in trained(config).named_parameters():
        learned = x.requires_grad and not (name.startswith("trunk.") and warmup == 2)
        assert torch.equal(x, before[name]) != learned, name


def test_a_model_comes_back_without_timm_s_weights(finished, monkeypatch):
    config, _ = finished
    made = []

    def create(name, **options):
        made.append(options)
        return create_model(name, **options)

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    model, _ = load(config.folder / "introspective.safetensors")
    assert [options["pretrained"] for options in made] == [False]
    again = trained(config).eval()
    images = torch.rand(2, 3, 32, 32)
    assert not model.training
    for one, other in zip(model(images), again(images), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def state():
    """Weights of the network, with its classifier."""
    torch.manual_seed(7)
    return timm.create_model(TINY).state_dict()


def write(path: Path, state: dict) -> str:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("form", ["safetensors", "pth", "checkpoint", "headless"])
def test_weights_are_read_from_a_file(tmp_path, state, form):
    name = "w.safetensors" if form == "safetensors" else "w.pth"
    given = state
    if form == "checkpoint":
        given = {"epoch": 3, "state_dict": {f"module.{k}": x for k, x in state.items()}}
    if form == "headless":
        given = {k: x for k, x in state.items() if not k.startswith("fc.")}
    path = write(tmp_path / name, given)
    model = TwoHeaded(configured(weights=path, pretrained=True), 3, (32, 32))
    for key, x in model.trunk.network.state_dict().items():
        assert torch.equal(x, state[key])


class Code:
    """What a pickle may have in it, that would be run."""

    def __reduce__(self):
        return print, ("run",)


BAD = {
    "is missing": "must be a file, got ",
    "is text": "must be weights in safetensors or PyTorch's format, got ",
    "is text.safetensors": "must be weights in safetensors or PyTorch's format, got ",
    "is code": "must be weights in safetensors or PyTorch's format, got ",
    "is a tensor": "must be weights in safetensors or PyTorch's format, got ",
    "lacks one": rf"must be those of {TINY}, got .*: there is no {FIRST}$",
    "lacks all": rf"must be those of {TINY}, got .*: there is no {FIRST}, .* and \d+ more$",
    "has another": rf"must be those of {TINY}, got .*: it has no attention$",
    "has another shape": rf"must be those of {TINY}, got .*: size mismatch for {FIRST}: ",
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(tmp_path, state, capsys, kind):
    path = tmp_path / kind
    if kind.startswith("is text"):
        path.write_text("weights")
    elif kind != "is missing":
        rest = {key: x for key, x in state.items() if key != FIRST}
        given = {
            "is code": {FIRST: Code()},
            "is a tensor": torch.ones(3),
            "lacks one": rest,
            "lacks all": {"state_dict": {}},
            "has another": state | {"attention": torch.ones(1)},
            "has another shape": state | {FIRST: torch.ones(2, 3)},
        }
        write(path, given[kind])
    with pytest.raises(SettingsError, match=f"model.weights {BAD[kind]}") as error:
        TwoHeaded(configured(weights=str(path)), 3, (32, 32))
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------ refusals


def refused(capsys, folder: Path, *arguments: str) -> str:
    """What the command says to arguments that it does not run with; nothing is written."""
    assert cli.main(["train", "--run.folder", str(folder), "--run.cpu", "true", *arguments]) == 1
    assert not any(folder.iterdir())
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("backbone=resnet51", "model.backbone must be small or a network of timm, got resnet51"),
        ("backbone=resnet18.nope", "model.backbone cannot be resnet18.nope: Invalid pretrained"),
        ("backbone=swin_tiny_patch4_window7_224 pooling=avg", "image_size must suit swin_tiny_"),
        ("backbone=test_vit", "model.pooling must be own for test_vit, whose features"),
        ("pretrained=true", f"the weights of {TINY} cannot be had: give them with --model.weights"),
        ("weights=nowhere.pth", "model.weights must be a file, got nowhere.pth"),
    ],
)
def test_networks_that_cannot_be_had(birds, tmp_path, capsys, settings, message):
    given = {"backbone": TINY, "pretrained": "false"}
    given |= dict(setting.split("=") for setting in settings.split())
    options = [word for name, x in given.items() for word in (f"--model.{name}", x)]
    options += ["--data.name", "cub", "--data-root", str(birds), "--data.image_size", "64"]
    said = refused(capsys, tmp_path, *options)
    assert said.startswith("idml-fast: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("cub", "must hold CUB_200_2011/images or images, got none of them"),
        ("domainnet --data.source real --data.target moon", "data.target must be one of"),
        ("domains --data.source moon", "data.source must be one of"),
    ],
)
def test_data_sets_that_are_not_there(tmp_path, capsys, options, message):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "runs").mkdir()
    given = ["--data-root", str(root), "--data.name", *options.split()]
    assert message in refused(capsys, tmp_path / "runs", *given)


def test_boundaries_are_as_many_as_the_classes(birds, tmp_path, capsys):
    options = ["--data.name", "cub", "--data-root", str(birds), "--model.backbone", TINY]
    options += ["--model.pretrained", "false", "--loss.name", "margin", "--data.image_size", "32"]
    options += ["--loss.options.learn_beta", "true", "--loss.options.num_classes", "100"]
    wanted = "loss.options.num_classes must be null or 4, the number of classes"
    assert wanted in refused(capsys, tmp_path, *options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, capsys, workers):
    for digit in range(4):
        draw(tmp_path / "root", digit, [f"{digit}/{n}.png" for n in range(3)])
    broken = tmp_path / "root" / "1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = ["--data.name", "folder", "--data-root", str(tmp_path / "root"), "--model.backbone"]
    options += [TINY, "--model.pretrained", "false", "--data.image_size", "32"]
    options += ["--data.workers", str(workers), "--run.folder", str(tmp_path), "--run.cpu", "true"]
    assert cli.main(["train", *options]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(f"idml-fast: {re.escape(str(broken))} cannot be read: .*\n", said)


def test_images_that_are_gone_are_missed_by_the_eval_command(finished, birds, capsys, monkeypatch):
    config, _ = finished
    path = str(config.folder / "introspective.safetensors")
    renamed = birds.rename(birds.with_name("elsewhere"))
    try:
        assert cli.main(["eval", path]) == 1
    finally:
        renamed.rename(birds)
    assert f"{birds} must be the folder of a data set, got nothing" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_without_the_extra_the_command_says_how_to_get_it(
    birds, tmp_path, capsys, monkeypatch, missing
):
    monkeypatch.delitem(sys.modules, "idml_fast.train.vision")
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    options = "--data.name", "cub", "--data-root", str(birds)
    wanted = f"idml-fast: idml-fast train needs {missing}: pip install 'idml_fast[vision]'\n"
    assert refused(capsys, tmp_path, *options) == wanted


def test_another_build_of_torchvision_is_told(birds, tmp_path, capsys, monkeypatch):
    class Other:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "idml_fast.train.vision")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "meta_path", [Other(), *sys.meta_path])
    said = refused(capsys, tmp_path, "--data.name", "cub", "--data-root", str(birds))
    assert f"torchvision must be built for torch {torch.__version__}, got another one: " in said


def test_the_digits_need_none_of_it():
    code = """
import sys
from idml_fast.train import Config, TwoHeaded
from idml_fast.train.data import load_data
config = Config()
TwoHeaded(config.model, 1, load_data(config.data).shape[1:])
print({"timm", "torchvision"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_data_set_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be the folder of a data set, got nothing"):
        load_data(DataConfig(name="folder", root=str(tmp_path / "nowhere")))

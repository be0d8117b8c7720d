"""What the trainings have in common: which rows they learn from and by which labels, at which rate, and that what they
export is the average of their weights, with batch statistics of its own."""

import copy
import csv
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import classifier_train
import p1_train
import p2_train
import p3_train
from common.checkpoint import load_weights
from common.ema import reestimate_batch_norm
from common.run import parse_with_resume
from common.trainer import Trainer, descend
from datasets.augment import normalise
from datasets.digits import load_digits, load_labels
from datasets.faces import load_faces
from models.diffusion import Process, snr_weight
from tests.helpers import run

SCRIPTS = {
    "p1": (p1_train.parse_options, p1_train.FaceTrainer, ("--dim", 2, "--eval-images", 0)),
    "p2": (p2_train.parse_options, p2_train.DiffusionTrainer, ("--dim", 4, "--eval-images", 0)),
    "p2 adamw": (
        p2_train.parse_options,
        p2_train.DiffusionTrainer,
        ("--dim", 4, "--eval-images", 0, "--optimiser", "adamw"),
    ),
    "p3": (p3_train.parse_options, p3_train.make_trainer, ("--dim", 2, "--students", 0)),
    "p3 source": (p3_train.parse_options, p3_train.make_trainer, ("--method", "source", "--network", "dann")),
    "classifier": (
        lambda argv: parse_with_resume(classifier_train.build_parser(), argv),
        classifier_train.ClassifierTrainer,
        (),
    ),
}


@pytest.fixture
def make(faces, domains, tmp_path):
    """A new trainer of a script, on data that has no validation split."""
    (tmp_path / "face").mkdir()
    (tmp_path / "face" / "train").symlink_to(faces / "train")

    def make(name: str, *words: object) -> Trainer:
        parse, trainer, own = SCRIPTS[name]
        data = {"p1": tmp_path / "face", "p2": domains / "mnistm", "classifier": domains / "mnistm"}
        folder = data.get(name.split()[0], domains)
        common = ("--data", folder, "--out", tmp_path / "runs", "--device", "cpu", "--no-bf16")
        return trainer(parse([str(word) for word in (*common, "--batch-size", 6, *own, *words)]))

    return make


def raw_network(t: Trainer) -> nn.Module:
    return t.nets.generator if isinstance(t, p1_train.FaceTrainer) else t.network


def average(t: Trainer) -> nn.Module:
    return t.nets.average if isinstance(t, p1_train.FaceTrainer) else t.average


def labels_of(x: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Of each row of x the label of the same image among ``images``, which are all different."""
    same = (x[:, None] - images).abs().amax((2, 3, 4)) < 1e-5
    assert same.sum(1).tolist() == [1] * len(x)
    return labels[same.int().argmax(1)]


@pytest.mark.parametrize("name", ["p1", "p2", "p3", "p3 source"])
def test_the_average_of_the_weights_is_exported(make, name):
    t = make(name, "--ema", 0.6)
    network = raw_network(t)
    expected = [p.detach().clone() for p in network.parameters()]
    for t.step in range(3):
        t.update()
        for mean, p in zip(expected, network.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - min(0.6, (1 + t.step) / (10 + t.step)))
    state, apart = t.weights()[2], 0.0
    for (key, p), mean in zip(network.named_parameters(), expected, strict=True):
        assert torch.allclose(state[key], mean, atol=1e-6), key
        apart = max(apart, float((p.detach() - mean).abs().max()))
    assert apart > 5e-5


def test_the_power_of_the_average_reaches_it(make):
    t = make("p1", "--ema", 0.9, "--ema-power", 2)
    assert (t.nets.ema.decay, t.nets.ema.power) == (0.9, 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_annealing_reaches_the_optimisers(make, name):
    t = make(name)
    t.progress = 0.75
    optimisers = [part for part in t.parts.values() if isinstance(part, torch.optim.Optimizer)]
    full = [t.o.lr_g, t.o.lr_d] if name == "p1" else [t.o.lr]
    for t.o.anneal, factor in ((True, 0.5), (False, 1)):
        t.update()
        for optimiser, rate in zip(optimisers, full, strict=True):
            assert {group["lr"] for group in optimiser.param_groups} == {rate * factor}


def test_descent_forgets_the_gradient_before():
    x = torch.tensor([3.0], requires_grad=True)
    optimiser = torch.optim.SGD([x])
    for rate, expected in ((0.1, 3 * 0.8), (0.25, 3 * 0.8 * 0.5)):  # x^2: x (1 - 2 rate)
        descend(x.square().sum(), optimiser, rate)
        assert x.item() == pytest.approx(expected)


def test_muon_has_the_hidden_layers(make):
    """Not the first and the last convolution, nor the table of labels, nor what is no matrix."""
    t = make("p2", "--optimiser", "muon")
    ours = {id(p) for p in t.optimiser.param_groups[0]["params"]}
    names = {name for name, p in t.network.named_parameters() if id(p) in ours}
    matrices = {name for name, p in t.network.named_parameters() if p.ndim > 1}
    assert matrices - names == {"inc.double_conv.0.weight", "outc.weight", "label_emb.weight"}
    assert names < matrices


def test_held_out_rows_are_not_trained_on(make, faces, domains, mean_inception):
    t, images = make("p1", "--eval-images", 10), load_faces(faces, "train")
    assert torch.equal(t.images, images[:54])
    assert torch.equal(t.judge.distance.images, images[54:])
    images, labels = (load(domains / "mnistm", "train") for load in (load_digits, load_labels))
    t = make("p2", "--eval-images", 10)
    assert torch.equal(t.images, images[:36])
    assert torch.equal(t.labels, labels[:36])
    assert torch.equal(t.judge.distance.images, images[36:])
    for name in ("p3", "p3 source", "classifier"):
        t = make(name)
        for ours, whole in ((t.images, images), (t.labels, labels)):
            assert torch.equal(ours, whole[:36])
        for held_out, whole in ((t.held_images, images), (t.held_labels, labels)):
            assert torch.equal(held_out, whole[36:])
    t = make("p3", "--target", "usps")
    assert torch.equal(t.target_images, load_digits(domains / "usps", "train"))


def test_the_source_baseline_needs_no_target(domains, tmp_path):
    (tmp_path / "mnistm").symlink_to(domains / "mnistm")
    words = ("--data", tmp_path, "--out", tmp_path, "--method", "source", "--network", "dann", "--dim", 2)
    assert run(p3_train.main, *words, "--batch-size", 4, "--steps", 1, "--device", "cpu").code == 0


def test_digits_are_learnt_with_their_labels(make, domains, monkeypatch):
    """By the diffusion model: labels, all steps of the process, standard normal noise, the weights of the recipe."""
    seen = []

    def loss(network, _process, *given):
        seen.append(given)
        return network.outc.bias.sum()

    monkeypatch.setattr(p2_train, "training_loss", loss)
    monkeypatch.setattr(p2_train, "Process", lambda: Process(T=4))
    t = make("p2", "--drop", 0.2)
    for t.step in range(30):
        t.update()
    x_0, y, steps, eps = (torch.cat(part) for part in list(zip(*seen, strict=True))[:4])
    assert set(steps.tolist()) == {1, 2, 3, 4}
    assert eps.mean().item() == pytest.approx(0, abs=0.01)
    assert eps.std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(seen[0][4], snr_weight(Process(T=4), 5, 0.5))
    images = normalise(load_digits(domains / "mnistm", "train")[:36])
    kept = y >= 0
    assert torch.equal(y[kept], labels_of(x_0, images, load_labels(domains / "mnistm", "train"))[kept])
    assert 0.1 < (~kept).float().mean() < 0.3


@pytest.mark.parametrize("name", ["p3 source", "classifier"])
def test_classifiers_learn_images_with_their_labels(make, monkeypatch, name):
    module = {"classifier": classifier_train}.get(name, p3_train)
    cross_entropy, wanted, given = module.F.cross_entropy, [], []
    monkeypatch.setattr(module.F, "cross_entropy", lambda x, y, **k: wanted.append(y) or cross_entropy(x, y, **k))
    monkeypatch.setattr(classifier_train, "translation", lambda x, *_, **__: x)
    t = make(name)
    t.network.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    for t.step in range(3):
        t.update()
    images = normalise(t.images) if name == "classifier" else t.see(t.images)
    assert torch.equal(torch.cat(wanted), labels_of(torch.cat(given), images, t.labels))


@pytest.mark.parametrize(("name", "score"), [("p3 source", "error"), ("p3", "source"), ("classifier", "error")])
@pytest.mark.parametrize(("digit", "right"), [(6, 75), (7, 25)])
def test_what_checkpoints_are_chosen_by(make, name, score, digit, right):
    """The four held-out digits are 6, 7, 6, 6, and a network reads them all as 6, or all as 7."""
    t = make(name)
    t.held_labels[2:] = 6
    read = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(digit), 10).float())
    network = t.network if name == "classifier" else t.average
    network.forward = lambda x: read.expand(len(x), -1)
    assert t.evaluate()[score] == (right if score == "source" else 100 - right)


@pytest.mark.parametrize("name", ["p1", "p1 without average", "p3", "p3 source"])
def test_exported_batch_statistics(make, monkeypatch, name):
    """Of the average's own, of what it will see: noise, the target's training images, or the source's; without an
    average, the network's."""
    noise_batches = p1_train.noise_batches
    monkeypatch.setattr(p1_train, "noise_batches", lambda *a: noise_batches(*a, batches=2, size=20))
    t = make(name.split(" without")[0], *(("--ema", 0) if "without" in name else ()))
    for t.step in range(2):
        t.update()
    t.prepare()
    expected = copy.deepcopy(average(t))
    t.evaluate()
    if "without" in name:
        expected = t.nets.generator
    else:
        inputs = {
            "p1": lambda: p1_train.noise_batches(100, t.device),
            "p3": lambda: [t.see(t.target_images)],
            "p3 source": lambda: [t.see(t.images)],
        }
        reestimate_batch_norm(expected, inputs[name]())
    exported, buffers = t.weights()[2], dict(expected.named_buffers())
    assert buffers
    for key, value in buffers.items():
        assert torch.allclose(exported[key], value, atol=1e-6), key


@pytest.mark.parametrize("name", ["p1", "p2", "p3"])
def test_bfloat16_computes_nearly_the_same(make, name):
    full, half = (make(name, *words).update() for words in ((), ("--bf16",)))
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.03, rtol=0.03)


def test_the_best_weights_are_those_of_the_lowest_score(faces, tmp_path, monkeypatch):
    scores = {1: 3.0, 2: 1.0, 3: 2.0}
    monkeypatch.setattr(p1_train.FaceTrainer, "evaluate", lambda self: {"fd": scores[self.step]})
    words = ("--data", faces, "--out", tmp_path, "--dim", 2, "--batch-size", 4, "--eval-images", 0, "--device", "cpu")
    assert run(p1_train.main, *words, "--steps", 3, "--eval-every", 1).code == 0
    steps = {
        name: load_weights(tmp_path / "p1_sngan_000" / f"{name}.safetensors")[1]["steps"] for name in ("best", "last")
    }
    assert steps == {"best": 2, "last": 3}


def test_the_speed_counts_updates_alone(make, monkeypatch):
    """On a clock where an update takes a second, and evaluating, exporting, drawing and saving take many."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("common.trainer.time", SimpleNamespace(monotonic=lambda: clock.now))

    def takes(seconds: float, result: object):
        def slow(*_: object) -> object:
            clock.now += seconds
            return result

        return slow

    monkeypatch.setattr(p1_train.FaceTrainer, "update", takes(1, torch.zeros(4)))
    monkeypatch.setattr(p1_train.FaceTrainer, "evaluate", takes(100, {"fd": 1.0}))
    monkeypatch.setattr(Trainer, "export", takes(10, None))
    for name, seconds in (("plot_curves", 5), ("save_png", 3), ("save_state", 70)):
        monkeypatch.setattr(f"common.trainer.{name}", takes(seconds, None))
    monkeypatch.setattr("common.trainer.LOG_STEPS", 2)
    trainer = make("p1", "--steps", 9, "--eval-every", 4, "--sample-every", 3, "--save-every", 1)
    trainer.train()
    lines = trainer.run.metrics_path.read_text().splitlines()
    rows = [(int(row["step"]), float(row["images_per_s"])) for row in csv.DictReader(lines)]
    assert rows == [(step, pytest.approx(6)) for step in (2, 3, 4, 6, 8, 9)]

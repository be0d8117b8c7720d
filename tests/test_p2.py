"""Problem 2, end to end on tiny data: classifier, training, resuming, generating, scoring, and wrong input."""

import argparse
import csv
import math
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

import classifier_train
import p1_train
import p2_test
import p2_train
from common.checkpoint import load_state, load_weights, save_weights
from common.pictures import plot_curves, to_uint8
from common.results import read_results, weights_id
from datasets.augment import normalise, resize
from datasets.digits import HELD_OUT, load_digits, load_labels
from datasets.images import decode_files, hold_out
from metrics.classify import accuracy, load_classifier
from metrics.colour import COLOURS
from metrics.neighbours import nearest
from models import diffusion
from models.classifier import Classifier
from models.diffusion import Process, timesteps
from models.unet import UNet_conditional
from tests.helpers import MeanInception, assert_user_error, run

TINY = ("--dim", 4, "--batch-size", 4, "--eval-images", 10, "--device", "cpu", "--no-bf16")


def train(digits, out, *options: object):
    return run(p2_train.main, "--data", digits, "--out", out, *TINY, *options)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Sheets and scores of training from one network step and 10 images a pass."""
    monkeypatch.setattr(p2_train, "EVAL", argparse.Namespace(**vars(p2_train.EVAL) | {"steps": 1, "w": 0.0}))
    monkeypatch.setattr(p2_test, "SLICE", 10)


@pytest.fixture(autouse=True)
def classifier(tmp_path_factory, monkeypatch):
    """Untrained weights in the place of the shipped classifier's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_weights(path, Classifier().state_dict(), {"model": "classifier", "config": {}})
    monkeypatch.setattr("metrics.classify.WEIGHTS", path)
    return path


# Training


def test_a_run_leaves_everything_a_reader_needs(digits, tmp_path, mean_inception, monkeypatch):
    monkeypatch.setattr("common.trainer.plot_curves", plot_curves)
    assert train(digits, tmp_path, "--steps", 4, "--sample-every", 2, "--eval-every", 4).code == 0
    folder = tmp_path / "p2_000"
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000002.png", "0000004.png"]
    with Image.open(folder / "samples" / "0000004.png") as image:
        assert image.size == (302, 302)
    assert (folder / "curves.png").stat().st_size > 10_000
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(rows[1][name] for name in ("loss", "accuracy", "fd", "mean_r", "std_b"))
    state, card = load_weights(folder / "best.safetensors")
    assert card["config"] == {"dim": 4, "predicts": "velocity", "size": 28}
    assert card["options"]["gamma"] == 5
    UNet_conditional(**card["config"]).load_state_dict(state)
    trained_on = load_digits(digits, "train")[:54].float()  # 6 of 60 are held out
    assert card["mean"] == pytest.approx(trained_on.mean((0, 2, 3)).tolist(), abs=0.051)


@pytest.mark.parametrize("optimiser", p2_train.OPTIMISERS)
def test_resume_is_bit_equal(digits, tmp_path, mean_inception, monkeypatch, optimiser):
    options = ("--steps", 4, "--optimiser", optimiser)
    assert train(digits, tmp_path / "a", *options).code == 0
    update = p2_train.DiffusionTrainer.update

    def killed(self):
        if self.step == 3:
            raise RuntimeError("killed")
        return update(self)

    monkeypatch.setattr(p2_train.DiffusionTrainer, "update", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(digits, tmp_path / "b", *options, "--save-every", 1e-9)
    monkeypatch.setattr(p2_train.DiffusionTrainer, "update", update)
    assert run(p2_train.main, "--resume", tmp_path / "b" / "p2_000").code == 0
    a, b = (load_state(tmp_path / x / "p2_000" / "state.pt") for x in "ab")
    assert a["step"] == b["step"] == 4
    for part in ("network", "average"):
        for key, tensor in a["parts"][part].items():
            assert torch.equal(tensor, b["parts"][part][key]), (part, key)


def test_a_run_is_trained_by_one_process(digits, tmp_path, mean_inception, monkeypatch):
    """A second --resume is refused while the run is being trained, and changes nothing; later it is not."""
    update, seen = p2_train.DiffusionTrainer.update, []

    def again(self):
        if self.step == 2 and not seen:
            before = (folder / "options.json").read_bytes()
            seen.append(run(p2_train.main, "--resume", folder))
            assert (folder / "options.json").read_bytes() == before
        return update(self)

    folder = tmp_path / "p2_000"
    monkeypatch.setattr(p2_train.DiffusionTrainer, "update", again)
    assert train(digits, tmp_path, "--steps", 3, "--save-every", 1e-9).code == 0
    assert_user_error(seen[0], folder, "is being trained by another process")
    assert run(p2_train.main, "--resume", folder, "--steps", 4).code == 0
    assert_user_error(run(p1_train.main, "--resume", folder), folder, "is a run of p2_train.py")


def test_training_goes_on_from_finished_weights(digits, tmp_path, mean_inception):
    """The first update starts where the given weights are, the new card tells of the run that made them, and what the
    network predicts may change."""
    assert train(digits, tmp_path, "--steps", 2, "--eval-images", 0, "--predicts", "noise").code == 0
    first = tmp_path / "p2_000" / "last.safetensors"
    options = ("--init", first, "--steps", 1, "--lr", 1e-12, "--eval-images", 0, "--ema", 0)
    assert train(digits, tmp_path, *options).code == 0
    (before, _), (after, card) = load_weights(first), load_weights(tmp_path / "p2_001" / "last.safetensors")
    assert all(torch.allclose(before[k], after[k], atol=1e-3) for k in before)
    (run_before,) = card["before"]
    assert run_before["steps"] == 2
    assert run_before["command"].endswith("--predicts noise")
    assert card["config"]["predicts"] == "velocity"
    assert_user_error(train(digits, tmp_path, "--init", tmp_path / "none.safetensors"), "none.safetensors")
    assert_user_error(run(p2_train.main, "--data", digits, "--out", tmp_path, "--init", first), first, "--dim")


def test_resume_refuses_other_options(digits, tmp_path, mean_inception):
    assert train(digits, tmp_path, "--steps", 1, "--eval-images", 0).code == 0
    outcome = run(p2_train.main, "--resume", tmp_path / "p2_000", "--lr", 1, "--gamma", 0)
    assert_user_error(outcome, "--gamma (run 5.0, given 0.0)", "--lr (run 0.0006, given 1.0)")


@pytest.fixture
def learnt(monkeypatch):
    """(images, labels) of every update."""
    seen = []
    loss = p2_train.training_loss

    def watched(network, process, x_0, y, *rest):
        seen.append((x_0, y))
        return loss(network, process, x_0, y, *rest)

    monkeypatch.setattr(p2_train, "training_loss", watched)
    return seen


@pytest.mark.parametrize("drop_per", ["sample", "batch"])
def test_labels_are_dropped(digits, tmp_path, mean_inception, monkeypatch, learnt, drop_per):
    monkeypatch.setattr(p2_train.DiffusionTrainer, "picture", lambda self: None)
    monkeypatch.setattr(UNet_conditional, "forward", lambda self, x, *_: x + self.outc.bias.sum())
    options = ("--steps", 40, "--eval-images", 0, "--drop", 0.3, "--drop-per", drop_per)
    assert train(digits, tmp_path, *options).code == 0
    dropped = torch.stack([y for _, y in learnt]) == -1
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.15)
    assert dropped.any(1).equal(dropped.all(1)) == (drop_per == "batch")


@pytest.mark.parametrize("low_noise", [0, 0.75])
def test_low_noise_is_trained_more_often(digits, tmp_path, monkeypatch, low_noise):
    """t is uniform in 1 ... 600, but for the share of --low-noise, which is uniform in 1 ... 250."""
    seen = []

    def loss(network, process, x_0, y, t, *_):
        seen.append(t)
        return network.outc.bias.sum()

    monkeypatch.setattr(p2_train, "training_loss", loss)
    options = ("--steps", 20, "--batch-size", 500, "--eval-images", 0, "--low-noise", low_noise)
    assert train(digits, tmp_path, "--sample-every", 1000, *options).code == 0
    t = torch.cat(seen)
    assert (t.min(), t.max()) == (1, 600)
    for below in (20, 120, 240):
        share = low_noise * below / 250 + (1 - low_noise) * below / 600
        assert (t <= below).float().mean().item() == pytest.approx(share, abs=0.02)  # 4 standard deviations


@pytest.mark.parametrize("size", [28, 32])
def test_mean_errors_are_measured(digits, tmp_path, mean_inception, monkeypatch, size):
    """A network whose velocity is 0 predicts sqrt(alpha_bar) x_t: alpha_bar of an image, and noise that is 0 on
    average. The card tells by how many gray levels that is off; fewer digits are asked where there is less noise, and
    none for a picture."""
    seen = defaultdict(list)

    def mean_error(network, process, x_0, y, t, eps):
        seen[t].append(x_0)
        return diffusion.mean_error(network, process, x_0, y, t, eps)

    monkeypatch.setattr(p2_train, "mean_error", mean_error)
    monkeypatch.setitem(p2_train.FAST, "steps", 4)
    monkeypatch.setattr(UNet_conditional, "forward", lambda self, x, *_: 0 * x + 0 * self.outc.bias.sum())
    monkeypatch.setattr(p2_train, "PASS", 10)
    options = ("--steps", 2, "--sample-every", 1, "--eval-every", 2, "--eval-images", 0, "--size", size)
    for calibrate in (0, 54):
        assert train(digits, tmp_path / str(calibrate), *options, "--calibrate", calibrate).code == 0
    none, card = (load_weights(tmp_path / name / "p2_000" / "last.safetensors")[1] for name in ("0", "54"))
    assert "mean_errors" not in none
    steps = [600, 338, 150, 38]
    assert list(card["mean_errors"]) == [str(t) for t in steps]
    counts = {t: sum(map(len, parts)) for t, parts in seen.items()}
    assert counts == {t: math.ceil(54 * t / 600) for t in steps}
    for t, errors in card["mean_errors"].items():
        x_0 = torch.cat(seen[int(t)])
        wanted = 127.5 * (Process().alpha_bar[int(t)] - 1) * x_0.mean((0, 2, 3))
        assert errors == pytest.approx(wanted.tolist(), abs=8 / len(x_0) ** 0.5)  # 3.5 standard errors


def test_resized_digits(digits, tmp_path, mean_inception, monkeypatch, learnt):
    """With --size 32 the network learns, and samples, images of 32x32; what is saved and scored has 28x28."""
    assert train(digits, tmp_path, "--steps", 1, "--batch-size", 2, "--size", 32).code == 0
    ((x_0, _),) = learnt
    assert x_0.shape == (2, 3, 32, 32)
    small = normalise(load_digits(digits, "train")[:54])
    assert ((resize(x_0, 28, antialias=True)[:, None] - small).abs().mean((2, 3, 4)).amin(1) < 0.1).all()
    with Image.open(tmp_path / "p2_000" / "samples" / "0000001.png") as image:
        assert image.size == (302, 302)
    weights = tmp_path / "p2_000" / "last.safetensors"
    shapes = []
    monkeypatch.setattr(UNet_conditional, "forward", lambda self, x, *_: shapes.append(x.shape) or x)
    options = ("--weights", weights, "--per-digit", 1, "--sampler", "ddim", "--steps", 1)
    assert run(p2_test.main, "--out", tmp_path / "out", *options).code == 0
    assert {shape[2:] for shape in shapes} == {(32, 32)}
    with Image.open(tmp_path / "out" / "0_001.png") as image:
        assert image.size == (28, 28)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_the_loss_falls(digits, tmp_path, predicts):
    words = ("--data", digits, "--out", tmp_path, *TINY, "--lr", 3e-3, "--eval-images", 0, "--predicts", predicts)
    t = p2_train.DiffusionTrainer(p2_train.parse_options([str(word) for word in words]))
    t.o.size, losses = 8, []
    for t.step in range(200):
        losses.append(t.update().item())
    assert sum(losses[150:]) < 0.8 * sum(losses[:50])


def test_recipes():
    ours, report = p2_train.parse_options([]), p2_train.parse_options(["--recipe", "report", "--steps", "9"])
    assert (ours.ema, ours.gamma, ours.floor, ours.drop_per, ours.anneal) == (0.9995, 5, 0.5, "sample", True)
    assert (report.ema, report.gamma, report.floor, report.drop_per, report.anneal) == (0.995, 0, 0, "batch", False)
    assert (ours.predicts, report.predicts) == ("velocity", "noise")
    assert (ours.size, report.size) == (28, 32)
    assert (report.batch_size, report.lr, report.steps) == (64, 3e-4, 9)
    assert (ours.optimiser, ours.lr, report.optimiser) == ("muon", 6e-4, "adamw")


def test_training_goes_on_without_metrics(digits, tmp_path, no_inception, classifier, capsys):
    classifier.unlink()
    assert train(digits, tmp_path, "--steps", 1).code == 0
    out = capsys.readouterr().out
    assert "no Fréchet distance" in out
    assert "no digit accuracy" in out


def test_wrong_training_input(digits, tmp_path, mean_inception):
    assert_user_error(train(tmp_path / "nowhere", tmp_path), tmp_path / "nowhere", "no such folder")
    assert_user_error(train(digits, tmp_path, "--drop", 1), "--drop: 1 is not a number from 0 to below 1")
    assert_user_error(train(digits, tmp_path, "--gamma", 1.0, "--floor", 2.0), "--floor 2.0 --gamma 1.0")
    assert_user_error(train(digits, tmp_path, "--dim", 6), "--dim 6", "multiple of 4")
    assert not list(tmp_path.glob("p2_*"))


def test_losses_that_are_no_numbers_end_the_run(digits, tmp_path, mean_inception):
    wrong = train(digits, tmp_path, "--lr", 1e30, "--steps", 3)
    assert_user_error(wrong, tmp_path / "p2_000", "no finite number after step 3", "lower learning rate")
    assert not list(tmp_path.glob("p2_000/*.safetensors"))
    assert not (tmp_path / "p2_000" / "state.pt").exists()


# The classifier


def test_classifier_learns_and_is_exported(digits, tmp_path, capsys):
    options = ("--data", digits, "--out", tmp_path, "--steps", 4, "--batch-size", 8, "--device", "cpu")
    assert run(classifier_train.main, *options).code == 0
    assert "of the 20 validation digits are read correctly" in capsys.readouterr().out
    network = load_classifier(tmp_path / "classifier_000" / "best.safetensors")
    assert network(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
    assert run(classifier_train.main, *options, "--bf16").code == 0
    a, b = (load_weights(tmp_path / f"classifier_00{i}" / "last.safetensors")[0]["conv1.weight"] for i in (0, 1))
    assert not torch.equal(a, b)
    assert torch.allclose(a, b, atol=0.05)


def test_one_of_several_processes_scores_the_classifier(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_train, "is_first", lambda: False)
    monkeypatch.setattr(classifier_train.ClassifierTrainer, "best_network", lambda *_: pytest.fail("scored"))
    assert run(classifier_train.main, "--data", digits, "--out", tmp_path, "--steps", 1, "--device", "cpu").code == 0


def test_the_courses_classifier_can_be_given(tmp_path):
    torch.manual_seed(1)
    network, path = Classifier(), tmp_path / "Classifier.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(load_classifier(path)(x), network(x))


def test_accuracy_of_known_predictions():
    classifier = Classifier()
    for p in classifier.parameters():
        p.data.zero_()
    classifier.fc3.bias.data[4] = 1  # reads everything as a 4
    images = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    assert accuracy(classifier, images, torch.tensor([4, 4, 4, 1])) == 75


def test_nearest_neighbours():
    random = torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=random)
    images = training[[7, 30]].clone()
    images[1] = torch.where(images[1] < 253, images[1] + 3, images[1] - 3)
    distances, rows = nearest(images, training, k=3)
    assert rows[:, 0].tolist() == [7, 30]
    assert distances[:, 0].tolist() == pytest.approx([0, 3])
    gaps = (training.float() - images[0].float()).square().mean((1, 2, 3)).sqrt().sort().values
    assert distances[0].tolist() == pytest.approx(gaps[:3].tolist())


# Generation


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, UNet_conditional(dim=4).state_dict(), {"model": "unet", "config": {"dim": 4}})
    return path


def generate(weights, out, *options: object):
    common = ("--weights", weights, "--out", out, "--device", "cpu", "--no-bf16", "--sampler", "dpm++", "--steps", 2)
    return run(p2_test.main, *common, *options)


def pictures(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_writes_the_files_the_graders_expect(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(p2_test, "solve", lambda *_, **__: torch.rand(10, 3, 28, 28))
    assert generate(weights, tmp_path / "out").code == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(f"{d}_{i:03d}.png" for d in range(10) for i in range(1, 101))
    with Image.open(tmp_path / "out" / "7_042.png") as image:
        assert (image.size, image.mode) == ((28, 28), "RGB")


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_an_image_depends_on_digit_number_and_seed_only(weights, tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(p2_test, "SLICE", 2)

    def images(name, *options):
        assert generate(weights, tmp_path / name, "--sampler", sampler, "--eta", 0.5, *options).code == 0
        return pictures(tmp_path / name)

    a = images("a", "--digits", "305", "--per-digit", 5)
    b = images("b", "--digits", "50", "--per-digit", 3)
    assert b == {name: a[name] for name in b}
    assert images("a", "--digits", "305", "--per-digit", 5) == a
    c = images("c", "--digits", "5", "--per-digit", 3, "--seed", 1)
    assert not set(a.values()) & set(c.values())
    assert len(set(a.values())) == 15


@pytest.mark.parametrize("sampler", p2_test.SAMPLERS)
def test_starts_from_the_noise_of_a_colour(sampler):
    """x_T as of an image of that colour after T steps of noise (DDPM eq. 4)."""
    device = torch.device("cpu")
    process = p2_test.Process()

    def noise():
        return [p2_test.image_generator(0, 7, number) for number in (1, 2)]

    eps = torch.stack([torch.randn(3, 28, 28, generator=g) for g in noise()])

    def start(mean):
        seen = {}
        image = p2_test.one_colour(mean, device)
        p2_test.solve(lambda x, _: x, sampler, [600, 0], noise(), device, lambda *s: seen.setdefault(*s), image=image)
        return seen[600]

    assert torch.equal(start(None), eps)
    colour = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1) * process.signal(600)
    assert torch.allclose(start((255, 127.5, 0)), colour + process.sigma(600) * eps, atol=1e-6)


def test_ancestral_sampling_repeats_itself(weights, tmp_path, monkeypatch):
    """Its noise comes from the same generators, step by step."""
    monkeypatch.setattr("p2_test.Process", lambda: Process(T=4))
    for name, count in (("a", 4), ("b", 1)):
        options = ("--weights", weights, "--out", tmp_path / name, "--device", "cpu", "--sampler", "ddpm")
        assert run(p2_test.main, *options, "--digits", 2, "--per-digit", count).code == 0
    a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert len(set(a.values())) == 4
    assert b == {"2_001.png": a["2_001.png"]}


def test_settings_without_and_with_a_sampler():
    def settings(*argv):
        o = p2_test.parse_options(["--out", "x", *argv])
        return {name: getattr(o, name) for name in p2_test.FAST}

    assert settings() == p2_test.FAST
    assert settings("--w", "1") == p2_test.FAST | {"w": 1}
    usual = {"sampler": "dpm++", "steps": 20, "power": 1, "eta": 0, "w": 2}
    usual |= {"guide": (1, 600), "rescale": 0, "mean": None, "calibrate": False}
    usual |= {"autoguide": 0, "autoguide_t": (1, 600)}
    assert settings("--sampler", "dpm++") == usual
    assert settings("--sampler", "ddpm") == usual | {"sampler": "ddpm", "steps": 600}
    assert settings("--weights", "other") == p2_test.FAST | {"autoguide": 0}
    assert settings("--weights", "other", "--autoguide", "2") == p2_test.FAST | {"autoguide": 2}
    assert settings("--weights", str(p2_test.WEIGHTS)) == p2_test.FAST


def test_the_default_sampler_starts_from_the_mean_colour_that_the_card_tells(tmp_path, monkeypatch):
    means = []

    def solve(*_, image, **__):
        means.append(None if image is None else [round(c, 1) for c in (127.5 * (image.flatten() + 1)).tolist()])
        return torch.zeros(p2_test.SLICE, 3, 28, 28)

    monkeypatch.setattr(p2_test, "solve", solve)
    torch.manual_seed(3)
    state = UNet_conditional(dim=4).state_dict()
    for name, facts in (("own", {"mean": [1.0, 2.0, 3.0]}), ("older", {})):
        save_weights(tmp_path / f"{name}.safetensors", state, {"model": "unet", "config": {"dim": 4}} | facts)
        for options in ((), ("--mean", 118.1, 119.1, 107.4), ("--sampler", "ddim")):
            common = ("--weights", tmp_path / f"{name}.safetensors", "--out", tmp_path / "out", "--device", "cpu")
            assert run(p2_test.main, *common, "--digits", 1, "--per-digit", 1, *options).code == 0
    mnistm = [118.1, 119.1, 107.4]
    assert means == [[1, 2, 3], mnistm, None, mnistm, mnistm, None]
    monkeypatch.setattr(p2_test, "WEIGHTS", tmp_path / "own.safetensors")  # the shipped ones: with their tint
    monkeypatch.setattr(p2_test, "TINT", (0.0, 10.0, -0.5))
    out = ("--out", tmp_path / "out", "--device", "cpu", "--autoguide", 0, "--digits", 1, "--per-digit", 1)
    assert run(p2_test.main, *out).code == run(p2_test.main, *out, "--mean", 4, 5, 6).code == 0
    assert means[6:] == [[1, 12, 2.5], [4, 5, 6]]


def test_mean_errors_in_the_card_are_taken_off(digits, tmp_path, mean_inception):
    """After one step an image is the prediction at t = 600: as much darker as the card says that it is too bright."""
    torch.manual_seed(3)
    network = UNet_conditional(dim=4, predicts="velocity")
    network.outc.weight.data.zero_()  # all but gray, and nothing is clamped
    network.outc.bias.data.zero_()
    card = {"model": "unet", "config": {"dim": 4, "predicts": "velocity"}}
    save_weights(tmp_path / "own.safetensors", network.state_dict(), card | {"mean_errors": {"600": [20.0, -30.0, 5]}})
    save_weights(tmp_path / "older.safetensors", network.state_dict(), card)
    made, record = {}, tmp_path / "digits.json"
    common = ("--per-digit", 1, "--steps", 1, "--w", 0, "--evaluate", digits, "--record", record)
    for name, *options in (
        ("older",),
        ("own",),
        ("own", "--no-calibrate"),
        ("own", "--sampler", "ddim"),
        ("own", "--sampler", "ddim", "--calibrate"),
    ):
        out = tmp_path / "-".join((name, *options))
        weights = tmp_path / f"{name}.safetensors"
        assert run(p2_test.main, "--weights", weights, "--out", out, *common, *options).code == 0
        made[out.name] = decode_files(sorted(out.iterdir()), 28).float().mean((0, 2, 3))
    wanted = pytest.approx([-20, 30, -5], abs=0.1)
    assert (made["own"] - made["older"]).tolist() == wanted
    assert (made["own---sampler-ddim---calibrate"] - made["own---sampler-ddim"]).tolist() == wanted
    assert torch.equal(made["own---no-calibrate"], made["older"])
    end = run(p2_test.main, "--weights", tmp_path / "older.safetensors", "--out", tmp_path / "none", "--calibrate")
    assert_user_error(end, "--calibrate", "older.safetensors tells no mean errors")
    assert not (tmp_path / "none").exists()
    told = [row["key"].get("calibrate") for row in read_results(record)]
    assert sorted(map(str, told)) == ["None"] * 3 + ["True"] * 2


def test_mean_errors_hold_at_their_own_t_only():
    table = p2_test.error_table({"100": [12.75, 0, 0], "600": [-25.5, 0, 127.5]}, T=600)
    wanted = torch.zeros(601, 3)
    wanted[100, 0], wanted[600] = 0.1, torch.tensor([-0.2, 0, 1])
    assert torch.allclose(table, wanted)


def test_settings_reach_the_sampler(weights, tmp_path, monkeypatch):
    seen = []

    def guided(network, process, y, *settings):
        seen.append((y.tolist(), *settings))
        return lambda x, t: x

    def solve(predict, sampler, steps, generators, device, **rest):
        seen.append((sampler, steps, rest))
        return torch.zeros(len(generators), 3, 28, 28)

    monkeypatch.setattr(p2_test, "guided", guided)
    monkeypatch.setattr(p2_test, "solve", solve)
    options = ("--digits", 305, "--per-digit", 2, "--sampler", "ddim", "--steps", 3, "--power", 2, "--eta", 0.3)
    options += ("--w", 1, "--guide", 100, 400, "--rescale", 0.5, "--mean", 1, 2, 3)
    assert generate(weights, tmp_path / "out", *options).code == 0
    (y, *guidance), (sampler, steps, rest) = seen
    assert y[:6] == [3, 3, 0, 0, 5, 5]
    assert guidance == [1, (100, 400), 0.5]
    assert (sampler, steps) == ("ddim", timesteps(Process(), 3, 2))
    assert torch.equal(rest.pop("image"), torch.tensor([1, 2, 3]).view(3, 1, 1) / 127.5 - 1)
    assert rest == {"eta": 0.3, "size": 28}


def test_a_worse_network_guides(weights, digits, tmp_path, mean_inception):
    """Its own predictions change nothing, those of another network do, where they are asked for; rows tell which."""
    torch.manual_seed(4)
    worse = tmp_path / "worse.safetensors"
    save_weights(worse, UNet_conditional(dim=4).state_dict(), {"model": "unet", "config": {"dim": 4}})
    record = tmp_path / "digits.json"
    guided = ("--digits", "40", "--per-digit", 2, "--w", 0, "--evaluate", digits, "--record", record, "--autoguide")
    made = {}
    for name, options in {
        "plain": (0,),
        "own": (1, "--autoguide-by", weights),
        "worse": (1, "--autoguide-by", worse),
        "early": (1, "--autoguide-by", worse, "--autoguide-t", 301, 599),  # t = 600 and 300 are taken
    }.items():
        assert generate(weights, tmp_path / name, *guided, *options).code == 0
        names = sorted(path.name for path in (tmp_path / name).iterdir())
        made[name] = decode_files([tmp_path / name / n for n in names], 28).int()
    assert (made["own"] - made["plain"]).abs().max() <= 1
    assert (made["worse"] - made["plain"]).abs().max() > 9
    assert torch.equal(made["early"], made["plain"])
    of_own, of_worse = weights_id(weights), weights_id(worse)
    wanted = [(None, None, None), (1.0, [1, 600], of_own), (1.0, [1, 600], of_worse), (1.0, [301, 599], of_worse)]
    keys = [row["key"] for row in read_results(record)]
    found = [tuple(key.get(name) for name in ("autoguide", "autoguide_t", "autoguide_by")) for key in keys]
    assert sorted(map(str, found)) == sorted(map(str, wanted))


@pytest.mark.parametrize("held_out", [False, True])
def test_from_real_digits(weights, digits, tmp_path, mean_inception, monkeypatch, held_out):
    """With t = 0 there is nothing to sample: the first training digits of each class come out as they are."""
    folds = (load_digits(digits, "train"), load_labels(digits, "train"))
    images, labels = (hold_out(x, HELD_OUT, digits)[0] if held_out else x for x in folds)
    first = torch.cat([images[labels == digit][:3] for digit in (4, 1)])
    options = ["--digits", 41, "--per-digit", 3, "--evaluate", digits, *["--held-out"] * held_out]
    record = tmp_path / "starts.json"
    assert generate(weights, tmp_path / "out", *options, "--from-real", 0, "--record", record).code == 0
    names = [f"{digit}_{number:03d}.png" for digit in (4, 1) for number in (1, 2, 3)]
    assert torch.equal(decode_files([tmp_path / "out" / name for name in names], 28), first)
    (row,) = read_results(record)
    assert row["key"]["from_real"] == 0
    seen, solve = [], p2_test.solve

    def watched(predict, sampler, steps, *rest, image, **settings):
        seen.append((steps, image))
        return solve(predict, sampler, steps, *rest, image=image, **settings)

    monkeypatch.setattr(p2_test, "solve", watched)
    options += ["--sampler", "ddim", "--steps", 6, "--from-real", 250]
    assert generate(weights, tmp_path / "out", *options).code == 0
    ((steps, image),) = seen
    assert steps == [250, 200, 100, 0]
    assert torch.equal(image[:6], normalise(first))


def test_figures(weights, tmp_path, monkeypatch):
    """The trajectory begins with the noise and ends with the image that ancestral sampling makes of it."""
    monkeypatch.setattr("p2_test.FIGURE_T", (0, 1, 4))
    monkeypatch.setattr("p2_test.Process", lambda: Process(T=4))
    drawn, draw = [], p2_test.plot_images
    monkeypatch.setattr(p2_test, "plot_images", lambda *words, columns: drawn.append(words) or draw(*words, columns))
    grid, strip = tmp_path / "f" / "grid.png", tmp_path / "g" / "strip.png"
    options = ("--digits", "41", "--per-digit", 3, "--grid", grid, "--trajectory", strip, "--seed", 5)
    assert generate(weights, tmp_path / "out", *options, "--sampler", "ddpm", "--steps", 4).code == 0
    ((panels, titles, _),) = drawn
    assert titles == ["t = 0", "t = 1", "t = 4"]
    noise = torch.randn(1, 3, 28, 28, generator=p2_test.image_generator(5, 4, 1))
    assert torch.equal(panels[0], to_uint8(noise)[0])
    (last,) = decode_files([tmp_path / "out" / "4_001.png"], 28)
    assert (panels[2].int() - last.int()).abs().max() <= 1  # another size of the batch
    one_step, all_steps = ((panel.float() - panels[0].float()).abs().mean() for panel in panels[1:])
    assert one_step < all_steps
    with Image.open(grid) as image:
        assert image.size == (3 * 30 + 2, 2 * 30 + 2)
        fifth = np.asarray(image)[32:60, 32:60]
    with Image.open(tmp_path / "out" / "1_002.png") as image:
        assert np.array_equal(fifth, np.asarray(image))
    with Image.open(strip) as image:
        assert image.size[0] > 300


def test_the_least_sure_digits_come_first(tmp_path, monkeypatch):
    seen, draw = [], p2_test.plot_images
    monkeypatch.setattr(p2_test, "plot_images", lambda *drawn, columns: seen.append(drawn) or draw(*drawn, columns))
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    p = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.3, 0.7], [0.6, 0.4, 0.0]])
    p2_test.draw_unsure(images, p, torch.tensor([0, 1, 0]), tmp_path / "new" / "unsure.png")
    ((sheet, titles, path),) = seen
    assert sheet.flatten().tolist() == [1, 2, 0]
    assert titles == ["1 as 2\n0.30", "0 as 0\n0.60", "0 as 0\n0.90"]
    assert path.parent.is_dir()


def test_scores_come_from_the_files(weights, digits, tmp_path, mean_inception, monkeypatch, capsys):
    """Real digits in place of the generated ones score a distance of 0 and stand beside themselves."""
    from common.pictures import save_images

    real = load_digits(digits, "val")
    by_digit = real[torch.arange(20).view(2, 10).T.flatten()]
    monkeypatch.setattr(p2_test, "save_images", lambda _images, names, out: save_images(by_digit, names, out))
    truth = {image.numpy().tobytes(): i % 10 for i, image in enumerate(real)}
    read = [truth[image.numpy().tobytes()] for image in by_digit]
    monkeypatch.setattr("metrics.classify.probabilities", lambda *_: torch.eye(10)[read])
    sheet, unsure = tmp_path / "n" / "neighbours.png", tmp_path / "u" / "unsure.png"
    options = ("--per-digit", 2, "--evaluate", digits, "--neighbours", sheet, "--unsure", unsure)
    options += ("--record", tmp_path / "digits.json")
    assert generate(weights, tmp_path / "out", *options).code == 0
    out = capsys.readouterr().out
    assert "FD-48 0.0000 to 20 validation digits" in out or "FD-48 -0.0000 to 20" in out
    assert out.count("% read as") == 10
    (row,) = read_results(tmp_path / "digits.json")
    assert (row["key"]["sampler"], row["key"]["steps"], row["key"]["per_digit"]) == ("dpm++", 2, 2)
    assert row["scores"]["FD-48"] == pytest.approx(0, abs=1e-6)
    assert [row["scores"][name] for name in ("accuracy", *(f"digit_{d}" for d in range(10)))] == [100] * 11
    assert row["scores"]["nearest_least"] == row["scores"]["nearest_real_least"]
    assert [row["scores"][name] for name in COLOURS] == pytest.approx([0] * 6)
    assert "red, green, blue of samples: mean +0.0, +0.0, +0.0 %, deviation +0.0" in out
    assert row["scores"]["seconds"] >= 0
    samples, validation = (line for line in out.splitlines() if line.startswith("nearest"))
    assert samples.split(": ")[1] == validation.split(": ")[1]
    with Image.open(sheet) as image:
        assert image.size == (8 * 30 + 2, 10 * 30 + 2)
    assert unsure.is_file()


def test_the_sheet_of_neighbours(tmp_path, monkeypatch):
    """The ten images that are nearest to a training digit, nearest first, each before its nearest training digits."""
    judge, saved = object.__new__(p2_test.Judge), []
    random = torch.Generator().manual_seed(0)
    judge.what, judge.train = "real digits", torch.randint(0, 200, (30, 3, 28, 28), dtype=torch.uint8, generator=random)
    judge.real = judge.train[:2]
    gaps = torch.randperm(12, generator=random) + 1
    images = judge.train[:12] + gaps.to(torch.uint8).view(12, 1, 1, 1)
    monkeypatch.setattr(p2_test, "save_png", lambda *_: None)
    monkeypatch.setattr(p2_test, "sheet", lambda pictures, columns: saved.append(pictures.unflatten(0, (-1, columns))))
    scores = judge.nearest(images, tmp_path / "sheet.png")
    assert (scores["nearest_least"], scores["nearest_real_least"]) == (pytest.approx(1), 0)
    ((rows),) = saved
    order = gaps.argsort()[:10]
    assert rows.shape[:2] == (10, 8)
    assert torch.equal(rows[:, 0], images[order])
    assert torch.equal(rows[:, 1], judge.train[order])


def test_the_size_of_the_features_can_be_given(weights, digits, tmp_path, monkeypatch):
    asked = []

    class Watched(MeanInception):
        def __init__(self, device, dims=None, also=()):
            asked.append((dims, also))

    monkeypatch.setattr("metrics.frechet.Inception", Watched)
    for more in ((), ("--dims", 768)):
        assert generate(weights, tmp_path, "--per-digit", 1, "--evaluate", digits, *more).code == 0
    assert asked == [(None, (64, 192)), (768, (64, 192))]


def test_no_image_is_written_among_others(weights, digits, tmp_path, mean_inception):
    outcome = generate(weights, digits / "data", "--per-digit", 1, "--evaluate", digits)
    assert_user_error(outcome, digits / "data", "choose another place")
    assert not list(digits.rglob("0_001.png"))
    out = tmp_path / "out"
    assert_user_error(generate(weights, out, "--grid", out / "grid.png"), out / "grid.png", "choose another place")
    assert not out.exists()


def test_one_real_digit_is_not_enough(weights, digits, tmp_path, mean_inception):
    root = tmp_path / "one"
    shutil.copytree(digits, root)
    (root / "val.csv").write_text("".join((root / "val.csv").read_text().splitlines(keepends=True)[:2]))
    assert_user_error(generate(weights, tmp_path / "out", "--evaluate", root), root, "at least 2")
    shutil.copy(digits / "val.csv", root)
    (root / "train.csv").write_text("".join((root / "train.csv").read_text().splitlines(keepends=True)[:7]))
    assert_user_error(generate(weights, tmp_path / "out", "--evaluate", root), root, "6 training digits")
    assert not (tmp_path / "out").exists()


def test_a_sampler_can_be_chosen_without_validation_digits(weights, digits, tmp_path, mean_inception, capsys):
    root = tmp_path / "train_only"
    shutil.copytree(digits, root)
    (root / "val.csv").unlink()
    options = ("--per-digit", 1, "--evaluate", root, "--record", tmp_path / "samplers.json")
    assert_user_error(generate(weights, tmp_path / "out", *options), root / "val.csv")
    assert generate(weights, tmp_path / "out", *options, "--held-out").code == 0
    (row,) = read_results(tmp_path / "samplers.json")
    assert row["key"]["scored"] == "held-out"
    held_out = len(load_digits(root, "train")) // 10
    assert f"to {held_out} held-out training digits (training digits" in capsys.readouterr().out
    outcome = generate(weights, tmp_path / "out", *options, "--held-out", "--from-real", 5, "--per-digit", 999)
    assert_user_error(outcome, "--per-digit 999", root)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--w", -2), "--w -2.0"),
        (("--w", "nan"), "--w nan"),
        (("--steps", 601), "--steps 601"),
        (("--power", 0.5), "--power 0.5"),
        (("--power", "nan"), "--power nan"),
        (("--eta", 1.5), "--eta 1.5"),
        (("--sampler", "ddpm", "--steps", 600, "--eta", 0.5), "--eta 0.5"),
        (("--guide", 400, 100), "--guide 400 100"),
        (("--guide", 1, 601), "--guide 1 601"),
        (("--rescale", 1.5), "--rescale 1.5"),
        (("--rescale", "nan"), "--rescale nan"),
        (("--autoguide", -1), "--autoguide -1"),
        (("--autoguide", "nan"), "--autoguide nan"),
        (("--autoguide", 1, "--autoguide-t", 9, 0), "--autoguide-t 9 0"),
        (("--autoguide-by", "x"), "--autoguide-by x"),
        (("--autoguide-t", 1, 9), "--autoguide-t 1 9: is not used"),
        (("--mean", 0, 0, 256), "--mean 0.0 0.0 256.0"),
        (("--sampler", "ddpm"), "--steps 2"),
        (("--sampler", "ddpm", "--steps", 600, "--power", 2), "--power 2"),
        (("--evaluate", "x", "--record", "x.json", "--classifier", "c.pth"), "--classifier c.pth"),
        (("--digits", "3a"), "--digits 3a"),
        (("--digits", "33"), "--digits 33"),
        (("--neighbours", "x.png"), "--neighbours"),
        (("--unsure", "x.png"), "--unsure"),
        (("--held-out",), "--held-out"),
        (("--from-real", 0), "--from-real: needs scores"),
        (("--from-real", 601), "--from-real 601"),
        (("--from-real", 9, "--sampler", "ddpm", "--steps", 600), "--from-real 9"),
        (("--dims", 768), "--dims"),
        (("--record", "x.json"), "--record"),
    ],
)
def test_wrong_options(weights, tmp_path, options, part):
    assert_user_error(generate(weights, tmp_path / "out", *options), part)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_known_before_generating(weights, monkeypatch):
    monkeypatch.setattr(p2_test, "generate", lambda *_, **__: pytest.fail("generated first"))
    assert_user_error(generate(weights, "/proc/digits"), "/proc")


def test_wrong_files(weights, digits, tmp_path, mean_inception):
    out = tmp_path / "out"
    assert_user_error(generate(tmp_path / "none.safetensors", out), "none.safetensors", "no such weight file")
    foreign = tmp_path / "foreign.safetensors"
    save_weights(foreign, Classifier().state_dict(), {"model": "classifier", "config": {}})
    assert_user_error(generate(foreign, out), foreign, "'classifier'")
    large = tmp_path / "large.safetensors"
    save_weights(large, UNet_conditional(dim=4).state_dict(), {"model": "unet", "config": {"dim": 4, "size": 32}})
    for worse, part in ((foreign, "'classifier'"), (tmp_path / "gone", "no such weight file"), (large, "32x32")):
        assert_user_error(generate(weights, out, "--autoguide", 1, "--autoguide-by", worse), worse, part)
    assert_user_error(generate(weights, out, "--evaluate", tmp_path / "none"), tmp_path / "none")
    bad = tmp_path / "Classifier.pth"
    for content in ({"state_dict": {"fc.weight": torch.zeros(2)}}, {"model": 1}, [1]):
        torch.save(content, bad)
        assert_user_error(generate(weights, out, "--evaluate", digits, "--classifier", bad), bad, "state_dict")
    bad.write_text("text")
    assert_user_error(generate(weights, out, "--evaluate", digits, "--classifier", bad), bad)
    assert_user_error(generate(weights, out, "--evaluate", digits, "--classifier", tmp_path / "no.pth"), "no.pth")
    assert not out.exists()

"""Problem 1, end to end on tiny data: training, resuming, generating, scoring, and what a user can get wrong."""

import csv
import errno
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import p1_test
import p1_train
from common import trainer
from common.checkpoint import load_state, load_weights, save_state, save_weights
from common.ema import reestimate_batch_norm
from common.pictures import plot_curves
from common.results import read_results, weights_id
from models import dcgan, sngan
from tests.helpers import MeanInception, assert_user_error, run, smooth_images, write_pngs

TINY = ("--dim", 2, "--batch-size", 8, "--eval-images", 6, "--device", "cpu", "--no-bf16")
CPU = torch.device("cpu")


def open_image(path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def train(faces, out, *options: object):
    return run(p1_train.main, "--data", faces, "--out", out, *TINY, *options)


def test_losses_are_those_of_the_papers():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert p1_train.discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 + 0.75)
    assert p1_train.generator_loss(fake, "hinge").item() == pytest.approx(1.25)
    bce, one, zero = nn.BCEWithLogitsLoss(), torch.ones(2), torch.zeros(2)
    expected = bce(real, one) + bce(fake, zero)
    assert p1_train.discriminator_loss(real, fake, "logistic").item() == pytest.approx(expected.item())
    assert p1_train.generator_loss(fake, "logistic").item() == pytest.approx(bce(fake, one).item())


class Linear(nn.Module):
    """Logits w . x of an image x: the gradient is w, everywhere."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((3, 64, 64), 0.02))

    def logits(self, x):
        return (x * self.w).sum((1, 2, 3))


def test_gradient_penalty_is_that_of_a_linear_discriminator():
    linear = Linear()
    penalty = p1_train.gradient_penalty(linear, torch.randn(5, 3, 64, 64))
    assert penalty.item() == pytest.approx(0.02**2 * 3 * 64 * 64, rel=1e-5)
    penalty.backward()
    assert torch.allclose(linear.w.grad, 2 * linear.w)


@pytest.mark.parametrize("model", ["sngan", "dcgan"])
def test_gradient_penalty_makes_the_discriminator_flatter_every_16th_step(model):
    """The same step with it and without it: another discriminator in step 0, whose logits change less with the image,
    and the same one in step 1. What is reported of the loss is without it."""

    def one_step(step: int, r1: float):
        o = p1_train.parse_options(["--model", model, "--dim", "2", "--batch-size", "8", "--r1", str(r1)])
        o.bf16 = False
        nets = p1_train.Networks(o, CPU)
        images = torch.randint(0, 256, (32, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        losses = p1_train.train_step(nets, images, step, 1.0, o)
        steepness = p1_train.gradient_penalty(nets.discriminator, p1_train.normalise(images)).item()
        return losses[0].item(), steepness

    (plain_loss, plain), (loss, flatter) = one_step(0, 0), one_step(0, 1000)
    assert loss == plain_loss
    assert flatter < plain
    assert one_step(1, 1000) == one_step(1, 0)


@pytest.mark.parametrize("model", ["sngan", "dcgan"])
def test_one_step_moves_everything_the_right_way(model):
    """The fakes are not detached in the generator step: the generator moves, and to where the logits are higher."""
    o = p1_train.parse_options(["--model", model, "--dim", "4", "--batch-size", "32"])
    o.bf16 = False
    nets = p1_train.Networks(o, CPU)
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    before = {
        k: [p.clone() for p in part.parameters()] for k, part in nets.parts.items() if isinstance(part, nn.Module)
    }
    losses = p1_train.train_step(nets, images, 0, 1.0, o)
    assert losses.isfinite().all()
    for name in ("generator", "discriminator"):
        for old, new in zip(before[name], nets.parts[name].parameters(), strict=True):
            # inside the hinge's margin, what real and generated images do to the last bias cancels
            assert old.numel() == 1 or not torch.equal(old, new)
            assert new.requires_grad

    o.lr_g, margins = 0.0, []
    for step in range(1, 9):
        _, _, d_real, d_fake = p1_train.train_step(nets, images, step, 1.0, o).tolist()
        margins.append(d_real - d_fake)
    assert margins[-1] > max(margins[0], 0)  # the discriminator learns which are which
    o.lr_g = 2e-4

    fixed = torch.randn(64, 100)
    discriminator = nets.discriminator.eval()
    o.lr_d, scores = 0.0, []
    for step in range(12):
        with torch.no_grad():
            scores.append(discriminator.logits(nets.generator(fixed)).mean().item())
        p1_train.train_step(nets, images, step, 1.0, o)
    assert scores[-1] > scores[0]


@pytest.mark.parametrize("model", [dcgan, sngan])
def test_each_kind_of_image_is_judged_by_itself(model):
    """The logits of generated images are those they have alone, whatever the real images are."""
    torch.manual_seed(0)
    discriminator = model.Discriminator(dim=2)
    if model is sngan:
        discriminator.eval()  # no power iteration between the calls
    real, fake = torch.randn(2, 5, 3, 64, 64)
    of_real, of_fake = p1_train.both_logits(discriminator, real, fake)
    assert of_real.std() > 0 and of_fake.std() > 0
    assert torch.allclose(of_real, discriminator.logits(real), atol=1e-6)
    assert torch.allclose(of_fake, discriminator.logits(fake), atol=1e-6)


def test_batch_norm_statistics_of_the_average():
    """After re-estimation, each batch norm sees inputs of mean 0 and variance 1 for its own statistics."""
    torch.manual_seed(0)
    generator = dcgan.Generator(dim=2)
    for p in generator.parameters():
        p.data += 0.05 * torch.randn_like(p)
    reestimate_batch_norm(generator, p1_train.noise_batches(100, CPU, batches=10, size=50))
    assert not generator.training
    seen = []
    norm = generator.l2_5[1][1]
    norm.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    z = torch.cat([p1_train.noise(-1, range(500), 100)])
    with torch.no_grad():
        generator(z)
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(norm.running_var, seen[0].var((0, 2, 3)), rtol=0.05)
    assert norm.momentum == 0.1


@pytest.fixture(autouse=True)
def _few_batches_of_noise(monkeypatch):
    noise_batches = p1_train.noise_batches
    monkeypatch.setattr(p1_train, "noise_batches", lambda *a, **k: noise_batches(*a, **{"batches": 2} | k))


def test_training_writes_a_complete_run(faces, tmp_path, mean_inception, monkeypatch):
    monkeypatch.setattr(trainer, "plot_curves", plot_curves)
    results = tmp_path / "results" / "recipes.json"
    options = ("--steps", 6, "--anneal", "--sample-every", 2, "--eval-every", 4, "--record", results)
    assert train(faces, tmp_path, *options).code == 0
    run_folder = tmp_path / "p1_sngan_000"
    assert sorted(p.name for p in (run_folder / "samples").iterdir()) == ["0000002.png", "0000004.png", "0000006.png"]
    assert open_image(run_folder / "samples" / "0000006.png").size == (530, 530)
    assert open_image(run_folder / "curves.png").size[0] > 400
    rows = list(csv.DictReader((run_folder / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert [bool(row["fd"]) for row in rows] == [False, True, True]
    assert float(rows[-1]["lr_factor"]) == pytest.approx(1 / 3, rel=1e-4)
    _, card = load_weights(run_folder / "best.safetensors")
    assert card["held_out_scores"]["fd"] == pytest.approx(min(float(r["fd"]) for r in rows if r["fd"]), rel=1e-3)
    assert card["steps"] in (4, 6)
    assert card["config"] == {"z_dim": 100, "dim": 2}
    assert "--steps 6" in card["command"]
    assert card["options"]["lr_d"] == 4e-4
    (row,) = read_results(results)  # the last scores, not the best
    assert row["key"] == {"training": card["command"]}
    assert row["scores"]["fd"] == pytest.approx(float(rows[-1]["fd"]), rel=1e-3)
    assert row["weights"] == weights_id(run_folder / "last.safetensors")


def losses(folder) -> list[tuple[str, ...]]:
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [tuple(row[name] for name in ("step", *p1_train.FaceTrainer.losses)) for row in rows]


@pytest.mark.parametrize("model", ["sngan", "dcgan"])
def test_resume_is_bit_equal(faces, tmp_path, mean_inception, monkeypatch, model):
    """Uninterrupted, against stopped by Ctrl-C in step 3 and killed in step 6, after a row of metrics.csv that is
    written again: the last save is that of step 3."""
    options = ("--model", model, "--steps", 6, "--eval-every", 2, "--augment", "color,translation,cutout")
    assert train(faces, tmp_path / "a", *options).code == 0

    update = p1_train.FaceTrainer.update

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    def killed(self):
        if self.step == 5:
            raise RuntimeError("killed")
        return update(self)

    monkeypatch.setattr(p1_train.FaceTrainer, "update", interrupted)
    assert train(faces, tmp_path / "b", *options).code == 130
    name = f"p1_{model}_000"
    assert load_state(tmp_path / "b" / name / "state.pt")["step"] == 3
    monkeypatch.setattr(p1_train.FaceTrainer, "update", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(p1_train.main, "--resume", tmp_path / "b" / name)
    assert load_state(tmp_path / "b" / name / "state.pt")["step"] == 3
    assert [step for step, *_ in losses(tmp_path / "b" / name)] == ["2", "4"]
    monkeypatch.setattr(p1_train.FaceTrainer, "update", update)
    assert run(p1_train.main, "--resume", tmp_path / "b" / name).code == 0

    a, b = (load_state(tmp_path / x / name / "state.pt") for x in "ab")
    assert a["step"] == b["step"] == 6
    for part in ("generator", "discriminator", "average"):
        for key, tensor in a["parts"][part].items():
            assert torch.equal(tensor, b["parts"][part][key]), (part, key)
    for x in (a, b):
        assert x["best"] == a["best"]
    assert losses(tmp_path / "a" / name) == losses(tmp_path / "b" / name)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error")])
def test_a_run_is_saved_when_its_output_is_cut_off_or_its_last_evaluation_killed(
    faces, tmp_path, mean_inception, monkeypatch, error
):
    def report(self, bar):
        if self.step == 2:
            raise error

    def evaluate(self):
        raise KeyboardInterrupt

    name = "p1_sngan_000"
    with monkeypatch.context() as patch:
        patch.setattr(p1_train.FaceTrainer, "report", report)
        patch.setattr("sys.argv", ["p1_train.py"])
        with pytest.raises(type(error)):
            words = map(str, ("--data", faces, "--out", tmp_path / "a", *TINY, "--steps", 4))
            p1_train.FaceTrainer(p1_train.parse_options(list(words))).train()
    assert load_state(tmp_path / "a" / name / "state.pt")["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(p1_train.FaceTrainer, "evaluate", evaluate)
        assert train(faces, tmp_path / "b", "--steps", 4).code == 130
    assert load_state(tmp_path / "b" / name / "state.pt")["step"] == 4
    for folder in ("a", "b"):
        assert run(p1_train.main, "--resume", tmp_path / folder / name).code == 0
        assert (tmp_path / folder / name / "best.safetensors").is_file()


@pytest.mark.parametrize("name", ["best", "last"])
def test_deleted_weights_are_written_again(faces, tmp_path, mean_inception, name):
    assert train(faces, tmp_path, "--steps", 2).code == 0
    path = tmp_path / "p1_sngan_000" / f"{name}.safetensors"
    path.unlink()
    assert run(p1_train.main, "--resume", path.parent).code == 0
    assert path.is_file()


def test_the_line_that_tells_how_to_go_on(faces, tmp_path, mean_inception, monkeypatch, capsys):
    """It goes on with what was given on resume: data that has moved, another budget, a file for the scores."""
    update = p1_train.FaceTrainer.update

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    def told() -> list[str]:
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped at step"))
        return shlex.split(line.partition("go on with: ")[2])

    data, moved, results = tmp_path / "data", tmp_path / "moved", tmp_path / "r.json"
    shutil.copytree(faces, data)
    monkeypatch.setattr(p1_train.FaceTrainer, "update", interrupted)
    assert train(data, tmp_path / "my runs", "--steps", 9).code == 130
    folder = tmp_path / "my runs" / "p1_sngan_000"
    assert told() == ["python3", "p1_train.py", "--resume", str(folder)]
    data.rename(moved)
    words = ("--resume", folder, "--data", moved, "--steps", 3, "--record", results)
    assert run(p1_train.main, *words).code == 130
    monkeypatch.setattr(p1_train.FaceTrainer, "update", update)
    assert run(p1_train.main, *told()[2:]).code == 0
    (row,) = read_results(results)
    assert row["key"]["training"].endswith("--steps 9")
    assert row["key"]["budget"] == {"steps": 3, "max_minutes": None}  # apart from runs of the first budget
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trainer.Run(folder).resume_command().startswith("torchrun --standalone --nproc-per-node 2 ")


def test_resume_refuses_other_options_and_other_data(faces, tmp_path, mean_inception):
    assert train(faces, tmp_path, "--steps", 2).code == 0
    folder = tmp_path / "p1_sngan_000"
    outcome = run(p1_train.main, "--resume", folder, "--lr-d", 1e-3, "--no-flip")
    assert_user_error(outcome, "--flip (run True, given False)", "--lr-d (run 0.0004, given 0.001)")
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    for i, path in enumerate(sorted((faces / "train").iterdir())[1:]):
        (other / "train" / f"{i}.png").write_bytes(path.read_bytes())
    before = (folder / "options.json").read_text()
    assert_user_error(run(p1_train.main, "--resume", folder, "--data", other, "--steps", 9), other, "--data")
    assert (folder / "options.json").read_text() == before
    assert train(faces, tmp_path, "--steps", 1, "--eval-images", 0).code == 0
    unscored = run(p1_train.main, "--resume", tmp_path / "p1_sngan_001", "--record", tmp_path / "r.json")
    assert_user_error(unscored, "--record", "leave it out")
    state = load_state(folder / "state.pt")
    del state["parts"]["opt_d"]
    save_state(folder / "state.pt", state)
    assert_user_error(run(p1_train.main, "--resume", folder), folder / "state.pt", "another version")
    assert_user_error(run(p1_train.main, "--resume", tmp_path), tmp_path / "options.json")


def test_a_budget_used_up_by_an_evaluation_still_ends_with_a_save(faces, tmp_path, monkeypatch):
    def evaluate(self):
        self.budget.started -= 3600
        return {"fd": 1.0}

    monkeypatch.setattr(p1_train.FaceTrainer, "evaluate", evaluate)
    assert train(faces, tmp_path, "--max-minutes", 50, "--eval-every", 2, "--eval-images", 0).code == 0
    folder = tmp_path / "p1_sngan_000"
    assert load_state(folder / "state.pt")["step"] == 2
    assert load_weights(folder / "last.safetensors")[1]["steps"] == 2


def test_a_process_ends_silently_when_the_first_one_fails(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "agree", lambda *_: [0.0, False, True])
    outcome = train(faces, tmp_path, "--steps", 9, "--eval-images", 0)
    assert (outcome.code, outcome.error) == (1, "")


def test_the_discriminators_victory_is_announced(faces, tmp_path, monkeypatch, capsys):
    def update(self):
        return torch.tensor([0.001, 9.0, 1.0, 0.0])

    monkeypatch.setattr(p1_train.FaceTrainer, "update", update)
    assert train(faces, tmp_path, "--steps", 600, "--eval-images", 0).code == 0
    assert capsys.readouterr().out.count("warning: step 500: the discriminator has won") == 1


def test_training_goes_on_without_inception_weights(faces, tmp_path, no_inception, capsys):
    results = tmp_path / "recipes.json"
    assert_user_error(train(faces, tmp_path, "--steps", 1, "--record", results), results, "no row", "fd")
    assert not results.exists()
    assert "no Fréchet distance" in capsys.readouterr().out
    _, card = load_weights(tmp_path / "p1_sngan_000" / "best.safetensors")
    assert set(card["held_out_scores"]) == {"faces"}


def test_processes_augment_generated_images_differently(monkeypatch):
    """And real images, which they share, alike."""
    monkeypatch.setattr(p1_train, "processes", lambda: 2)
    monkeypatch.setattr(trainer, "average_gradients", lambda _: None)
    drawn = []

    def augment(x, policy, random):
        drawn.append(torch.rand(3, generator=random).tolist())
        return x

    monkeypatch.setattr(p1_train, "diff_augment", augment)
    o = p1_train.parse_options(["--dim", "2", "--batch-size", "4", "--no-bf16"])
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    for rank in (0, 1):
        monkeypatch.setattr(p1_train, "rank", lambda rank=rank: rank)
        p1_train.train_step(p1_train.Networks(o, CPU), images, 0, 1.0, o)
    (real_0, fake_0), (real_1, fake_1) = drawn[:2], drawn[2:]
    assert real_0 == real_1
    assert fake_0 != fake_1


def test_recipes():
    ours = p1_train.parse_options([])
    assert (ours.loss, ours.ema, ours.flip, ours.anneal) == ("hinge", 0.999, True, False)
    ours = p1_train.parse_options(["--model", "dcgan"])
    assert (ours.loss, ours.ema, ours.ema_power, ours.r1, ours.anneal) == ("logistic", 0.9999, 3, 0.005, False)
    assert p1_train.parse_options(["--model", "dcgan", "--r1", "0"]).r1 == 0
    report = p1_train.parse_options(["--recipe", "report", "--steps", "10"])
    assert (report.loss, report.ema, report.r1, report.lr_d, report.steps) == ("logistic", 0, 0, 2e-4, 10)
    assert report.augment == "color,translation,cutout"
    # 38,464 images in batches of 64: 601 updates an epoch
    assert p1_train.parse_options(["--model", "dcgan", "--recipe", "report"]).steps == 100 * 601


@pytest.mark.parametrize("recipe", ["ours", "report"])
@pytest.mark.parametrize("model", ["sngan", "dcgan"])
def test_options_reach_the_update(monkeypatch, model, recipe):
    """Of the real images and of the generated ones, of the discriminator and of the generator."""
    flips, policies, kinds = [], [], []

    def watched(name: str, seen: list) -> None:
        function = getattr(p1_train, name)
        monkeypatch.setattr(p1_train, name, lambda *words: seen.append(words) or function(*words))

    for name, seen in (("random_flip", flips), ("diff_augment", policies)):
        watched(name, seen)
    for name in ("discriminator_loss", "generator_loss"):
        watched(name, kinds)
    o = p1_train.parse_options(["--model", model, "--recipe", recipe, "--dim", "2", "--batch-size", "4"])
    o.bf16 = False
    nets = p1_train.Networks(o, CPU)
    p1_train.train_step(nets, torch.zeros(8, 3, 64, 64, dtype=torch.uint8), 0, 0.5, o)
    assert len(flips) == o.flip
    assert [policy for _, policy, _ in policies] == [o.augment] * 2
    assert [words[-1] for words in kinds] == [o.loss] * 2
    for optimiser, lr in ((nets.opt_g, o.lr_g), (nets.opt_d, o.lr_d)):
        assert optimiser.param_groups[0]["lr"] == lr / 2
        assert optimiser.defaults["betas"] == (0.5, 0.999)


def test_wrong_training_input(faces, tmp_path, mean_inception):
    assert_user_error(train(tmp_path / "nowhere", tmp_path), tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert_user_error(train(tmp_path / "empty", tmp_path), tmp_path / "empty", "no images")
    assert_user_error(train(faces, tmp_path, "--augment", "colour"), "colour", "color, translation, cutout")
    file = tmp_path / "file"
    file.write_text("")
    assert_user_error(train(faces, file), file)
    assert_user_error(
        train(faces, tmp_path, "--record", tmp_path / "r", "--eval-images", 0), "--record", "--eval-images"
    )
    assert not list(tmp_path.glob("p1_*"))


# Generation


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    generator = dcgan.Generator(dim=2)
    reestimate_batch_norm(generator, p1_train.noise_batches(100, CPU, batches=2))
    save_weights(path, generator.state_dict(), {"model": "sngan", "config": {"z_dim": 100, "dim": 2}})
    return path


def pictures(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_generates_the_files_the_graders_expect(weights, tmp_path):
    out = tmp_path / "new" / "faces"
    assert run(p1_test.main, "--weights", weights, "--out", out).code == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"{i:04d}.png" for i in range(1, 1001)]
    for name in names[::100]:
        image = open_image(out / name)
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_a_face_depends_on_weights_seed_and_number_only(weights, tmp_path):
    for name, count, seed in (("a", 60, 0), ("b", 7, 0), ("c", 7, 1)):
        assert (
            run(p1_test.main, "--weights", weights, "--out", tmp_path / name, "--count", count, "--seed", seed).code
            == 0
        )
    a, b, c = (pictures(tmp_path / x) for x in "abc")
    assert b == {name: a[name] for name in b}
    assert not set(b.values()) & set(c.values())
    assert run(p1_test.main, "--weights", weights, "--out", tmp_path / "a", "--count", 60).code == 0
    assert pictures(tmp_path / "a") == a


def test_sheet_of_the_first_32(weights, tmp_path):
    sheet = tmp_path / "figures" / "sheet.png"
    assert run(p1_test.main, "--weights", weights, "--out", tmp_path / "out", "--count", 40, "--sheet", sheet).code == 0
    picture = np.asarray(open_image(sheet))
    assert picture.shape == (4 * 66 + 2, 8 * 66 + 2, 3)
    ninth = np.asarray(open_image(tmp_path / "out" / "0009.png"))
    assert np.array_equal(picture[68:132, 2:66], ninth)


def test_scores_come_from_the_files(weights, faces, tmp_path, mean_inception, monkeypatch, capsys):
    """Real images in place of the generated ones score a distance of 0: what is scored is what lies on disk."""
    from common.pictures import save_images
    from datasets.faces import load_reference

    real = load_reference(faces)
    monkeypatch.setattr(p1_test, "save_images", lambda _images, names, out: save_images(real, names, out))
    options = ("--weights", weights, "--out", tmp_path / "out", "--count", len(real), "--evaluate", faces / "val")
    assert run(p1_test.main, *options, "--record", tmp_path / "r" / "faces.json").code == 0
    (row,) = read_results(tmp_path / "r" / "faces.json")
    assert row["key"] == {"weights": weights.stem, "images": 12, "seed": 0}
    assert row["scores"] == {"FD-48": pytest.approx(0, abs=1e-6), "faces": 0}
    out = capsys.readouterr().out
    assert f"FD-48 0.0000: 12 images against 12 of {faces / 'val'}" in out or "FD-48 -0.0000" in out
    assert "faces 0.0 %" in out


def test_the_size_of_the_features_can_be_given(weights, faces, tmp_path, monkeypatch):
    """So that FD-768 can be had where FID can."""
    asked = []

    class Watched(MeanInception):
        def __init__(self, device, dims=None, also=()):
            asked.append(dims)

    monkeypatch.setattr("metrics.frechet.Inception", Watched)
    options = ("--weights", weights, "--out", tmp_path, "--count", 2)
    for more in ((), ("--dims", 768)):
        assert run(p1_test.main, *options, "--evaluate", faces, *more).code == 0
    assert asked == [None, 768]
    assert_user_error(run(p1_test.main, *options, "--dims", 768), "--dims", "--evaluate")


def test_no_image_is_written_among_others(weights, faces, tmp_path):
    for out in (faces, faces / "val"):
        outcome = run(p1_test.main, "--weights", weights, "--out", out, "--count", 2, "--evaluate", faces)
        assert_user_error(outcome, out, "choose another place")
    assert not list(faces.rglob("0001.png"))
    out = tmp_path / "out"
    outcome = run(p1_test.main, "--weights", weights, "--out", out, "--count", 2, "--sheet", out / "0001.png")
    assert_user_error(outcome, out / "0001.png", "choose another place")
    assert not out.exists()


def test_wrong_weights(weights, tmp_path):
    out = tmp_path / "out"

    def generate(path):
        return run(p1_test.main, "--weights", path, "--out", out)

    assert_user_error(generate(tmp_path / "none.safetensors"), "none.safetensors", "no such weight file")
    data = weights.read_bytes()
    copy = tmp_path / "w.safetensors"
    (tmp_path / "SHA256SUMS").write_bytes((weights.parent / "SHA256SUMS").read_bytes())
    for damaged in (data[: len(data) // 2], data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]):
        copy.write_bytes(damaged)
        assert_user_error(generate(copy), copy, "damaged")
    foreign = tmp_path / "foreign.safetensors"
    save_weights(
        foreign, sngan.Discriminator(dim=2).state_dict(), {"model": "sngan", "config": {"z_dim": 100, "dim": 2}}
    )
    assert_user_error(generate(foreign), foreign, "do not fit")
    assert not out.exists()


def test_missing_weights_are_named_before_anything_is_scored(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(p1_test, "Judge", lambda *_: pytest.fail("read the data first"))
    options = ("--out", tmp_path / "out", "--evaluate", faces, "--weights", tmp_path / "none.safetensors")
    assert_user_error(run(p1_test.main, *options), "none.safetensors", "no such weight file")


def test_wrong_output_folder(weights, tmp_path):
    file = tmp_path / "file"
    file.write_text("keep me")
    assert_user_error(run(p1_test.main, "--weights", weights, "--out", file), file)
    assert_user_error(run(p1_test.main, "--weights", weights, "--out", file / "below"), file)
    assert file.read_text() == "keep me"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to")
def test_unwritable_output_folder(weights):
    assert_user_error(
        run(p1_test.main, "--weights", weights, "--out", "/proc/self/faces"), "/proc/self/faces", "choose another"
    )


def test_scoring_fails_before_anything_is_written(weights, faces, tmp_path, no_inception):
    out = tmp_path / "out"

    def evaluate(real):
        return run(p1_test.main, "--weights", weights, "--out", out, "--evaluate", real)

    assert_user_error(evaluate(tmp_path / "none"), tmp_path / "none")
    assert_user_error(evaluate(faces / "val"), "Inception", "TORCH_HOME")
    write_pngs(tmp_path / "one", smooth_images(1, 64))
    assert_user_error(evaluate(tmp_path / "one"), tmp_path / "one", "at least 2")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in sorted((faces / "val").glob("*.png")):
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "00003.png").write_bytes((broken / "00003.png").read_bytes()[:70])
    (broken / "00005.png").write_text("text")
    assert_user_error(evaluate(broken), broken / "00003.png", broken / "00005.png")
    assert not out.exists()


def test_real_faces_take_the_same_way(faces, tmp_path, mean_inception, capsys):
    from datasets.faces import load_faces
    from datasets.images import decode_files

    options = ("--out", tmp_path / "out", "--count", 5, "--evaluate", faces, "--real")
    assert run(p1_test.main, *options, "--record", tmp_path / "faces.json").code == 0
    paths = sorted((tmp_path / "out").iterdir())
    assert torch.equal(decode_files(paths, 64), load_faces(faces, "train")[:5])
    (row,) = read_results(tmp_path / "faces.json")
    assert (row["key"]["weights"], row["weights"]) == ("real", "none")
    assert_user_error(run(p1_test.main, "--out", tmp_path / "o", "--evaluate", faces, "--real"), faces, "--count 1000")
    assert_user_error(run(p1_test.main, "--out", tmp_path / "o", "--real"), "--evaluate")
    assert_user_error(run(p1_test.main, *options, "--seed", 1), "--real", "leave out --seed")

"""Problem 3, inference: labels for a folder, how the domain is found, scores, plots, wrong input."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p3_test
from common.checkpoint import load_network, save_weights
from common.ema import reestimate_batch_norm
from common.results import read_results
from datasets.augment import digit_input
from datasets.digits import load_digits, load_labels
from models.dann import NETWORKS, Dann
from tests.helpers import assert_user_error, run, smooth_images, write_index, write_pngs

OPTIONS = {"size": 32, "standardise": True, "gray": False, "separate": True}
CARD = {"model": "dann", "config": {"dim": 2}, "command": "python3 p3_train.py --seed 4", "minutes": 9.5}
CARD["held_out_scores"] = {"validator": -1.5}
CARD["options"] = OPTIONS | {"method": "dann-st", "network": "dann", "target": "svhn", "seed": 4}


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """A network for each target in the place of the shipped ones: everything is a 3 in SVHN, a 5 in USPS."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for target, digit in (("svhn", 3), ("usps", 5)):
        torch.manual_seed(0)
        network = Dann(dim=2)
        network.predictor.layer[4].bias.data[digit] = 100
        save_weights(folder / f"p3_{target}.safetensors", network.state_dict(), CARD)
    monkeypatch.setattr(p3_test, "CHECKPOINTS", folder)
    return folder


def classify(images, out, *options: object):
    return run(p3_test.main, "--images", images, "--out", out, "--device", "cpu", *options)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as f:
        return list(csv.reader(f))


@pytest.mark.parametrize(
    ("folder", "channels", "label"),
    [
        ("SVHN/test", 3, "3"),
        ("digits/usps/data", 1, "5"),
        ("digits/usps/data", 3, "5"),  # the path goes before the images
        ("usps/svhn", 3, "3"),  # and its last component before the others
        ("neutral", 3, "3"),
        ("neutral", 1, "5"),
    ],
)
def test_labels_in_the_order_of_names(tmp_path, folder, channels, label):
    write_pngs(tmp_path / folder, smooth_images(5, 28, channels))
    out = tmp_path / "new" / "labels.csv"
    assert classify(tmp_path / folder, out).code == 0
    assert rows(out) == [["image_name", "label"], *([f"{i:05d}.png", label] for i in range(5))]
    assert b"\r" not in out.read_bytes()


def test_a_path_that_contradicts_its_images_is_noted(tmp_path, capsys):
    write_pngs(tmp_path / "svhn", smooth_images(2, 28, 1))
    assert classify(tmp_path / "svhn", tmp_path / "labels.csv").code == 0
    assert "svhn by its path, usps by its images; --target decides" in capsys.readouterr().err
    assert classify(tmp_path / "svhn", tmp_path / "labels.csv", "--target", "svhn").code == 0
    assert capsys.readouterr().err == ""


def test_mixed_images_on_a_neutral_path(tmp_path):
    folder = tmp_path / "neutral"
    write_pngs(folder, smooth_images(3, 28))
    Image.new("L", (28, 28)).save(folder / "gray.png")
    out = tmp_path / "labels.csv"
    assert_user_error(classify(folder, out), folder, "--target")
    assert not out.exists()
    assert classify(folder, out, "--target", "usps").code == 0
    assert {label for _, label in rows(out)[1:]} == {"5"}


def test_gray_digits_stored_in_colour(tmp_path):
    """They are USPS's by themselves, and say nothing among coloured ones."""
    folder, out = tmp_path / "neutral", tmp_path / "labels.csv"
    for path in write_pngs(folder, smooth_images(3, 28, 1)):
        Image.open(path).convert("RGB").save(path)
    assert classify(folder, out).code == 0
    assert {label for _, label in rows(out)[1:]} == {"5"}
    Image.fromarray(smooth_images(1, 28)[0]).save(folder / "coloured.png")
    assert classify(folder, out).code == 0
    assert {label for _, label in rows(out)[1:]} == {"3"}


def test_bad_and_foreign_images_are_named(tmp_path, capsys):
    folder, out = tmp_path / "svhn", tmp_path / "labels.csv"
    paths = write_pngs(folder, smooth_images(6, 28))
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    Image.new("RGB", (64, 64)).save(paths[4])
    assert_user_error(classify(folder, out), paths[1], paths[4], "2 of 6", "--skip-bad")
    assert not out.exists()
    assert classify(folder, out, "--skip-bad").code == 0
    assert [name for name, _ in rows(out)[1:]] == [paths[i].name for i in (0, 2, 3, 5)]
    assert str(paths[4]) in capsys.readouterr().err
    for i in (0, 2, 3, 5):
        paths[i].unlink()
    assert_user_error(classify(folder, out, "--skip-bad"), "2 of 2", "give a folder of digits")


def test_every_format_of_images_is_labelled(tmp_path):
    folder, out = tmp_path / "usps", tmp_path / "labels.csv"
    folder.mkdir()
    names = ["a.bmp", "b.gif", "c.pgm", "d.png", "e.tif", "f.tiff"]
    for name, image in zip(names, smooth_images(6, 28, 1), strict=True):
        Image.fromarray(image.squeeze()).save(folder / name)
    assert classify(folder, out).code == 0
    assert rows(out)[1:] == [[name, "5"] for name in names]


@pytest.mark.parametrize(
    ("size", "standardise", "gray"), [(32, True, False), (32, True, True), (40, True, False), (32, False, False)]
)
def test_a_label_depends_on_its_image_only(tmp_path, weights, size, standardise, gray):
    """As the network was trained to see it, whatever else is in the folder, and in whatever batches."""
    images = smooth_images(30, 28)
    chw = torch.from_numpy(images).permute(0, 3, 1, 2)
    seen = digit_input(chw, size, standardise, gray)
    torch.manual_seed(1)
    network = Dann(dim=2)
    reestimate_batch_norm(network, [seen])
    network.predictor.layer[4].bias.data.zero_()
    network.predictor.layer[4].weight.data *= 100
    path, view = weights / "w.safetensors", {"size": size, "standardise": standardise, "gray": gray}
    save_weights(path, network.state_dict(), CARD | {"options": CARD["options"] | view})
    network, other = load_network(path, NETWORKS)[0], digit_input(chw, size, standardise, not gray)
    expected = network(seen).argmax(1).tolist()
    assert len(set(expected)) > 1
    assert expected != network(other).argmax(1).tolist()
    write_pngs(tmp_path / "svhn", images)
    write_pngs(tmp_path / "some" / "svhn", images[:3])
    for folder in ("svhn", "some/svhn"):
        assert classify(tmp_path / folder, tmp_path / folder / "labels.csv", "--weights", path).code == 0
    assert [int(label) for _, label in rows(tmp_path / "svhn/labels.csv")[1:]] == expected
    assert rows(tmp_path / "some/svhn/labels.csv") == rows(tmp_path / "svhn/labels.csv")[:4]


def test_scores(tmp_path, capsys):
    write_pngs(tmp_path / "svhn", smooth_images(4, 28))
    truth = tmp_path / "truth.csv"
    write_index(truth, [(f"{i:05d}.png", label) for i, label in enumerate((3, 3, 3, 8))])
    options = ("--evaluate", truth, "--record", tmp_path / "adaptation.json")
    for _ in range(2):  # a row measured again is replaced
        assert classify(tmp_path / "svhn", tmp_path / "o.csv", *options).code == 0
    (row,) = read_results(tmp_path / "adaptation.json")
    assert row["scores"] == {"accuracy": 75, "minutes": 9.5, "validator": -1.5}
    assert row["key"]["training"] == CARD["command"]
    assert (row["key"]["method"], row["key"]["seed"], row["key"]["scored"]) == ("dann-st", 4, "truth")
    out = capsys.readouterr().out
    assert "accuracy 75.000 % of 4 images" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["3"][1:] == ["0", "0", "0", "3", "0", "0", "0", "0", "0", "0", "100.0", "%"]
    assert lines["8"][4] == "1"
    write_index(truth, [("00003.png", 3)])  # a part of a folder, as val.csv of the course's is
    assert classify(tmp_path / "svhn", tmp_path / "o.csv", "--evaluate", truth).code == 0
    assert "accuracy 100.000 % of 1 images" in capsys.readouterr().out
    assert len(rows(tmp_path / "o.csv")) == 5
    write_index(truth, [("00000.png", 3), ("other.png", 1)])
    outcome = classify(tmp_path / "svhn", tmp_path / "new.csv", "--evaluate", truth)
    assert_user_error(outcome, truth, "1 images", "other.png")
    assert not (tmp_path / "new.csv").exists()


def test_sheet_of_errors(tmp_path, monkeypatch, capsys):
    """The surest error first, each with its image; what is right, or has no true label, is not shown."""
    write_pngs(tmp_path / "svhn", smooth_images(5, 28))
    write_index(tmp_path / "truth.csv", [(f"{i:05d}.png", label) for i, label in enumerate((7, 3, 8))])
    options = ("--evaluate", tmp_path / "truth.csv", "--errors", tmp_path / "new" / "errors.png")
    assert classify(tmp_path / "svhn", tmp_path / "o.csv", *options).code == 0
    with Image.open(tmp_path / "new" / "errors.png") as image:
        assert image.size[0] > 500
    shown = []
    monkeypatch.setattr(p3_test, "plot_images", lambda *a, **_: shown.append(a))
    images, p = torch.arange(5).view(5, 1, 1, 1), torch.eye(10)[[3, 3, 3, 3, 3]]
    p[2] *= 0.9
    p[0] *= 0.8
    truth = {"a": 7, "b": 3, "c": 8, "d": 3}
    p3_test.draw_errors(images, p, list("abcde"), truth, tmp_path / "errors.png")
    ((pictures, titles, _),) = shown
    assert pictures.flatten().tolist() == [2, 0]
    assert titles == ["8 read as 3\n0.90", "7 read as 3\n0.80"]
    p3_test.draw_errors(images, p, list("abcde"), {"b": 3}, tmp_path / "errors.png")
    assert "every image is read correctly" in capsys.readouterr().out and len(shown) == 1


def test_plots(tmp_path, capsys):
    for name in ("mnistm", "usps"):
        paths = write_pngs(tmp_path / name / "data", smooth_images(30, 28, 3 if name == "mnistm" else 1))
        write_index(tmp_path / name / "val.csv", [(p.name, i % 10) for i, p in enumerate(paths)])
    options = ("--tsne", tmp_path / "figures", "--target", "usps", "--data", tmp_path, "--device", "cpu")
    assert run(p3_test.main, *options).code == 0
    assert "proxy A-distance" in capsys.readouterr().out
    for name in ("class", "domain"):
        with Image.open(tmp_path / "figures" / f"tsne_usps_{name}.png") as image:
            assert image.size[0] > 500
    lines = (tmp_path / "mnistm" / "val.csv").read_text().splitlines(keepends=True)
    (tmp_path / "mnistm" / "val.csv").write_text("".join(lines[:10]))
    assert_user_error(run(p3_test.main, *options), tmp_path / "mnistm", "9 validation images")


def test_what_the_plots_show(tmp_path, monkeypatch):
    """The target's features, with the weights as they are; then the source's, with batch statistics of its own."""
    for name in ("mnistm", "svhn"):
        paths = write_pngs(tmp_path / name / "data", smooth_images(30, 28, seed=len(name)))
        write_index(tmp_path / name / "val.csv", [(p.name, (i + len(name)) % 10) for i, p in enumerate(paths)])
    done, drawn = [], {}
    reestimate, features = p3_test.reestimate_batch_norm, p3_test.Reader.features

    def watched_reestimate(network, batches):
        batches = list(batches)
        done.append(("statistics", sum(map(len, batches)), float(batches[0].sum())))
        reestimate(network, batches)

    def watched_features(self, images):
        found = features(self, images)
        done.append(("features", images, found))
        return found

    class Flat:
        def __init__(self, **_):
            pass

        def fit_transform(self, x):
            return x[:, :2]

    monkeypatch.setattr(p3_test, "reestimate_batch_norm", watched_reestimate)
    monkeypatch.setattr(p3_test.Reader, "features", watched_features)
    monkeypatch.setattr("sklearn.manifold.TSNE", Flat)
    monkeypatch.setattr(p3_test, "plot_points", lambda *words: drawn.update({words[-1].stem: words[:3]}))
    options = ("--tsne", tmp_path / "figures", "--target", "svhn", "--data", tmp_path, "--device", "cpu")
    assert run(p3_test.main, *options).code == 0
    (_, target, of_target), (what, count, total), (_, source, of_source) = done
    source_images, target_images = (load_digits(tmp_path / name, "val") for name in ("mnistm", "svhn"))
    assert torch.equal(target, target_images) and torch.equal(source, source_images)
    seen = digit_input(source_images, 32, standardised=True, gray=False)
    assert (what, count, total) == ("statistics", 30, pytest.approx(float(seen.sum()), abs=1e-3))
    labels = [load_labels(tmp_path / name, "val") for name in ("mnistm", "svhn")]
    for name, groups, names in (
        ("class", torch.cat(labels).tolist(), [str(c) for c in range(10)]),
        ("domain", [0] * 30 + [1] * 30, ["MNIST-M", "SVHN"]),
    ):
        points, *grouped = drawn[f"tsne_svhn_{name}"]
        assert np.array_equal(points, torch.cat([of_source, of_target])[:, :2].numpy())
        assert grouped == [groups, names]


def test_plots_are_of_the_reports_own_network(tmp_path, monkeypatch):
    path = tmp_path / "resnet.safetensors"
    monkeypatch.setitem(NETWORKS, "resnet34", lambda: torch.nn.Linear(2, 2))
    save_weights(path, NETWORKS["resnet34"]().state_dict(), CARD | {"model": "resnet34", "config": {}})
    options = ("--tsne", tmp_path, "--target", "usps", "--weights", path, "--device", "cpu")
    assert_user_error(run(p3_test.main, *options), path, "--tsne")


def test_domain_distance():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(600, 4, generator=random) for _ in range(2))
    assert p3_test.domain_distance(x, y + 9) == pytest.approx(2)
    assert abs(p3_test.domain_distance(x, y)) < 0.35


def test_wrong_input(tmp_path, weights):
    out = tmp_path / "labels.csv"
    for words in (("--out", out), ("--evaluate", out), ("--skip-bad",)):
        outcome = run(p3_test.main, "--tsne", tmp_path, "--target", "svhn", *words)
        assert_user_error(outcome, f"{words[0]} needs --images")
    assert_user_error(classify(tmp_path / "none", out), tmp_path / "none", "no such folder")
    (tmp_path / "file").write_text("")
    figures = run(p3_test.main, "--tsne", tmp_path / "file", "--target", "svhn", "--data", tmp_path / "none")
    assert_user_error(figures, tmp_path / "file", "choose another output folder")
    (tmp_path / "empty").mkdir()
    assert_user_error(classify(tmp_path / "empty", out), tmp_path / "empty", "holds no images")
    write_pngs(tmp_path / "svhn", smooth_images(2, 28))
    assert_user_error(classify(tmp_path / "svhn", tmp_path / "empty"), tmp_path / "empty", "is a folder")
    assert_user_error(classify(tmp_path / "svhn", weights / "SHA256SUMS" / "o.csv"), "SHA256SUMS")
    if Path("/proc/self").is_dir():
        assert_user_error(classify(tmp_path / "svhn", "/proc/self/o.csv"), "/proc/self:", "choose another")
    truth = tmp_path / "truth.csv"
    write_index(truth, [("00000.png", 1)])
    assert_user_error(classify(tmp_path / "svhn", truth, "--evaluate", truth), truth, "another file")
    same = classify(tmp_path / "svhn", out, "--evaluate", truth, "--errors", truth)
    assert_user_error(same, truth, "another file")
    assert truth.read_text().splitlines()[1] == "00000.png,1"
    for option in ("--errors", "--tsne"):
        place = tmp_path / "svhn" / "new"
        among = classify(tmp_path / "svhn", out, "--evaluate", truth, option, place)
        assert_user_error(among, place, "choose another place")
    write_index(tmp_path / "twice.csv", [("00000.png", 1), ("00000.png", 2)])
    twice = classify(tmp_path / "svhn", out, "--evaluate", tmp_path / "twice.csv")
    assert_user_error(twice, "twice.csv, line 3", "00000.png is 1 further up and 2 here")
    save_weights(tmp_path / "old.safetensors", Dann(dim=2).state_dict(), CARD | {"options": {"size": 32}})
    old = classify(tmp_path / "svhn", out, "--weights", tmp_path / "old.safetensors")
    assert_user_error(old, tmp_path / "old.safetensors", "train it again")
    path = weights / "p3_svhn.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_user_error(classify(tmp_path / "svhn", out), path, "damaged")
    assert_user_error(classify(tmp_path / "svhn", out, "--weights", tmp_path / "w"), tmp_path / "w")
    assert not out.exists()

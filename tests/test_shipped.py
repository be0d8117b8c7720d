"""What the repository ships: weight files that say where they come from, and a README that agrees with the results."""

import re

import pytest
import torch

import report_tables as tables
from common.checkpoint import load_network, load_weights, read_checksums
from common.results import weights_id
from metrics.classify import load_classifier
from models.classifier import Classifier
from models.dann import Dann
from models.dcgan import Generator
from models.unet import UNet_conditional
from tests.helpers import ROOT

KINDS = {"sngan": Generator, "dcgan": Generator, "unet": UNet_conditional, "classifier": Classifier, "dann": Dann}
WEIGHTS = sorted((ROOT / "checkpoints").glob("*.safetensors"))
DATA = {  # describe() of the images trained on; p3: 500 of MNIST-M's and all of the target's
    "digit_classifier": "40320 training images, CRC-32 of a sample 2c368d64",
    "p1_dcgan": "36439 training images, CRC-32 of a sample 92567a82",
    "p1_sngan": "36439 training images, CRC-32 of a sample 92567a82",
    "p2_unet": "42800 training images, CRC-32 of a sample 06b55a76",
    "p3_svhn": "7003 training images, CRC-32 of a sample 1a2ae3c7",
    "p3_usps": "6450 training images, CRC-32 of a sample 7bce2c15",
}


def test_checksums_list_every_file():
    assert set(read_checksums(ROOT / "checkpoints")) == {path.name for path in WEIGHTS}
    assert sum(path.stat().st_size for path in WEIGHTS) < 80e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_say_where_they_come_from(path):
    network, card = load_network(path, KINDS)
    assert {"command", "commit", "options", "data", "steps", "minutes", "hardware"} <= set(card)
    assert re.fullmatch(r"[0-9a-f]{7,}(\+changes)?", card["commit"])
    assert card["data"] == DATA[path.stem]
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert load_weights(path)[1] == card


def test_the_shipped_classifier_reads_ten_classes():
    logits = load_classifier()(torch.zeros(2, 3, 28, 28))
    assert logits.shape == (2, 10)


HEADLINES = (tables.faces_table, tables.digits_table, tables.adaptation_table)
DETAILS = (tables.samplers_table, tables.face_recipes_table, tables.digit_recipes_table)
DETAILS += (tables.seeds_table, tables.ablation_table)
SHOWN = [("README.md", t) for t in HEADLINES] + [("report/README.md", t) for t in HEADLINES + DETAILS]


@pytest.mark.parametrize(("file", "table"), SHOWN, ids=lambda x: getattr(x, "__name__", x))
def test_texts_show_the_result_files(file, table):
    assert table() in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["README.md", "report/README.md"])
def test_pictures_of_texts_are_there(file):
    path = ROOT / file
    shown = [path.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8"))]
    assert len(shown) >= 6
    assert [picture for picture in shown if not picture.is_file()] == []
    assert sum(picture.stat().st_size for picture in set(shown)) < 4e6


def test_the_example_of_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert [names[name].shape for name in ("faces", "digits", "labels")] == [(4, 3, 64, 64), (2, 3, 28, 28), (5,)]
    assert 0.2 < float(names["faces"].std()) < 0.9
    assert -1 <= float(names["digits"].min()) < 0 < float(names["digits"].max()) <= 1


@pytest.mark.parametrize("target", tables.TARGETS)
def test_the_shipped_seed_is_the_label_free_choice(target):
    """Of the seeds of our method, the one with the best validator, which knows no target label."""
    rows = tables.adaptation_rows(checkpoint="best", method="dann-st", target=target)
    assert len(rows) >= 3
    choice = min(rows, key=lambda row: row["scores"]["validator"])
    assert choice["weights"] == weights_id(ROOT / "checkpoints" / f"p3_{target}.safetensors")

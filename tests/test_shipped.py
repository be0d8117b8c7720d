"""What the repository ships: weight files that say where they come from, and a README that agrees with the results."""

import pytest
import torch

import report
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


def test_checksums_list_every_file():
    assert set(read_checksums(ROOT / "checkpoints")) == {path.name for path in WEIGHTS}
    assert sum(path.stat().st_size for path in WEIGHTS) < 80e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_weights_say_where_they_come_from(path):
    network, card = load_network(path, KINDS)
    assert {"command", "commit", "options", "data", "steps", "minutes", "hardware"} <= set(card)
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert "shared/data" in card["command"] or "hw2_data" in card["command"]
    assert load_weights(path)[1] == card


def test_the_shipped_classifier_reads_ten_classes():
    logits = load_classifier()(torch.zeros(2, 3, 28, 28))
    assert logits.shape == (2, 10)


TABLES = (report.digits_table, report.samplers_table, report.adaptation_table, report.seeds_table)


@pytest.mark.parametrize("table", TABLES, ids=lambda f: f.__name__)
def test_the_readme_shows_the_result_files(table):
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", report.TARGETS)
def test_the_shipped_seed_is_the_label_free_choice(target):
    """Of the seeds of our method, the one with the best validator, which knows no target label."""
    rows = report.adaptation_rows("best", method="dann-st", target=target)
    assert len(rows) >= 3
    choice = min(rows, key=lambda row: row["scores"]["validator"])
    assert choice["weights"] == weights_id(ROOT / "checkpoints" / f"p3_{target}.safetensors")

"""What the repository ships: weight files that say where they come from, and a README that agrees with the results."""

import importlib
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import p2_test
import p3_test
import report_tables as tables
from common.checkpoint import load_network, read_checksums
from common.results import weights_id
from metrics.classify import accuracy, load_classifier
from metrics.detect import face_counts, face_rate
from models.classifier import Classifier
from models.dann import Dann
from models.dcgan import Generator
from models.unet import UNet_conditional
from tests.helpers import ROOT, run, smooth_images, write_pngs

KINDS = {"sngan": Generator, "dcgan": Generator, "unet": UNet_conditional, "classifier": Classifier, "dann": Dann}
WEIGHTS = sorted((ROOT / "checkpoints").glob("*.safetensors"))
DATA = {  # describe() of the images trained on; p3: 500 of MNIST-M's and all of the target's
    "digit_classifier": "40320 training images, CRC-32 of a sample 2c368d64",
    "p1_dcgan": "36439 training images, CRC-32 of a sample 92567a82",
    "p1_sngan": "36439 training images, CRC-32 of a sample 92567a82",
    "p2_guide": "42800 training images, CRC-32 of a sample 06b55a76",
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
    assert card["held_out_scores"]


def tiles(picture: str, side: int, columns: int) -> Tensor:
    """The images of a sheet in report/, which stand 2 pixels apart: uint8 (N, 3, side, side)."""
    with Image.open(ROOT / "report" / picture) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    rows = pixels[:, 2:, 2:].unfold(1, side, side + 2).unfold(2, side, side + 2)  # (3, rows, columns, side, side)
    assert rows.shape[2] == columns
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def test_shown_digits_are_read_by_the_shipped_classifier():
    digits = tiles("digits_grid.png", 28, 10)
    assert accuracy(load_classifier(), digits, torch.arange(10).repeat_interleave(10)) >= 95


@pytest.mark.parametrize("name", ["sngan", "dcgan"])
def test_shown_faces_are_found(name):
    assert face_rate(face_counts(tiles(f"faces_{name}.png", 64, 8))) > 75


def test_shipped_weights_are_those_that_the_scripts_take(tmp_path, monkeypatch):
    monkeypatch.setattr(p2_test, "SLICE", 1)
    made = []
    for options in ((), ("--autoguide", 0)):  # t = 600, 267 and 67, where a worse network guides by default
        out = tmp_path / f"digits{len(made)}"
        options += ("--digits", 7, "--per-digit", 1, "--steps", 3, "--device", "cpu")
        assert run(p2_test.main, "--out", out, *options).code == 0
        assert [path.name for path in out.iterdir()] == ["7_001.png"]
        made.append((out / "7_001.png").read_bytes())
    assert made[0] != made[1]
    for target, channels in (("svhn", 3), ("usps", 1)):
        write_pngs(tmp_path / target, smooth_images(3, 28, channels))
        out = tmp_path / f"{target}.csv"
        assert run(p3_test.main, "--images", tmp_path / target, "--out", out, "--device", "cpu").code == 0
        assert len(out.read_text().splitlines()) == 4


HEADLINES = (tables.faces_table, tables.digits_table, tables.adaptation_table)
DETAILS = (tables.samplers_table, tables.starts_table, tables.face_recipes_table, tables.digit_recipes_table)
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


def commands() -> list[list[str]]:
    """What README, model card, report and the docstrings of scripts tell to type, as words."""
    places = {"    ": [ROOT / name for name in ("README.md", "checkpoints/README.md", "report/README.md")]}
    places["  "] = [*ROOT.glob("*.py"), ROOT / "datasets" / "prepare.py"]
    found = []
    for indent, paths in places.items():
        for path in paths:
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            lines = re.findall(
                rf"^{indent}((?:python3 [^-]|python3 -m|torchrun|bash hw2).*)$", text, flags=re.MULTILINE
            )
            found += [shlex.split(line.partition(" #")[0]) for line in lines]
    return found


def test_commands_of_the_texts_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where --record makes its folder
    values = {"S": "ddim", "N": "9", "P": "2", "E": "0.5", "W": "2", "LOW": "100", "HIGH": "400", "R": "0.5", "T": "5"}
    wrappers = {"hw2_1.sh": ("p1_test.py", "--out"), "hw2_2.sh": ("p2_test.py", "--out")}
    wrappers["hw2_3.sh"] = ("p3_test.py", "--images", "--out")
    seen = set()
    for words in commands():
        start = {"torchrun": 4, "bash": 1}.get(words[0], 1 + (words[1] == "-m"))
        script, *rest = words[start:]
        if script in wrappers:
            script, *names = wrappers[script]
            rest = [word for pair in zip(names, rest, strict=False) for word in pair] + rest[len(names) :]
        module = importlib.import_module(script.removesuffix(".py"))
        # not parse_options of trainings, which looks for the run of --resume
        parse = module.build_parser().parse_args if hasattr(module, "build_parser") else module.parse_options
        parse([values.get(word, word) for word in rest])
        seen.add(script)
    assert len(seen) == 9


@pytest.mark.parametrize("target", tables.TARGETS)
def test_the_shipped_seed_is_the_label_free_choice(target):
    """Of the seeds of our method, the one with the best validator, which knows no target label."""
    rows = tables.adaptation_rows(checkpoint="best", method="dann-st", target=target)
    assert len(rows) >= 3
    choice = min(rows, key=lambda row: row["scores"]["validator"])
    assert choice["weights"] == weights_id(ROOT / "checkpoints" / f"p3_{target}.safetensors")

"""The report: tables from result files, parts without data, what is measured, what is kept."""

import json
import shutil

import pytest
import torch

import report
from common.checkpoint import save_weights
from common.results import weights_id
from models import dcgan
from models.unet import UNet_conditional
from tests.helpers import ROOT, assert_user_error, run

DIGITS = {"sampler": "dpm++", "steps": 8, "power": 1.0, "eta": 0.0, "w": 2.0, "guide": [1, 600], "digits": "0123456789"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Checkpoints of tiny networks and result files for them; nothing is really measured."""
    checkpoints, results = tmp_path / "checkpoints", tmp_path / "results"
    results.mkdir()
    checkpoints.mkdir()
    for name in ("CHECKPOINTS", "RESULTS", "HERE"):
        monkeypatch.setattr(report, name, {"CHECKPOINTS": checkpoints, "RESULTS": results}.get(name, tmp_path))
    common = {"steps": 1234, "minutes": 5.2, "hardware": "an abacus", "options": {"batch_size": 16}}
    common |= {"command": "python3 p1_train.py", "commit": "abc"}
    torch.manual_seed(0)
    for name in ("sngan", "dcgan"):
        config = {"z_dim": 3, "dim": 2}
        card = {"model": name, "config": config} | common
        save_weights(checkpoints / f"p1_{name}.safetensors", dcgan.Generator(**config).state_dict(), card)
    card = {"model": "unet", "config": {"dim": 4}} | common
    save_weights(checkpoints / "p2_unet.safetensors", UNet_conditional(dim=4).state_dict(), card)

    def rows(name, *entries):
        entries = [{"key": k, "scores": s, "weights": w, "hardware": "an abacus"} for k, s, w in entries]
        (results / name).write_text(json.dumps(entries))

    def face(weights, seed, fd, rate):
        id = "none" if weights == "real" else weights_id(checkpoints / f"{weights}.safetensors")
        return {"weights": weights, "images": 1000, "seed": seed}, {"FD-768": fd, "faces": rate}, id

    gans = [face(f"p1_{n}", s, fd + s / 100, 95 + s) for n, fd in (("sngan", 0.5), ("dcgan", 1.5)) for s in range(5)]
    rows("faces.json", face("real", 0, 0.0762, 94.1), *gans)
    unet = weights_id(checkpoints / "p2_unet.safetensors")
    scores = {"accuracy": 98.7, "FD-64": 0.1, "FD-768": 0.4, "FD-64_floor": 0.01, "FD-768_floor": 0.05}
    scores |= {"nearest_least": 20.0, "nearest_real_least": 18.0, "seconds": 200.0}
    digits = scores | {f"digit_{d}": 90.0 + d for d in range(10)}
    rows("digits.json", (DIGITS | {"per_digit": 100, "seed": 0}, digits, unet))
    slow = DIGITS | {"per_digit": 20, "seed": 0, "steps": 50, "guide": [100, 400]}
    rows("samplers.json", (slow, scores, unet), (slow | {"w": 0}, scores, unet), (slow | {"w": 1}, scores, "other"))

    def trained(method, seed):
        key = {"method": method, "network": "dann", "target": "usps", "seed": seed}
        return key | {"checkpoint": "best", "scored": "val", "training": f"--seed {seed}"}

    seeds = [(trained("dann-st", s), {"accuracy": 97.0 + s, "validator": -1.9, "source": 99}, "x") for s in range(3)]
    last = (trained("dann-st", 1) | {"checkpoint": "last"}, {"accuracy": 50.0, "validator": -1.8, "source": 98}, "y")
    rows("adaptation.json", *seeds, last)
    command = "python3 p3_train.py --method dann --seed {} --target usps --data hw2_data --adversary 1"
    scored = [(trained("dann", s) | {"scored": "train", "training": command.format(s)}, s) for s in range(2)]
    rows("ablation.json", *((key, {"accuracy": 60.0 + s, "validator": -1.5}, "x") for key, s in scored))
    (results / "observations.md").write_text("It was observed.\n")
    for name in ("p1_sngan", "p1_dcgan", "p2_unet"):
        (results / f"{name}_metrics.csv").write_text("step,loss,loss_d,fd\n1,2,3,\n2,1,2,0.5\n")
    return tmp_path


def build(study, *options: object):
    return run(report.main, "--out", study / "report", *options)


def test_tables_are_means_over_the_rows_of_these_weights(study):
    faces = report.faces_table().splitlines()
    assert faces[0] == "| 1,000 images of | seeds | FD-768 | exactly one face | published report |"
    assert faces[2] == "| real training faces (the floor) | 1 | 0.076 | 94.1 % |  |"
    assert "| SNGAN | 5 | 0.520 ± 0.016 | 97.0 ± 1.6 % | FID 25.66, faces 92.2 % |" in faces
    samplers = report.samplers_table().splitlines()
    assert len(samplers) == 4  # the row of other weights is left out
    assert samplers[3] == "| dpm++ | 50 | 1.0 | 2 | 100 to 400 | 200 | 98.7 | 0.100 | 0.400 | 1000 | an abacus |"
    assert "| FD-768 to 2,000 validation digits | 0.400 | 0.0500 |" in report.digits_table()
    assert "| USPS | DANN-ST | 3 | 98.00 ± 1.00 % |  |" in report.adaptation_table()
    assert "| USPS | DANN-ST | 1 | -1.9000 | 99.0 % | 98.00 % | 50.00 % |  |" in report.seeds_table()
    ablation = report.ablation_table().splitlines()
    assert ablation[2:] == ["| `--method dann --target usps --adversary 1` | 2 | 60.5 ± 0.7 % | -1.500 ± 0.000 |"]
    (study / "results" / "faces.json").unlink()
    assert report.faces_table().startswith("Not measured yet")


def test_without_data_everything_known_is_built(study, capsys):
    assert build(study).code == 0
    text = (study / "report" / "README.md").read_text()
    for part in report.PARTS.values():
        assert f"\n## {part.title}\n" in text
    assert "1,234 steps of 16, 5 min on an abacus" in text
    assert "| UNet_conditional | 15,664,515 |" in text
    assert "p3_usps.safetensors is missing" in text
    assert "It was observed." in text
    assert "not measured: p2_test.py --grid" in capsys.readouterr().out  # its figures are not there
    for name in ("faces_sngan.png", "faces_dcgan.png", "curves_sngan.png", "curves_dcgan.png", "curves_unet.png"):
        assert f"({name})" in text
        assert (study / "report" / name).is_file()


def test_parts_that_are_up_to_date_are_kept(study, monkeypatch):
    assert build(study).code == 0
    built = []

    def watched(name, build):
        return lambda o: built.append(name) or build(o)

    for name, part in report.PARTS.items():
        monkeypatch.setattr(part, "build", watched(name, part.build))
    before = (study / "report" / "README.md").read_text()
    assert build(study).code == 0
    assert built == []
    (study / "results" / "observations.md").write_text("Otherwise.\n")
    assert build(study, "--only", "faces").code == 0
    assert built == []
    assert build(study).code == 0
    assert built == ["observations"]
    assert (study / "report" / "README.md").read_text() == before.replace("It was observed.", "Otherwise.")
    assert build(study, "--only", "networks", "--measure").code == 0
    assert built == ["observations", "networks"]


def test_missing_numbers_are_measured_where_there_is_data(study, monkeypatch):
    calls = []
    monkeypatch.setattr(report, "call", lambda *a: calls.append([str(x) for x in a]))
    for name in ("face", "digits/mnistm", "digits/svhn", "digits/usps"):
        (study / "data" / name).mkdir(parents=True)
    assert build(study, "--data", study / "data", "--only", "faces").code == 0
    assert calls == []
    (study / "results" / "faces.json").unlink()
    assert build(study, "--data", study / "data", "--only", "faces").code == 0
    assert [c[0] for c in calls] == ["p1_test.py"] * 11
    assert sum("--real" in c for c in calls) == 1
    assert calls[0][1] == "--out"
    assert calls[0][3:5] == ["--weights", str(study / "checkpoints" / "p1_dcgan.safetensors")]
    assert calls[0][-4:] == ["--evaluate", str(study / "data/face"), "--record", str(study / "results/faces.json")]
    assert build(study, "--data", study / "data", "--only", "digits").code == 0
    assert calls[11][0] == "p2_test.py"
    assert "--trajectory" in calls[11]


def test_user_errors_are_one_line(study):
    assert_user_error(build(study, "--data", study / "none", "--only", "faces"), study / "none" / "face")
    (study / "results" / "faces.json").write_text("[]]")
    assert_user_error(build(study, "--only", "faces"), study / "results" / "faces.json", "not a result file")
    (study / "checkpoints" / "p1_sngan.safetensors").write_text("")
    (study / "results" / "faces.json").unlink()
    assert_user_error(build(study, "--only", "faces"), "p1_sngan.safetensors")


def test_a_failing_script_is_named_by_its_own_line(tmp_path, monkeypatch):
    with pytest.raises(report.UserError, match=r"^p1_test.py: error: .*none.safetensors: no such weight file"):
        report.call("p1_test.py", "--out", tmp_path / "o", "--weights", tmp_path / "none.safetensors")


def test_scripts_of_the_repository_are_called(study, monkeypatch):
    """With tiny weights, really: digits are generated and drawn by p2_test.py in a process of its own."""
    monkeypatch.setattr(report, "HERE", ROOT)
    out = study / "digits"
    arguments = ("--weights", study / "checkpoints" / "p2_unet.safetensors", "--per-digit", 1, "--steps", 1)
    report.call("p2_test.py", "--out", out, *arguments, "--grid", study / "grid.png", "--device", "cpu")
    assert len(list(out.iterdir())) == 10
    shutil.rmtree(out)

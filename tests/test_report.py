"""The report: tables from result files, parts without data, what is measured, what is kept."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import p2_test
import p3_test
import report
import report_tables as tables
from common.checkpoint import save_weights
from common.pictures import plot_images
from common.results import weights_id
from models import dcgan
from models.dann import Dann
from models.unet import UNet_conditional
from tests.helpers import ROOT, assert_user_error, run

MEAN = [1.0, 2.0, 3.0]  # of the digits that the UNet's card tells of
START = [m + t for m, t in zip(MEAN, p2_test.TINT, strict=True)]
DIGITS = p2_test.FAST | {"mean": START, "calibrate": True, "digits": "0123456789", "scored": "val"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Checkpoints of tiny networks and result files for them; nothing is really measured."""
    checkpoints, results = tmp_path / "checkpoints", tmp_path / "results"
    results.mkdir()
    checkpoints.mkdir()
    for name in ("CHECKPOINTS", "RESULTS", "HERE"):
        monkeypatch.setattr(tables, name, {"CHECKPOINTS": checkpoints, "RESULTS": results}.get(name, tmp_path))
    common = {"steps": 1234, "minutes": 5.2, "hardware": "an abacus", "options": {"batch_size": 16}}
    common |= {"command": "python3 p1_train.py", "commit": "abc"}
    torch.manual_seed(0)
    for name in ("sngan", "dcgan"):
        config = {"z_dim": 3, "dim": 2}
        card = {"model": name, "config": config} | common
        save_weights(checkpoints / f"p1_{name}.safetensors", dcgan.Generator(**config).state_dict(), card)
    card = {"model": "unet", "config": {"dim": 4}, "mean": MEAN, "mean_errors": {"600": [1, 2, 3]}} | common
    for name in ("p2_unet", "p2_guide"):
        save_weights(checkpoints / f"{name}.safetensors", UNet_conditional(dim=4).state_dict(), card)
    monkeypatch.setattr(p2_test, "WEIGHTS", checkpoints / "p2_unet.safetensors")
    monkeypatch.setattr(p2_test, "WORSE", checkpoints / "p2_guide.safetensors")

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
    scores |= {f"{part}_{c}{of}": -1.5 for part in ("mean", "std") for c in "rgb" for of in ("", "_floor")}
    scores |= {"nearest_least": 20.0, "nearest_real_least": 18.0, "seconds": 200.0}
    digits = scores | {f"digit_{d}": 90.0 + d for d in range(10)}
    guided = DIGITS | {"autoguide_by": weights_id(checkpoints / "p2_guide.safetensors")}
    plain = {name: value for name, value in DIGITS.items() if not name.startswith("autoguide")}
    biased = {name: value for name, value in guided.items() if name != "calibrate"}
    stale = guided | {"keeps": "mean"}, guided | {"autoguide_by": "another"}, plain, biased
    stale += (guided | {"mean": MEAN},)
    older = [(key | {"per_digit": 100, "seed": 0}, digits | {"FD-768": 0.9}, unet) for key in stale]
    rows("digits.json", *((guided | {"per_digit": 100, "seed": s}, digits, unet) for s in range(3)), *older)
    slow = plain | {"per_digit": 20, "seed": 0, "sampler": "dpm++", "steps": 50, "eta": 0.0, "w": 2.0}
    slow |= {"guide": [100, 400], "power": 1.0, "rescale": 0.0, "mean": None, "scored": "held-out"}
    del slow["calibrate"]
    others = (slow | {"w": 1}, scores, "other"), (slow | {"w": 3, "from_real": 9}, scores, unet)
    others += ((slow | {"w": -1, "rescale": 0.5, "keeps": "mean"}, scores, p2_test.CHOSEN_WITH[0]),)
    others += ((slow | {"w": 4, "autoguide": 1.5, "autoguide_t": [1, 100], "autoguide_by": "g"}, scores, unet),)
    others += ((slow | {"w": 5, "calibrate": True}, scores, unet),)
    rows("samplers.json", (slow, scores, unet), (slow | {"w": 0}, scores, unet), *others)

    starts = [guided | {"per_digit": 20, "seed": 0, "scored": "held-out"} | x for x in ({}, {"from_real": 0})]
    rows("starts.json", *((key, scores, unet) for key in starts), (starts[0] | {"from_real": 9}, scores, "other"))

    def trained(method, seed):
        key = {"method": method, "network": "dann", "target": "usps", "seed": seed}
        return key | {"checkpoint": "best", "scored": "val", "training": f"--seed {seed}"}

    valid = {"validator": -1.9, "source": 99}
    seeds = [(trained("dann-st", s), {"accuracy": 97.0 + s, "minutes": 5 + s} | valid, "x") for s in range(3)]
    last = (trained("dann-st", 1) | {"checkpoint": "last"}, {"accuracy": 50.0, "validator": -1.8, "source": 98}, "y")
    kept = [(trained("dann-st", 1) | {"checkpoint": f"step_{i}"}, {"accuracy": 97.5 + i}, "y") for i in (0, 1)]
    rows("adaptation.json", *seeds, last, *kept)
    command, ablation = "python3 p3_train.py --method dann --steps 9 --seed {} --target usps --data d --students 0", []
    for change, gains in (("", (0, 0, 0)), (" --adversary 1", (-2, -4)), (" --gray --size 28", (1, 1, 1))):
        for seed, gain in enumerate(gains):
            key = trained("dann", seed) | {"scored": "train", "training": command.format(seed) + change}
            ablation.append((key, {"accuracy": 60.0 + 10 * seed + gain}, "x"))
    rows("ablation.json", *ablation)
    command = "python3 p1_train.py --model sngan --steps 9 --seed {} --record results/recipes.json"
    runs = [
        ("", 0, 1.0, 90),
        (" --recipe ours", 1, 2.0, 92),
        (" --recipe report", 0, 3.0, 0.7),
        (" --no-flip", 0, 1.25, 88),
    ]
    recipes = [({"training": command.format(s) + c}, {"fd": fd, "faces": f}, "x") for c, s, fd, f in runs]
    digits_run = {"training": "python3 p2_train.py --batch-size 4 --gamma 0 --data d"}
    rows("recipes.json", *recipes, (digits_run, {"fd": 4.0, "accuracy": 11}, "x"))
    (results / "observations.md").write_text("It was observed.\n")
    for name in ("p1_sngan", "p1_dcgan", "p2_unet"):
        (results / f"{name}_metrics.csv").write_text("step,loss,loss_d,fd\n1,2,3,\n2,1,2,0.5\n")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What the report asks other scripts to do; nothing is done, but for empty pictures."""
    calls = []

    def call(*words):
        calls.append([str(word) for word in words])
        for word in calls[-1]:
            if word.endswith(".png"):
                Path(word).touch()

    monkeypatch.setattr(report, "call", call)
    return calls


def build(study, *options: object):
    return run(report.main, "--out", study / "report", *options)


def test_tables_are_means_over_the_rows_of_these_weights(study):
    faces = tables.faces_table().splitlines()
    assert faces[0] == "| 1,000 images of | seeds | FD-768 | exactly one face | published report |"
    assert faces[2] == "| training data (the floor) | 1 | 0.076 | 94.1 % |  |"
    assert "| SNGAN | 5 | 0.520 ± 0.016 | 97.0 ± 1.6 % | FID 25.66, faces 92.2 % |" in faces
    samplers = tables.samplers_table().splitlines()
    settings, scores = "dpm++ | 50 | 1.0 | 2 | 100 to 400 | 0 |  |  | 0 | 200", "98.7 | 0.100 | 0.400 | 1.5 / 1.5"
    shipped = weights_id(study / "checkpoints" / "p2_unet.safetensors")[:8]
    assert samplers[3] == f"| {shipped} | {settings} | {scores} | 75 | 1000 | an abacus |"
    autoguided = settings.replace("| 2 |", "| 4 |").replace("|  |", "| 1.5, 1 to 100 |", 1)
    assert samplers[4].startswith(f"| {shipped} | {autoguided} | {scores} | 75 + 8 | 1000 |")  # t = 12, 24 ... 96
    assert samplers[5].startswith(f"| {shipped} | dpm++ | 50 | 1.0 | 5 | 100 to 400 | 0 |  | yes | 0 | 200 |")
    assert samplers[6].startswith(f"| {p2_test.CHOSEN_WITH[0][:8]} | dpm++ | 50 | 1.0 | -1 | 100 to 400 | 0.5* |")
    assert len(samplers) == 7  # the rows of other weights and of real starts are left out
    assert tables.starts_table().splitlines()[2:] == [
        "| real digits at t = 0 | 200 | 98.7 | 0.100 | 0.400 |",
        "| noise | 200 | 98.7 | 0.100 | 0.400 |",
    ]
    digits = tables.digits_table()
    assert "| FD-768 to 2,000 validation digits | 0.400 ± 0.000 | 0.0500 |" in digits
    assert "| mean of red, green, blue against validation digits, % | -1.5, -1.5, -1.5 | -1.5, -1.5, -1.5 |" in digits
    assert "| USPS | DANN-ST | 3 | 98.00 ± 1.00 % |  | 6 |" in tables.adaptation_table()
    assert "| USPS | DANN-ST | 1 | -1.9000 | 99.0 % | 98.00 % | 50.00 % | 98.50 % |  |" in tables.seeds_table()
    assert tables.ablation_table().splitlines()[2:] == [
        "| DANN `--students 0 --steps 9` | as it is | 3 |  | 70.0 ± 10.0 % |",
        "| DANN `--students 0 --steps 9` | `--adversary 1` | 2 |  | -3.0 ± 1.4 |",
        "| DANN `--students 0 --steps 9` | `--gray --size 28` | 3 |  | +1.0 ± 0.0 |",
    ]
    assert tables.face_recipes_table().splitlines()[2:] == [
        "| `--model sngan --steps 9` | `--no-flip` | 1 | 1.250 | 88.0 % |",
        "| `--model sngan --steps 9` | as it is | 2 | 1.500 ± 0.707 | 91.0 ± 1.4 % |",
        "| `--model sngan --steps 9` | `--recipe report` | 1 | 3.000 | 0.7 % |",
    ]
    assert tables.digit_recipes_table().endswith("\n| `--batch-size 4` | `--gamma 0` | 1 | 4.000 | 11.0 % |")
    (study / "results" / "faces.json").unlink()
    assert tables.faces_table().startswith("Not measured yet")


def test_commands_are_split_into_setting_and_changes():
    command = (
        "python3 p1_train.py --model sngan --steps=9 --keep --device cpu --no-flip --ema 0 --data 'a b' --recipe ours"
    )
    assert tables.split_command(command) == ("`--model sngan --steps 9`", "--no-flip --ema 0")


def test_without_data_everything_known_is_built(study, calls):
    assert build(study).code == 0
    text = (study / "report" / "README.md").read_text()
    for part in report.PARTS.values():
        assert f"\n## {part.title}\n" in text
    assert "1,234 steps of 16, 5 min on an abacus" in text
    assert "| UNet_conditional | 15,664,515 |" in text
    assert "p3_usps.safetensors is missing" in text
    assert "It was observed." in text
    (command,) = calls  # pictures of digits need no data
    assert command[0] == "p2_test.py"
    assert "--evaluate" not in command
    assert command[-2:] == ["--per-digit", "10"]
    assert "The least sure and the nearest digits need data" in text
    for name in ("faces_sngan.png", "faces_dcgan.png", "curves_sngan.png", "curves_dcgan.png", "curves_unet.png"):
        assert f"({name})" in text
        assert (study / "report" / name).is_file()


def test_parts_that_are_up_to_date_are_kept(study, calls, monkeypatch):
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


def test_one_part_leaves_the_others_of_a_fresh_clone_alone(study, calls):
    """Where README.md is there, and what was built when is not known."""
    assert build(study).code == 0
    path = study / "report" / "README.md"
    before = path.read_text()
    (study / "report" / ".parts.json").unlink()
    (study / "results" / "observations.md").write_text("Otherwise.\n")
    assert build(study, "--only", "observations").code == 0
    assert path.read_text() == before.replace("It was observed.", "Otherwise.")


def test_a_foreign_readme_is_left_alone(study, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    foreign = run(report.main, "--out", tmp_path, "--only", "networks")
    assert_user_error(foreign, tmp_path / "README.md", "not made by this script")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_missing_pictures_and_edited_parts_are_made_again(study, calls):
    assert build(study).code == 0
    path, picture = study / "report" / "README.md", study / "report" / "faces_sngan.png"
    before = path.read_text()
    picture.unlink()
    path.write_text(before.replace("It was observed.", "Edited."))
    assert build(study).code == 0
    assert picture.is_file()
    assert path.read_text() == before


def test_a_training_is_the_sum_of_its_runs():
    last = {"steps": 5, "minutes": 2.5, "hardware": "an abacus", "command": "c", "commit": "d"}
    before = [last | {"steps": 1000, "hardware": "a slide rule"}, last]
    card = last | {"before": before, "options": {"batch_size": 16}}
    assert tables.training(card) == "1,010 steps, the last 5 of 16, 8 min on a slide rule and an abacus"


def test_missing_numbers_are_measured_where_there_is_data(study, calls, capsys):
    for name in ("face", "digits/mnistm", "digits/svhn", "digits/usps"):
        (study / "data" / name).mkdir(parents=True)
    assert build(study, "--data", study / "data", "--only", "faces").code == 0
    assert calls == []
    (study / "results" / "faces.json").unlink()
    assert build(study, "--data", study / "data", "--only", "faces").code == 0
    assert [c[0] for c in calls] == ["p1_test.py"] * 11
    assert sum("--real" in c for c in calls) == 1
    assert calls[0][1] == "--out"
    assert calls[0][3:7] == ["--count", "1000", "--weights", str(study / "checkpoints" / "p1_dcgan.safetensors")]
    scored = ["--evaluate", str(study / "data/face"), "--dims", "768", "--record", str(study / "results/faces.json")]
    assert calls[0][-6:] == scored
    assert build(study, "--data", study / "data", "--only", "digits").code == 0
    assert len(calls) == 11
    (study / "results" / "digits.json").unlink()
    assert build(study, "--data", study / "data", "--only", "digits", "pictures").code == 0
    assert [c[0] for c in calls[11:]] == ["p2_test.py"] * 4
    assert [c[c.index("--seed") + 1] for c in calls[11:14]] == ["0", "1", "2"]
    assert ["--record" in c for c in calls[11:]] == [True, True, True, False]
    assert {"--unsure", "--neighbours", "--evaluate", "--grid", "--trajectory"} < set(calls[14])
    (study / "report" / ".parts.json").unlink()  # as in a fresh clone: the figures that need data stay
    capsys.readouterr()
    assert build(study, "--only", "pictures").code == 0
    assert "kept, not drawn again: digits_unsure.png, digits_neighbours.png; " in capsys.readouterr().out
    text = (study / "report" / "README.md").read_text()
    assert "(digits_unsure.png)" in text
    assert "need data" not in text


def test_a_whole_study_is_measured_on_data(study, faces, digits, mean_inception, monkeypatch):
    """Every script really runs, here in this process: no result file, tiny networks, tiny data."""

    def call(script, *arguments):
        assert run(importlib.import_module(script.removesuffix(".py")).main, *arguments).code == 0

    monkeypatch.setattr(report, "call", call)
    monkeypatch.setattr(report, "FACE_SEEDS", range(2))
    monkeypatch.setattr(report, "DIGIT_SEEDS", range(1))
    monkeypatch.setattr(tables, "FACES", 12)
    monkeypatch.setattr(tables, "DIGITS", 2)
    monkeypatch.setattr(p2_test, "SLICE", 2)
    monkeypatch.setattr(p2_test, "FAST", p2_test.FAST | {"steps": 1})
    monkeypatch.setattr(p2_test, "draw_trajectory", lambda *a: plot_images([torch.zeros(3, 8, 8)], ["t = 0"], a[-1], 1))
    data = study / "data"
    (data / "digits").mkdir(parents=True)
    for name, source in (("face", faces), ("digits/mnistm", digits), ("digits/usps", digits)):
        (data / name).symlink_to(source)
    (data / "digits" / "svhn").mkdir()
    card = {"model": "dann", "config": {"dim": 2}, "steps": 3, "minutes": 1.0, "hardware": "an abacus"}
    card |= {"command": "python3 p3_train.py", "commit": "abc"}
    card["options"] = {"size": 32, "standardise": True, "gray": True, "separate": True, "seed": 1, "batch_size": 8}
    save_weights(study / "checkpoints" / "p3_usps.safetensors", Dann(dim=2).state_dict(), card)
    monkeypatch.setattr(p3_test, "CHECKPOINTS", study / "checkpoints")
    for name in ("faces.json", "digits.json"):
        (study / "results" / name).unlink()
    assert build(study, "--data", data).code == 0
    text = (study / "report" / "README.md").read_text()
    assert "| 12 images of | seeds | FD-48 |" in text
    assert "| SNGAN | 2 |" in text
    assert "| 20 generated digits |" in text
    for name in re.findall(r"\((\w+\.png)\)", text):
        assert (study / "report" / name).is_file()
    drawn = ["digits_unsure", "digits_neighbours", "digits_trajectory"]
    drawn += ["tsne_usps_class", "faces_dcgan", "curves_sngan"]
    assert [name for name in drawn if f"({name}.png)" not in text] == []
    rows = json.loads((study / "results" / "faces.json").read_text())
    assert len(rows) == 5
    assert rows[0]["command"].startswith("python3 p1_test.py")


def test_user_errors_are_one_line(study):
    assert_user_error(build(study, "--data", study / "none", "--only", "faces"), study / "none" / "face")
    (study / "results" / "faces.json").write_text("[]]")
    assert_user_error(build(study, "--only", "faces"), study / "results" / "faces.json", "not a result file")
    (study / "results" / "faces.json").write_text('[{"key": {}, "scores": {"faces": "many"}}]')
    assert_user_error(build(study, "--only", "faces"), study / "results" / "faces.json", "not a result file")
    rows = json.loads((study / "results" / "adaptation.json").read_text())
    del rows[0]["scores"]["accuracy"]
    (study / "results" / "adaptation.json").write_text(json.dumps(rows))
    assert_user_error(build(study, "--only", "adaptation"), study / "results" / "adaptation.json", "no accuracy")
    (study / "checkpoints" / "p1_sngan.safetensors").write_text("")
    (study / "results" / "faces.json").unlink()
    assert_user_error(build(study, "--only", "faces"), "p1_sngan.safetensors")


def test_a_failing_script_is_named_by_its_own_line(tmp_path, monkeypatch):
    with pytest.raises(report.UserError, match=r"^p1_test.py: error: .*none.safetensors: no such weight file"):
        report.call("p1_test.py", "--out", tmp_path / "o", "--weights", tmp_path / "none.safetensors")


def test_scripts_of_the_repository_are_called(study, monkeypatch):
    """With tiny weights, really: digits are generated and drawn by p2_test.py in a process of its own."""
    monkeypatch.setattr(tables, "HERE", ROOT)
    out = study / "digits"
    arguments = ("--weights", study / "checkpoints" / "p2_unet.safetensors", "--per-digit", 1, "--steps", 1)
    report.call("p2_test.py", "--out", out, *arguments, "--grid", study / "grid.png", "--device", "cpu")
    assert len(list(out.iterdir())) == 10
    shutil.rmtree(out)

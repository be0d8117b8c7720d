"""Rebuild the report: every table and figure of the study, for the shipped weights or for your own.

  python3 report.py --data hw2_data                    # all of it, into report/
  python3 report.py --data hw2_data --only faces       # one part; the others stay as they are
  python3 report.py --data hw2_data --measure          # measure again, instead of taking results/*.json

Numbers come from results/*.json, as long as these were measured with the weights at hand; missing ones are measured
where there is data. A part that is up to date (same weights, data, results and code) is kept. Without data the parts
that need none are still built, and the others say what they need.
"""

import argparse
import hashlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import p1_test
import p1_train
import p2_test
import p2_train
import p3_train
from common.checkpoint import history, load_network, load_weights
from common.errors import Parser, UserError, run_main
from common.files import atomic, make_folder, read_json, write_json
from common.pictures import plot_curves, save_png, sheet
from common.results import read_results, stored, weights_id
from datasets.images import find_mosaics, fingerprint
from models import dcgan, sngan
from models.dann import DomainClassifier, FeatureExtractor, LabelPredictor
from models.diffusion import Process, timesteps
from models.unet import UNet_conditional

HERE = Path(__file__).resolve().parent
CHECKPOINTS, RESULTS = HERE / "checkpoints", HERE / "results"
SEEDS = range(5)  # sampling seeds of the faces
FACES, DIGITS = 1000, 100  # images that are scored: faces, and of each digit
GANS = {"dcgan": "DCGAN", "sngan": "SNGAN"}
TARGETS = {"svhn": "SVHN", "usps": "USPS"}
METHODS = {  # (method, network): title
    ("source", "resnet34"): "source only, ResNet34",
    ("source", "dann"): "source only",
    ("dann", "dann"): "DANN",
    ("dann-st", "dann"): "DANN-ST",
    ("target", "dann"): "trained on target",
    ("target", "resnet34"): "trained on target, ResNet34",
}
SETTING = ("--model", "--students", "--dim", "--batch-size", "--steps")  # runs that differ in these are not compared
# options of the training scripts, with a value, that are no part of a recipe
NO_RECIPE = {"--method", "--target", "--seed", "--data", "--out", "--record"}
NO_RECIPE |= {"--eval-every", "--eval-images", "--sample-every", "--save-every", "--device"}
PUBLISHED = {  # the published report's numbers
    "dcgan": "FID 38.68, faces 91.4 %",
    "sngan": "FID 25.66, faces 92.2 %",
    "svhn": {"source only, ResNet34": "19.159", "DANN": "64.506", "trained on target, ResNet34": "96.038"},
    "usps": {"source only, ResNet34": "50.645", "DANN": "86.425", "trained on target, ResNet34": "98.658"},
}


@dataclass
class Part:
    """A chapter: its heading, what builds its text, and the files it is made from."""

    title: str
    build: Callable[[argparse.Namespace], str]
    weights: tuple[str, ...] = ()  # under checkpoints/
    results: tuple[str, ...] = ()  # under results/
    code: tuple[str, ...] = ()  # scripts and packages
    data: tuple[str, ...] = ()  # folders under --data


# Tables: text from result files, used by README, too


def mean_and_spread(values: list[float], digits: int, sign: str = "") -> str:
    """'0.666 ± 0.003', or the only value; with ``sign`` "+" that of a positive mean is written, too."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def rows_of(path: Path, file: Path | None = None, **key: object) -> list[dict]:
    """Rows of a result file with these entries in their keys, measured with the weight file ``file`` as it is now."""
    if not path.exists() or (file and not file.exists()):
        return []
    wanted = stored(key)
    found = [row for row in read_results(path) if all(row["key"].get(k) == v for k, v in wanted.items())]
    if file:
        weights = weights_id(file)
        found = [row for row in found if row["weights"] == weights]
    return [row | {part: Entries(row[part], path) for part in ("key", "scores")} for row in found]


class Entries(dict):
    """Entries of a row, which end in an error that names the file when one is asked for that is not there."""

    def __init__(self, entries: dict, path: Path):
        super().__init__(entries)
        self.path = path

    def __missing__(self, name: str) -> object:
        raise UserError(f"{self.path}: a row has no {name}; measure it again, or restore the file with git")


def training(card: dict) -> str:
    """Steps, batch size, minutes and hardware, from a weight file's card; sums over the runs that led to it."""
    runs = history(card)
    steps, minutes = (sum(run[name] for run in runs) for name in ("steps", "minutes"))
    return f"{steps:,} steps of {card['options']['batch_size']}, {minutes:.0f} min on {card['hardware']}"


def column(rows: list[dict], name: str) -> list[float]:
    return [row["scores"][name] for row in rows]


def distances(row: dict) -> list[str]:
    """Names of the Fréchet distances in a row, fewest features first."""
    return [name for name in row["scores"] if name.startswith("F") and not name.endswith("_floor")]


def faces_table() -> str:
    """Distance and face rate over sampling seeds: of both generators, of the same networks trained for as many steps by
    the report's recipe (p1_sngan_report.safetensors, not shipped), and of real faces."""
    path, lines = RESULTS / "faces.json", []
    measured = {"training data (the floor)": rows_of(path, weights="real", images=FACES)}
    for name, title in GANS.items():
        measured[f"{title}, report's recipe"] = rows_of(path, weights=f"p1_{name}_report", images=FACES)
        measured[title] = rows_of(path, CHECKPOINTS / f"p1_{name}.safetensors", images=FACES)
    names = {name for rows in measured.values() for row in rows for name in distances(row)}
    if not names:
        return "Not measured yet: results/faces.json has no rows for these weights."
    if len(names) > 1:
        raise UserError(f"{path}: mixes {' and '.join(sorted(names))}; measure again with --measure")
    (fd,) = names
    published = {title: PUBLISHED[name] for name, title in GANS.items()}
    for title, rows in measured.items():
        if rows:
            scores = [mean_and_spread(column(rows, fd), 3), f"{mean_and_spread(column(rows, 'faces'), 1)} %"]
            lines.append([title, str(len(rows)), *scores, published.get(title, "")])
    return table([f"{FACES:,} images of", "seeds", fd, "exactly one face", "published report"], lines)


def scored_digits(**key: object) -> list[dict]:
    """Rows of the shipped UNet with the default sampler."""
    default = p2_test.FAST | {"per_digit": DIGITS, "scored": "val"}
    return rows_of(RESULTS / "digits.json", CHECKPOINTS / "p2_unet.safetensors", **default, **key)


def digits_table() -> str:
    """Accuracy and distances of 1,000 digits with the default sampler, over seeds."""
    rows = scored_digits()
    if not rows:
        return "Not measured yet: results/digits.json has no rows for these weights."
    accuracy = f"{mean_and_spread(column(rows, 'accuracy'), 2)} %"
    lines = [[f"read correctly by the classifier, {len(rows)} sampling seed(s)", accuracy, ""]]
    for name in distances(rows[0]):
        floor = f"{rows[0]['scores'][f'{name}_floor']:.4f}"
        lines.append([f"{name} to 2,000 validation digits", mean_and_spread(column(rows, name), 3), floor])
    for name, title in (("mean", "mean"), ("std", "standard deviation")):
        ours, floor = (
            ", ".join(f"{statistics.mean(column(rows, f'{name}_{c}{suffix}')):+.1f}" for c in "rgb")
            for suffix in ("", "_floor")
        )
        lines.append([f"{title} of red, green, blue against validation digits, %", ours, floor])
    near, real = min(column(rows, "nearest_least")), rows[0]["scores"]["nearest_real_least"]
    lines.append(["gray levels to the nearest training digit, at least", f"{near:.1f}", f"{real:.1f} (validation)"])
    per_digit = [f"{statistics.mean(column(rows, f'digit_{d}')):.0f}" for d in range(10)]
    text = table([f"{10 * DIGITS:,} generated digits", "", "real training digits"], lines)
    return f"{text}\n\n" + table(["digit", *map(str, range(10))], [["read correctly, %", *per_digit]])


def samplers_table() -> str:
    """Accuracy, distances to held-out training digits and time for samplers, steps and guidance."""
    rows = rows_of(RESULTS / "samplers.json", CHECKPOINTS / "p2_unet.safetensors", scored="held-out")
    if not rows:
        return "Not measured yet: results/samplers.json has no rows for these weights."
    lines = []
    for row in sorted(rows, key=lambda r: [r["key"][k] for k in ("per_digit", "sampler", "steps", "w", "power")]):
        key, scores = row["key"], row["scores"]
        low, high = key["guide"]
        guided = "" if key["w"] == 0 else "all" if (low, high) == (1, 600) else f"{low} to {high}"
        count = len(key["digits"]) * key["per_digit"]
        name = f"{key['sampler']}, eta {key['eta']:g}" if key["eta"] else key["sampler"]
        start = "mean colour" if key["mean"] else "0"
        cells = [name, key["steps"], key["power"], f"{key['w']:g}", guided, f"{key['rescale']:g}", start, count]
        found = [f"{scores[name]:.3f}" for name in distances(row)]
        colour = " / ".join(f"{max(abs(scores[f'{name}_{c}']) for c in 'rgb'):.1f}" for name in ("mean", "std"))
        taken = timesteps(Process(), key["steps"], key["power"])[:-1]
        calls = str(sum(1 + bool(key["w"] and low <= t <= high) for t in taken))
        cost = f"{1000 * scores['seconds'] / count:.0f}" if "seconds" in scores else ""
        lines.append([*map(str, cells), f"{scores['accuracy']:.1f}", *found, colour, calls, cost, row["hardware"]])
    settings = ["sampler", "steps", "power", "w", "guided t", "rescale", "start", "images"]
    header = [*settings, "accuracy, %", *distances(rows[0]), "colour off, %", "calls", "ms an image", "on"]
    return table(header, lines)


def adaptation_rows(**key: object) -> list[dict]:
    """Rows of adaptation on validation digits, with these entries in their keys."""
    return rows_of(RESULTS / "adaptation.json", scored="val", **key)


def adaptation_table() -> str:
    """Accuracy on the targets' validation digits: mean and deviation over training seeds."""
    lines = []
    for target, name in TARGETS.items():
        for (method, network), title in METHODS.items():
            rows = adaptation_rows(checkpoint="best", target=target, method=method, network=network)
            if rows:
                cells = [f"{mean_and_spread(column(rows, 'accuracy'), 2)} %", PUBLISHED[target].get(title, "")]
                cells.append(f"{statistics.mean(column(rows, 'minutes')):.0f}")
                lines.append([name, title, str(len(rows)), *cells])
    if not lines:
        return "Not measured yet: results/adaptation.json is missing."
    header = ["MNIST-M to", "method", "training seeds", "accuracy", "published report, %", "minutes of training"]
    return table(header, lines)


def seeds_table() -> str:
    """Every training seed of the adapted networks: the label-free validator, and the accuracy of what it chose.

    The oracle is the best of all kept checkpoints (--keep) by the target's labels: what any choice could reach at most.
    """
    last = {row["key"]["training"]: f"{row['scores']['accuracy']:.2f} %" for row in adaptation_rows(checkpoint="last")}
    every: dict[str, list[float]] = {}  # accuracies of all kept checkpoints of a run
    for row in adaptation_rows():
        if row["key"]["checkpoint"].startswith("step_"):
            every.setdefault(row["key"]["training"], []).append(row["scores"]["accuracy"])
    lines = []
    for target, name in TARGETS.items():
        weights = CHECKPOINTS / f"p3_{target}.safetensors"
        shipped = weights_id(weights) if weights.exists() else None
        for method in ("dann", "dann-st"):
            rows = adaptation_rows(checkpoint="best", target=target, method=method, network="dann")
            for row in sorted(rows, key=lambda r: r["key"]["seed"]):
                key, scores = row["key"], row["scores"]
                cells = [name, METHODS[method, "dann"], str(key["seed"]), f"{scores['validator']:.4f}"]
                cells += [f"{scores['source']:.1f} %", f"{scores['accuracy']:.2f} %", last.get(key["training"], "")]
                cells.append(f"{max(every[key['training']]):.2f} %" if key["training"] in every else "")
                lines.append([*cells, "shipped" if row["weights"] == shipped else ""])
    if not lines:
        return "Not measured yet: results/adaptation.json has no seeds of adapted networks."
    header = ["MNIST-M to", "method", "seed", "validator", "held-out source"]
    return table([*header, "checkpoint chosen", "last checkpoint", "best checkpoint (oracle)", ""], lines)


def ablation_table() -> str:
    """What single options do to the adapted recipes: accuracy on target training images, and for each change the
    differences to the recipe's run of the same seed."""
    accuracy: dict[tuple[str, str], dict[tuple[str, int], float]] = {}  # (recipe, change): by target and seed
    for row in rows_of(RESULTS / "ablation.json", scored="train", checkpoint="best"):
        recipe, change = split_command(row["key"]["training"])
        found = accuracy.setdefault((f"{METHODS[row['key']['method'], 'dann']} {recipe}".strip(), change), {})
        found[row["key"]["target"], row["key"]["seed"]] = row["scores"]["accuracy"]
    lines = []
    for (recipe, change), found in accuracy.items():
        base = accuracy.get((recipe, ""), {})
        values = [
            [v - (base[k] if change else 0) for k, v in found.items() if k in base and k[0] == t] for t in TARGETS
        ]
        measured = [of_target for of_target in values if of_target]
        if not measured:  # nothing to compare with
            continue
        label, sign, unit = (f"`{change}`", "+", "") if change else ("as it is", "", " %")
        cells = [mean_and_spread(of_target, 1, sign) + unit if of_target else "" for of_target in values]
        seeds = "-".join(map(str, sorted(set(map(len, measured)))))
        place = recipe, bool(change), statistics.mean(map(statistics.mean, measured))  # worst change first
        lines.append((place, [recipe, label, seeds, *cells]))
    if not lines:
        return "Not measured yet: results/ablation.json is missing."
    return table(["recipe", "change", "seeds", *TARGETS.values()], [cells for _, cells in sorted(lines)])


def recipes_table(script: str, read: str, title: str) -> str:
    """What recipes and single options score after the same short training: means over training seeds, best first.
    Nothing without rows of ``script``.

    ``read``, ``title``: the score beside the Fréchet distance, and its heading.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows_of(RESULTS / "recipes.json"):
        if shlex.split(row["key"]["training"])[1] == script:
            found.setdefault(split_command(row["key"]["training"]), []).append(row)
    if not found:
        return ""
    lines = []
    for (recipe, change), rows in found.items():
        cells = [recipe, f"`{change}`" if change else "as it is", str(len(rows))]
        cells += [mean_and_spread(column(rows, "fd"), 3), f"{mean_and_spread(column(rows, read), 1)} %"]
        lines.append(((recipe, statistics.mean(column(rows, "fd"))), cells))
    header = ["recipe", "change", "training seeds", "distance to held-out images", title]
    return table(header, [cells for _, cells in sorted(lines)])


def recipes(title: str, found: str) -> list[str]:
    """The chapter of a table of recipes; none for an empty one."""
    return [title, RECIPES, found] if found else []


def face_recipes_table() -> str:
    return recipes_table("p1_train.py", "faces", "exactly one face")


def digit_recipes_table() -> str:
    return recipes_table("p2_train.py", "accuracy", "read correctly")


def split_command(command: str) -> tuple[str, str]:
    """(its networks, steps and batch size, its options of the recipe) of a command of a training script."""
    given = [w.split("=", 1) if w.startswith("--") else [w] for w in shlex.split(command)[2:]]
    words, recipe, change = (word for parts in given for word in parts), {}, []
    for word in words:
        if word == "--keep":
            continue
        if word in SETTING:
            recipe[word] = next(words)
        elif word in NO_RECIPE:
            next(words)
        elif word == "--recipe":
            name = next(words)
            change += [] if name == "ours" else [word, name]
        else:
            change.append(word)
    setting = [word for name in SETTING if name in recipe for word in (name, recipe[name])]
    return f"`{shlex.join(setting)}`" if setting else "", shlex.join(change)


# Parts


def networks(_o: argparse.Namespace) -> str:
    shown = {
        "Generator (both)": dcgan.Generator(),
        "DCGAN discriminator": dcgan.Discriminator(),
        "SNGAN discriminator": sngan.Discriminator(),
        "UNet_conditional": UNet_conditional(),
        "DANN feature extractor": FeatureExtractor(),
        "DANN label predictor": LabelPredictor(),
        "DANN domain classifier": DomainClassifier(),
    }
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in shown.items()}
    prints = [f"### {name}\n\n```\n{network}\n```" for name, network in shown.items()]
    return table(["network", "parameters"], [[n, f"{c:,}"] for n, c in counts.items()]) + "\n\n" + "\n\n".join(prints)


def curves(o: argparse.Namespace, run: str, name: str, panels: dict[str, tuple[str, ...]], title: str) -> list[str]:
    """Draw curves_NAME.png from the shipped metrics of a run; returns the lines that show it, none without metrics."""
    metrics = RESULTS / f"{run}_metrics.csv"
    if not metrics.exists():
        return []
    plot_curves(metrics, o.out / f"curves_{name}.png", panels, title)
    return [f"![{title}](curves_{name}.png)"]


def build_faces(o: argparse.Namespace) -> str:
    text = []
    for name in GANS:
        weights = CHECKPOINTS / f"p1_{name}.safetensors"
        for seed in SEEDS:
            if o.measure or not rows_of(RESULTS / "faces.json", weights, seed=seed, images=FACES):
                measure_faces(o, "--weights", weights, "--seed", seed)
    if o.measure or not rows_of(RESULTS / "faces.json", weights="real", images=FACES):
        measure_faces(o, "--real")
    text += [faces_table(), *recipes("### Face recipes", face_recipes_table())]
    for name, title in GANS.items():
        generator, card = load_network(CHECKPOINTS / f"p1_{name}.safetensors", {name: dcgan.Generator})
        images = p1_test.generate(generator, 32, 0, torch.device("cpu"))
        save_png(sheet(images, columns=8), o.out / f"faces_{name}.png")
        text.append(f"### {title}\n\n{training(card)}. The first 32 faces of seed 0:\n\n![{title}](faces_{name}.png)")
        text += curves(o, f"p1_{name}", name, p1_train.FaceTrainer.panels, f"{title}, training")
    return "\n\n".join(text)


def measure_faces(o: argparse.Namespace, *arguments: object) -> None:
    measure(o, "p1_test.py", o.data and o.data / "face", RESULTS / "faces.json", "--count", FACES, *arguments)


def build_digits(o: argparse.Namespace) -> str:
    weights = CHECKPOINTS / "p2_unet.safetensors"
    _, card = load_weights(weights)
    if o.measure or not scored_digits(seed=0):
        arguments = ("--weights", weights, "--per-digit", DIGITS)
        measure(o, "p2_test.py", o.data and o.data / "digits" / "mnistm", RESULTS / "digits.json", *arguments)
    text = [f"{training(card)}.", digits_table()]
    text += ["### Samplers", SAMPLERS, samplers_table(), *recipes("### Digit recipes", digit_recipes_table())]
    if drawn := curves(o, "p2_unet", "unet", p2_train.DiffusionTrainer.panels, "UNet, training"):
        text += ["### Training", last_run(card), *drawn]
    return "\n\n".join(text)


def last_run(card: dict) -> str:
    """What the curves of the UNet's training show."""
    sampler = "{sampler} ({steps} steps, w = {w:g})".format(**vars(p2_train.EVAL))
    return (
        f"The last run, {card['steps']:,} steps. Its scores are of {card['options'].get('eval_images', 0)} samples of "
        f"{sampler} against held-out training digits, and cannot be compared with the tables'."
    )


def draw_digits(o: argparse.Namespace) -> str:
    """Pictures of the digits; those of all 1,000 samples need data."""
    titles = {
        "grid": "The first 10 of each digit, seed 0",
        "trajectory": "Ancestral sampling of the first 0, after t of 600 reverse steps",
        "unsure": f"The {p2_test.UNSURE} of {10 * DIGITS:,} least surely read; probability of what was asked for",
        "neighbours": "The ten samples nearest to a training digit (left), beside the 7 nearest training digits",
    }
    drawn = [name for name in titles if o.data or name not in ("unsure", "neighbours")]
    options = [x for name in drawn for x in (f"--{name}", o.out / f"digits_{name}.png")]
    options += ["--evaluate", o.data / "digits" / "mnistm"] if o.data else []
    options += ["--per-digit", DIGITS if o.data else 10]
    with tempfile.TemporaryDirectory() as folder:
        call("p2_test.py", "--out", folder, "--weights", CHECKPOINTS / "p2_unet.safetensors", *options)
    text = [f"### {titles[name]}\n\n![{titles[name]}](digits_{name}.png)" for name in drawn]
    if not o.data:
        text.append("The least sure and the nearest digits need data: add --data hw2_data.")
    return "\n\n".join(text)


def build_adaptation(o: argparse.Namespace) -> str:
    text = [adaptation_table(), "### Seeds", seeds_table()]
    if (RESULTS / "ablation.json").exists():
        text += ["### Ablation", ABLATION, ablation_table()]
    for target, name in TARGETS.items():
        weights = CHECKPOINTS / f"p3_{target}.safetensors"
        if not weights.exists():
            text.append(f"No weights for {name} yet: {weights.relative_to(HERE)} is missing.")
            continue
        _, card = load_weights(weights)
        text.append(f"### MNIST-M to {name}\n\nShipped: seed {card['options']['seed']}, {training(card)}.")
        figures = [o.out / f"tsne_{target}_{by}.png" for by in ("class", "domain")]
        if o.data:
            call("p3_test.py", "--tsne", o.out, "--target", target, "--data", o.data / "digits")
        text += [f"![{name}, t-SNE]({path.name})" for path in figures if path.exists()]
        if not all(path.exists() for path in figures):
            text.append(f"The t-SNE plots of {name} need data: add --data hw2_data.")
        title = f"DANN-ST, MNIST-M to {name}, training"
        text += curves(o, f"p3_{target}", target, p3_train.AdaptationTrainer.panels, title)
    return "\n\n".join(text)


def observations(_o: argparse.Namespace) -> str:
    path = RESULTS / "observations.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "Not written yet."


SAMPLERS = """\
Scores are against the held-out training digits: a sampler is chosen without the validation digits. Rows of as many
images start from the same noise, and distances can be compared between them only: those of fewer images are larger.
Colour off: the largest difference of the means of red, green and blue, and of their deviations. Calls: of the network,
for an image. Times, with other work beside, can be compared on one processor only."""

RECIPES = """\
Rows with the same first column can be compared: runs of the same length, annealed within it where the recipe anneals,
and scored at their end on the slice of the training images that is held out. So a recipe is chosen without the
validation images."""

ABLATION = """\
Accuracy on the first 2,000 training images of the target, whose labels are read to score and never to train; for
changes, its difference to the recipe's run of the same seed. DANN without `--batch-size` is the whole recipe of commit
cdea116, 600 steps of 64 (on SVHN in colour, with `--adversary 0.3`; on USPS with changed intensities; made on an H100
in 0.2 to 0.4 minutes). Today's has the changes that end its list, the stronger adversary on SVHN and unchanged
intensities on USPS, and sees SVHN in gray. Its short runs (250 steps of 32) are older than commit 29ecad5: until then
the recipe of SVHN changed intensities, too. `--intensity`, `--entropy` and `--mixup` are no more: commits cdea116 and
dfbb575 have them. DANN-ST has today's recipes in short runs, on SVHN of the first network alone (`--students 0`), of 8
to 19 minutes of a core on SVHN, 5 to 17 on USPS, by what ran beside them.

A row of DANN (`--no-fit` on SVHN), one of DANN-ST, and how they are scored:

    python3 p3_train.py --method dann --target svhn --no-fit --no-gray --adversary 0.3 --steps 600 --seed 0 \
--eval-every 100000 --data hw2_data/digits
    python3 p3_train.py --target svhn --students 0 --steps 600 --no-fade --seed 0 --eval-every 600 --data \
hw2_data/digits
    head -2001 hw2_data/digits/svhn/train.csv > train.csv
    python3 p3_test.py --images hw2_data/digits/svhn/data --target svhn --weights \
runs/p3_dann_svhn_000/best.safetensors --out labels.csv --evaluate train.csv --record results/ablation.json"""

HEAD = """\
# Report

Every table and figure of the study, made by `python3 report.py --data hw2_data` from the shipped weights. The tables
are those of `results/*.json`, where each row has its command, commit and hardware; some numbers of the observations are
of earlier runs, whose rows the history of these files has. Definitions are in the repository's README, [The
numbers](../README.md#the-numbers)."""

MODULES = ("common", "datasets", "metrics", "models")
PARTS = {
    "faces": Part(
        "Faces: DCGAN and SNGAN",
        build_faces,
        ("p1_dcgan", "p1_sngan"),
        ("faces.json", "recipes.json", "p1_dcgan_metrics.csv", "p1_sngan_metrics.csv"),
        ("p1_test.py", *MODULES),
        ("face",),
    ),
    "digits": Part(
        "Digits: class-conditional diffusion",
        build_digits,
        ("p2_unet", "digit_classifier"),
        ("digits.json", "samplers.json", "recipes.json", "p2_unet_metrics.csv"),
        ("p2_test.py", *MODULES),
        ("digits/mnistm",),
    ),
    "pictures": Part(
        "Digits: pictures",
        draw_digits,
        ("p2_unet", "digit_classifier"),
        code=("p2_test.py", *MODULES),
        data=("digits/mnistm",),
    ),
    "adaptation": Part(
        "Adaptation: MNIST-M to SVHN and USPS",
        build_adaptation,
        ("p3_svhn", "p3_usps"),
        ("adaptation.json", "ablation.json", "p3_svhn_metrics.csv", "p3_usps_metrics.csv"),
        ("p3_test.py", *MODULES),
        ("digits/mnistm", "digits/svhn", "digits/usps"),
    ),
    "observations": Part("Observations and limits", observations, results=("observations.md",)),
    "networks": Part("Networks, as printed", networks, code=("models",)),
}


def call(script: str, *arguments: object) -> None:
    """Run a script of this repository. Raises UserError with its own error line when it fails."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("  " + shlex.join(["python3", script, *map(str, arguments)]), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"{script} ended with {done.returncode}"])[-1])


def measure(o: argparse.Namespace, script: str, data: Path | None, record: Path, *arguments: object) -> None:
    """Let a script generate, score and record; without data, say so and leave it."""
    if not data:
        print(f"  not measured: {script} {shlex.join(map(str, arguments))} needs --data")
        return
    with tempfile.TemporaryDirectory() as folder:
        call(script, "--out", folder, *arguments, "--evaluate", data, "--record", record)


def part_key(part: Part, o: argparse.Namespace) -> str:
    """Changes when the weights, results, code or data of a part change."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    files = [CHECKPOINTS / f"{name}.safetensors" for name in part.weights] + [RESULTS / name for name in part.results]
    for name in part.code:
        files += sorted((HERE / name).rglob("*.py")) if (HERE / name).is_dir() else [HERE / name]
    for path in files:
        digest.update(f"{path.name}\0".encode() + (path.read_bytes() if path.exists() else b"missing"))
    for name in part.data if o.data else ():
        folder = o.data / name
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; see README, Data, or leave --data out")
        inside = [
            folder / "val",
            folder / "train",
            folder / "data",
            *folder.glob("*.csv"),
            *find_mosaics(folder, "val"),
        ]
        digest.update(fingerprint(sorted(p for p in inside if p.exists())).encode())
    return digest.hexdigest()


def read_parts(path: Path) -> dict[str, str]:
    """The texts of the parts that a README.md has."""
    if not path.exists():
        return {}
    head, *chapters = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not head.startswith("# Report\n"):
        raise UserError(f"{path}: not made by this script; move it away, or give --out another folder")
    texts = dict(zip(chapters[::2], chapters[1::2], strict=True))
    return {name: texts[part.title].strip() for name, part in PARTS.items() if part.title in texts}


def write_parts(path: Path, texts: dict[str, str]) -> None:
    """All parts that there are, in order, into README.md."""
    chapters = [f"## {part.title}\n\n{texts[name]}" for name, part in PARTS.items() if name in texts]
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join([HEAD, *chapters]) + "\n", encoding="utf-8")


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with face/ and digits/; without it nothing is measured")
    parser.add_argument("--out", type=Path, default=HERE / "report", help="default: report/ beside this script")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--measure", action="store_true", help="measure again what results/ has")
    return parser


def main() -> None:
    o = build_parser().parse_args(sys.argv[1:])
    path, state = make_folder(o.out) / "README.md", o.out / ".parts.json"
    texts, known = read_parts(path), read_json(state) or {}

    def up_to_date(name: str) -> bool:
        if o.measure or name not in texts or known.get(name) != [part_key(PARTS[name], o), texts[name]]:
            return False
        return all((o.out / picture).is_file() for picture in re.findall(r"\]\(([^)]+\.png)\)", texts[name]))

    for name in o.only or PARTS:
        part = PARTS[name]
        if up_to_date(name):
            continue
        print(f"{name}:", flush=True)
        texts[name] = part.build(o).strip()
        known[name] = [part_key(part, o), texts[name]]  # measured rows are part of the key
        write_parts(path, texts)
        write_json(state, known)
    print(f"{path}: up to date")


if __name__ == "__main__":
    run_main(main)

"""Rebuild the report: every table and figure of the study, for the shipped weights or for your own.

  python3 report.py --data hw2_data                    # all of it, into report/
  python3 report.py --data hw2_data --only faces       # one part; the others stay as they are
  python3 report.py --data hw2_data --measure          # score faces and digits again, instead of taking results/*.json

Numbers come from results/*.json, as long as these were measured with the weights at hand; missing ones are measured
where there is data. A part that is up to date (same weights, data, results and code) is kept. Without data the parts
that need none are still built, and the others say what they need.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import hashlib
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import p1_test
import p1_train
import p2_test
import p2_train
import p3_train
import report_tables as tables
from common.checkpoint import load_network, load_weights
from common.errors import Parser, UserError, run_main
from common.files import atomic, make_folder, read_json, write_json
from common.pictures import plot_curves, save_png, sheet
from datasets.images import find_mosaics, fingerprint
from models import dcgan, sngan
from models.dann import DomainClassifier, FeatureExtractor, LabelPredictor
from models.unet import UNet_conditional

FACE_SEEDS, DIGIT_SEEDS = range(5), range(3)  # of sampling


@dataclass
class Part:
    """A chapter: its heading, what builds its text, and the files it is made from."""

    title: str
    build: Callable[[argparse.Namespace], str]
    weights: tuple[str, ...] = ()  # under checkpoints/
    results: tuple[str, ...] = ()  # under results/
    code: tuple[str, ...] = ()  # scripts and packages
    data: tuple[str, ...] = ()  # folders under --data


def recipes(title: str, found: str) -> list[str]:
    """The chapter of a table of recipes; none for an empty one."""
    return [title, RECIPES, found] if found else []


def networks(_o: argparse.Namespace) -> str:
    with torch.device("meta"):  # no values
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
    sizes = tables.table(["network", "parameters"], [[n, f"{c:,}"] for n, c in counts.items()])
    return "\n\n".join([sizes, *prints])


def curves(o: argparse.Namespace, run: str, name: str, panels: dict[str, tuple[str, ...]], title: str) -> list[str]:
    """Draw curves_NAME.png from the shipped metrics of a run; returns the lines that show it, none without metrics."""
    metrics = tables.RESULTS / f"{run}_metrics.csv"
    if not metrics.exists():
        return []
    plot_curves(metrics, o.out / f"curves_{name}.png", panels, title)
    return [f"![{title}](curves_{name}.png)"]


def build_faces(o: argparse.Namespace) -> str:
    text = []
    for name in tables.GANS:
        weights = tables.weight_file(f"p1_{name}")
        for seed in FACE_SEEDS:
            if o.measure or not tables.rows_of(tables.RESULTS / "faces.json", weights, seed=seed, images=tables.FACES):
                measure_faces(o, "--weights", weights, "--seed", seed)
    if o.measure or not tables.rows_of(tables.RESULTS / "faces.json", weights="real", images=tables.FACES):
        measure_faces(o, "--real")
    text += [tables.faces_table(), *recipes("### Face recipes", tables.face_recipes_table())]
    for name, title in tables.GANS.items():
        generator, card = load_network(tables.weight_file(f"p1_{name}"), {name: dcgan.Generator})
        images = p1_test.generate(generator, 32, 0, torch.device("cpu"))
        save_png(sheet(images, columns=8), o.out / f"faces_{name}.png")
        text.append(f"### {title}\n\n{tables.training(card)}. The first 32 faces of seed 0:")
        text.append(f"![{title}](faces_{name}.png)")
        text += curves(o, f"p1_{name}", name, p1_train.FaceTrainer.panels, f"{title}, training")
    return "\n\n".join(text)


def measure_faces(o: argparse.Namespace, *arguments: object) -> None:
    data, record = o.data and o.data / "face", tables.RESULTS / "faces.json"
    measure(o, "p1_test.py", data, record, "--count", tables.FACES, *arguments)


def build_digits(o: argparse.Namespace) -> str:
    weights = tables.weight_file("p2_unet")
    _, card = load_weights(weights)
    data, record = o.data and o.data / "digits" / "mnistm", tables.RESULTS / "digits.json"
    for seed in DIGIT_SEEDS:
        if o.measure or not tables.scored_digits(seed=seed):
            options = ("--weights", weights, "--seed", seed, "--per-digit", tables.DIGITS)
            measure(o, "p2_test.py", data, record, *options)
    _, worse = load_weights(tables.weight_file("p2_guide"))
    trained = f"{tables.training(card)}. The worse UNet of autoguidance: {tables.training(worse)}."
    text = [trained, tables.digits_table(), "### Samplers", SAMPLERS, tables.samplers_table()]
    if starts := tables.starts_table():
        text += ["### Where the distance comes from", STARTS, starts]
    text += recipes("### Digit recipes", tables.digit_recipes_table())
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
    count = 10 * tables.DIGITS
    titles = {
        "grid": "The first 10 of each digit, seed 0",
        "trajectory": "Ancestral sampling of the first 0, after t of 600 reverse steps",
        "unsure": f"The {p2_test.UNSURE} of {count:,} least surely read; probability of what was asked for",
        "neighbours": "The ten samples nearest to a training digit (left), beside the 7 nearest training digits",
    }
    drawn = [name for name in titles if o.data or name not in ("unsure", "neighbours")]
    options = [x for name in drawn for x in (f"--{name}", o.out / f"digits_{name}.png")]
    options += ["--evaluate", o.data / "digits" / "mnistm"] if o.data else []
    options += ["--per-digit", tables.DIGITS if o.data else 10]
    with tempfile.TemporaryDirectory() as folder:
        call("p2_test.py", "--out", folder, "--weights", tables.weight_file("p2_unet"), *options)
    there = [name for name in titles if (o.out / f"digits_{name}.png").exists()]
    note_kept(o.out / f"digits_{name}.png" for name in there if name not in drawn)
    text = [f"### {titles[name]}\n\n![{titles[name]}](digits_{name}.png)" for name in there]
    if len(there) < len(titles):
        text.append("The least sure and the nearest digits need data: add --data hw2_data.")
    return "\n\n".join(text)


def note_kept(figures: Iterable[Path]) -> None:
    """Say which figures are shown as they are, since drawing them needs data."""
    if names := ", ".join(path.name for path in figures):
        print(f"  kept, not drawn again: {names}; where weights have changed, add --data hw2_data")


def build_adaptation(o: argparse.Namespace) -> str:
    text = [tables.adaptation_table(), "### Seeds", tables.seeds_table()]
    if (tables.RESULTS / "ablation.json").exists():
        text += ["### Ablation", ABLATION, tables.ablation_table()]
    for target, name in tables.TARGETS.items():
        weights = tables.weight_file(f"p3_{target}")
        if not weights.exists():
            text.append(f"No weights for {name} yet: {weights.relative_to(tables.HERE)} is missing.")
            continue
        _, card = load_weights(weights)
        text.append(f"### MNIST-M to {name}\n\nShipped: seed {card['options']['seed']}, {tables.training(card)}.")
        figures = [o.out / f"tsne_{target}_{by}.png" for by in ("class", "domain")]
        if o.data:
            call("p3_test.py", "--tsne", o.out, "--target", target, "--data", o.data / "digits")
        there = [path for path in figures if path.exists()]
        if not o.data:
            note_kept(there)
        text += [f"![{name}, t-SNE]({path.name})" for path in there]
        if len(there) < len(figures):
            text.append(f"The t-SNE plots of {name} need data: add --data hw2_data.")
        title = f"DANN-ST, MNIST-M to {name}, training"
        text += curves(o, f"p3_{target}", target, p3_train.AdaptationTrainer.panels, title)
    return "\n\n".join(text)


def observations(_o: argparse.Namespace) -> str:
    path = tables.RESULTS / "observations.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "Not written yet."


SAMPLERS = """\
Scores are against the held-out training digits: a sampler is chosen without the validation digits. Rows of the shipped
weights come first; the others are of weights with which much was tried (named by the start of their SHA-256). Rows
of as many images start from the same noise, and distances can be compared between them only: those of fewer images are
larger. Start: x_T is the noise of this colour (red, green, blue), or plain noise. Rescale with a star: in each channel
guidance left the mean alone, as it did up to commit ee0824b, not the median. Colour off: the largest difference of the
means of red, green and blue, and of their deviations. Autoguide: its strength, and where it acts. Calibrated: whether
the mean errors of predictions were taken off. Calls: of the network, for an image, and of autoguidance's. Times, with
other work beside, can be compared on one processor only."""

STARTS = """\
Real training digits are noised to t, and sampled from there by the default sampler, against the held-out training
digits. t = 0 is what real digits score; what the distance gains from row to row is lost in the steps between. A row:

    python3 p2_test.py --out DIR --per-digit 20 --from-real T --evaluate hw2_data/digits/mnistm --held-out --record \
results/starts.json"""

RECIPES = """\
Rows with the same first column can be compared: runs of the same length, annealed within it where the recipe anneals,
and scored at their end on the slice of the training images that is held out. So a recipe is chosen without the
validation images. Rows of faces were measured when our recipes annealed and the DCGAN's had no penalty and shorter
averages: to repeat them add `--anneal`, except to those of `--no-anneal` and of the report's recipe, and to the DCGAN's
`--ema 0.999 --ema-power 8` and, where a row names no `--r1`, `--r1 0`. Rows of digits that name no `--optimiser` were
measured when our recipe had AdamW: to repeat them add `--optimiser adamw`, and `--lr 3e-4` where they name no
`--lr`."""

ABLATION = """\
Accuracy on the first 2,000 training images of the target, whose labels are read to score and never to train; for
changes, its difference to the recipe's run of the same seed. It is always scored with batch statistics of the target,
with `--no-separate`, too. DANN without `--batch-size` is the whole recipe of commit cdea116, 600 steps of 64 (on SVHN
in colour, with `--adversary 0.3`; on USPS with changed intensities; made on an H100 in 0.2 to 0.4 minutes). Today's
differs: gray, `--adversary 1` and 1,200 steps on SVHN, unchanged intensities on USPS. Its short runs (250 steps of 32)
are older than commit 29ecad5: until then the recipe of SVHN changed intensities, too. `--intensity`, `--entropy` and
`--mixup` are no more: commits cdea116 and dfbb575 have them. DANN-ST has today's recipes in short runs, on SVHN of the
first network alone (`--students 0`), of 8 to 19 minutes of a core on SVHN, 5 to 17 on USPS, by what ran beside them.

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

*The report*, in all that follows, is the published one, whose networks and recipes are repeated here. Every table and
figure of the study, made by `python3 report.py --data hw2_data` from the shipped weights (the report's recipes, from
weights that are not shipped). The tables are those of `results/*.json`, where each row has its command, commit
(`+changes`: the working tree differed from it) and hardware; some numbers of the observations are of earlier runs,
whose rows the history of these files has. Definitions are in the repository's README, [The
numbers](../README.md#the-numbers)."""

MODULES = ("common", "datasets", "metrics", "models")
PARTS = {
    "faces": Part(
        "Faces: DCGAN and SNGAN",
        build_faces,
        ("p1_dcgan", "p1_sngan"),
        ("faces.json", "recipes.json", "p1_dcgan_metrics.csv", "p1_sngan_metrics.csv"),
        ("p1_train.py", "p1_test.py", *MODULES),
        ("face",),
    ),
    "digits": Part(
        "Digits: class-conditional diffusion",
        build_digits,
        ("p2_unet", "p2_guide", "digit_classifier"),
        ("digits.json", "samplers.json", "starts.json", "recipes.json", "p2_unet_metrics.csv"),
        ("p2_train.py", "p2_test.py", *MODULES),
        ("digits/mnistm",),
    ),
    "pictures": Part(
        "Digits: pictures",
        draw_digits,
        ("p2_unet", "p2_guide", "digit_classifier"),
        code=("p2_test.py", *MODULES),
        data=("digits/mnistm",),
    ),
    "adaptation": Part(
        "Adaptation: MNIST-M to SVHN and USPS",
        build_adaptation,
        ("p3_svhn", "p3_usps"),
        ("adaptation.json", "ablation.json", "p3_svhn_metrics.csv", "p3_usps_metrics.csv"),
        ("p3_train.py", "p3_test.py", *MODULES),
        ("digits/mnistm", "digits/svhn", "digits/usps"),
    ),
    "observations": Part("Observations and limits", observations, results=("observations.md",)),
    "networks": Part("Networks, as printed", networks, code=("models",)),
}


def call(script: str, *arguments: object) -> None:
    """Run a script of this repository. Raises UserError with its own error line when it fails."""
    command = [sys.executable, str(tables.HERE / script), *map(str, arguments)]
    print("  " + shlex.join(["python3", script, *map(str, arguments)]), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"{script} ended with {done.returncode}"])[-1])


def measure(o: argparse.Namespace, script: str, data: Path | None, record: Path, *arguments: object) -> None:
    """Let a script generate, score by FD-768 as the tables do, and record; without data, say so and leave it."""
    if not data:
        print(f"  not measured: {script} {shlex.join(map(str, arguments))} needs --data")
        return
    with tempfile.TemporaryDirectory() as folder:
        call(script, "--out", folder, *arguments, "--evaluate", data, "--dims", 768, "--record", record)


def part_key(part: Part, o: argparse.Namespace) -> str:
    """Changes when the weights, results, code or data of a part change."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(tables.__file__).read_bytes())
    files = [*map(tables.weight_file, part.weights), *(tables.RESULTS / name for name in part.results)]
    for name in part.code:
        files += sorted((tables.HERE / name).rglob("*.py")) if (tables.HERE / name).is_dir() else [tables.HERE / name]
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
    head, *chapters = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
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
    parser.add_argument("--out", type=Path, default=tables.HERE / "report", help="default: report/ beside this script")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--measure", action="store_true", help="score again the faces and digits that results/ has")
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

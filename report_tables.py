"""The report's tables: text from result files, which the README shows, too.

Rows of shipped weights count as long as they were measured with the weights at hand.
"""

import shlex
import statistics
from pathlib import Path

import p2_test
from common.checkpoint import history, load_weights
from common.errors import UserError
from common.results import read_results, stored, weights_id
from models.diffusion import Process, timesteps

HERE = Path(__file__).resolve().parent
CHECKPOINTS, RESULTS = HERE / "checkpoints", HERE / "results"
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


def weight_file(name: str) -> Path:
    """A shipped weight file."""
    return CHECKPOINTS / f"{name}.safetensors"


def shipped_id(name: str) -> str | None:
    """What rows say of a shipped weight file, the start of its SHA-256; None where there is no such file."""
    return weights_id(weight_file(name)) if weight_file(name).exists() else None


def mean_and_spread(values: list[float], digits: int, sign: str = "") -> str:
    """'0.666 ± 0.003', or the only value; with ``sign`` "+" that of a positive mean is written, too."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def rows_of(path: Path, file: Path | None = None, **key: object) -> list[dict]:
    """Rows of a result file with these entries (None: not there) in their keys, measured with the weight file ``file``
    as it is now."""
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
    """Steps, batch size, minutes and hardware, from a weight file's card; sums over the runs that led to it, of which
    the batch size is the last one's."""
    runs = history(card)
    steps, minutes = (sum(run[name] for run in runs) for name in ("steps", "minutes"))
    hardware = " and ".join(dict.fromkeys(run["hardware"] for run in runs))
    last = f", the last {card['steps']:,}" if len(runs) > 1 else ""
    return f"{steps:,} steps{last} of {card['options']['batch_size']}, {minutes:.0f} min on {hardware}"


def column(rows: list[dict], name: str) -> list[float]:
    return [row["scores"][name] for row in rows]


def distances(row: dict) -> list[str]:
    """Names of the Fréchet distances in a row, fewest features first."""
    return [name for name in row["scores"] if name.startswith("F") and not name.endswith("_floor")]


def faces_table() -> str:
    """Distance and face rate over sampling seeds: of both generators, of the same networks trained by the report's
    recipe (p1_sngan_report.safetensors, not shipped), and of real faces."""
    path, lines = RESULTS / "faces.json", []
    measured = {"training data (the floor)": rows_of(path, weights="real", images=FACES)}
    for name, title in GANS.items():
        measured[f"{title}, report's recipe"] = rows_of(path, weights=f"p1_{name}_report", images=FACES)
        measured[title] = rows_of(path, weight_file(f"p1_{name}"), images=FACES)
    names = {name for rows in measured.values() for row in rows for name in distances(row)}
    if not names:
        return "Not measured yet: results/faces.json has no rows for these weights."
    if len(names) > 1:
        raise UserError(f"{path}: mixes {' and '.join(sorted(names))}; measure all with the same --dims")
    (fd,) = names
    published = {title: PUBLISHED[name] for name, title in GANS.items()}
    for title, rows in measured.items():
        if rows:
            scores = [mean_and_spread(column(rows, fd), 3), f"{mean_and_spread(column(rows, 'faces'), 1)} %"]
            lines.append([title, str(len(rows)), *scores, published.get(title, "")])
    return table([f"{FACES:,} images of", "seeds", fd, "exactly one face", "published report"], lines)


def by_default(file: str, **key: object) -> list[dict]:
    """Rows of a result file with the shipped UNet and the default sampler, as the code is now: "keeps" marks older."""
    weights = weight_file("p2_unet")
    if not weights.exists():
        return []
    card = load_weights(weights)[1]
    now = p2_test.FAST | {"mean": p2_test.mean_colour(card, weights), "autoguide_by": shipped_id("p2_guide")}
    now |= {"calibrate": True if "mean_errors" in card else None, "keeps": None}
    return rows_of(RESULTS / file, weights, **now, **key)


def scored_digits(**key: object) -> list[dict]:
    """Rows of digits.json with the default sampler."""
    return by_default("digits.json", per_digit=DIGITS, scored="val", from_real=None, **key)


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
    """Accuracy, distances to held-out training digits and time for samplers, steps and guidance, with the shipped
    weights and with those for which the default was chosen."""
    shown = [shipped_id("p2_unet"), *p2_test.CHOSEN_WITH]
    rows = rows_of(RESULTS / "samplers.json", scored="held-out", from_real=None)
    rows = [row for row in rows if row["weights"] in shown]
    if not rows:
        return "Not measured yet: results/samplers.json has no rows for these weights."
    lines = []
    order = ("per_digit", "sampler", "steps", "w", "power")
    for row in sorted(rows, key=lambda r: [shown.index(r["weights"]), *(r["key"][k] for k in order)]):
        key, scores = row["key"], row["scores"]
        low, high = key["guide"]
        guided = "" if key["w"] == 0 else "all" if (low, high) == (1, 600) else f"{low} to {high}"
        count = len(key["digits"]) * key["per_digit"]
        name = f"{key['sampler']}, eta {key['eta']:g}" if key["eta"] else key["sampler"]
        start = " ".join(f"{c:.0f}" for c in key["mean"]) if key["mean"] else "0"
        found = [f"{scores[name]:.3f}" for name in distances(row)]
        colour = " / ".join(f"{max(abs(scores[f'{name}_{c}']) for c in 'rgb'):.1f}" for name in ("mean", "std"))
        taken = timesteps(Process(), key["steps"], key["power"])[:-1]
        calls = str(sum(1 + bool(key["w"] and low <= t <= high) for t in taken))
        autoguided = ""
        if "autoguide" in key:
            first, last = key["autoguide_t"]
            calls += f" + {sum(first <= t <= last for t in taken)}"
            autoguided = f"{key['autoguide']:g}, {first} to {last}"
        cells = [row["weights"][:8], name, key["steps"], key["power"], f"{key['w']:g}", guided]
        cells += [f"{key['rescale']:g}{'*' if key.get('keeps') == 'mean' else ''}", autoguided]
        cells += ["yes" if key.get("calibrate") else "", start, count]
        cost = f"{1000 * scores['seconds'] / count:.0f}" if "seconds" in scores else ""
        lines.append([*map(str, cells), f"{scores['accuracy']:.1f}", *found, colour, calls, cost, row["hardware"]])
    settings = ["weights", "sampler", "steps", "power", "w", "guided t", "rescale", "autoguide, t"]
    settings += ["calibrated", "start", "images"]
    header = [*settings, "accuracy, %", *distances(rows[0]), "colour off, %", "calls", "ms an image", "on"]
    return table(header, lines)


def starts_table() -> str:
    """What the steps below t cost: accuracy and distances of digits sampled from real ones noised to t."""
    rows = by_default("starts.json", scored="held-out")
    if not rows:
        return ""
    lines, noise = [], Process().T + 1
    for row in sorted(rows, key=lambda row: row["key"].get("from_real", noise)):
        key, scores = row["key"], row["scores"]
        start = f"real digits at t = {key['from_real']}" if "from_real" in key else "noise"
        found = [f"{scores[name]:.3f}" for name in distances(row)]
        lines.append([start, str(len(key["digits"]) * key["per_digit"]), f"{scores['accuracy']:.1f}", *found])
    return table(["start", "images", "accuracy, %", *distances(rows[0])], lines)


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
        shipped = shipped_id(f"p3_{target}")
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
    for row in rows_of(RESULTS / "ablation.json", scored="train", checkpoint="best", budget=None):
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
    for row in rows_of(RESULTS / "recipes.json", budget=None):  # runs of the length that their command says
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

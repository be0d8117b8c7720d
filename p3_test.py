"""Classify the digits of a target domain (problem 3), and look at what was learnt.

  python3 p3_test.py --images hw2_data/digits/svhn/data --out labels.csv      # image_name,label, sorted by name
  python3 p3_test.py --images DIR --out labels.csv --evaluate truth.csv       # accuracy and confusion matrix, too
  python3 p3_test.py --images DIR --out labels.csv --evaluate truth.csv --errors errors.png   # the surest errors
  python3 p3_test.py --tsne figures --target svhn --data hw2_data/digits      # the report's two plots of a pair

The domain is --target, else svhn or usps in the path of the images (the last component that names one), else the
images themselves: gray is USPS, colour is SVHN. Weights and all settings come from checkpoints/p3_TARGET.safetensors.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from common.checkpoint import load_network
from common.device import pick_device
from common.ema import reestimate_batch_norm
from common.errors import Parser, UserError, run_main
from common.files import atomic, check_apart, check_file, check_writable, make_folder, real_path
from common.options import add_device_option
from common.pictures import plot_images, plot_points
from common.results import add_record_option, check_record, record, training_key
from datasets.augment import digit_input
from datasets.digits import CLASSES, SIZE, load_digits, load_labels, read_labels
from datasets.images import UNREADABLE, check_range, decode_files, list_images, name_some
from models.dann import NETWORKS

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
TARGETS = ("svhn", "usps")
SLICE = 100  # images per forward pass
ERRORS = 40  # in the sheet of the surest ones
TSNE_IMAGES = 1000  # validation images of each domain in a plot


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--images", type=Path, help="folder of 28x28 digits")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file for the labels; its folder is made when missing")
    parser.add_argument("--target", choices=TARGETS, help="default: found from the path or the images")
    parser.add_argument("--weights", type=Path, help="default: checkpoints/p3_TARGET.safetensors")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read or are not 28x28")
    parser.add_argument("--evaluate", type=Path, metavar="CSV", help="true labels (image_name,label) to score against")
    parser.add_argument("--errors", type=Path, metavar="FILE", help=f"with --evaluate: draw the {ERRORS} surest errors")
    add_record_option(parser)
    parser.add_argument("--tsne", type=Path, metavar="FOLDER", help="draw features by class and by domain")
    parser.add_argument("--data", type=Path, default=Path("hw2_data/digits"), help="for --tsne: mnistm, svhn, usps")
    add_device_option(parser)
    o = parser.parse_args(argv)
    if not o.images and not o.tsne:
        parser.error("give --images and --out, or --tsne")
    if o.images and not o.out:
        parser.error("--images needs --out, the CSV file to write")
    check_record(o.record, bool(o.evaluate))
    if o.evaluate and o.out and real_path(o.out) == real_path(o.evaluate):
        raise UserError(f"{o.out}: holds the true labels (--evaluate); give --out another file")
    if o.errors and real_path(o.errors) in [real_path(path) for path in (o.out, o.evaluate) if path]:
        raise UserError(f"{o.errors}: is --out or --evaluate, too; give --errors another file")
    if o.errors and not o.evaluate:
        parser.error("--errors needs --evaluate, the true labels")
    if o.tsne and not o.images:
        if not o.target:
            parser.error("--tsne needs --target")
        for name in ("out", "skip_bad", "evaluate"):  # errors and record need the last of these
            if getattr(o, name):
                parser.error(f"--{name.replace('_', '-')} needs --images, a folder of digits")
    return o


def good_images(folder: Path, skip_bad: bool) -> tuple[list[Path], set[bool]]:
    """(files that are 28x28 images, sorted by name; whether they are gray). Raises UserError naming the others.

    Gray digits that are stored in colour count as gray when there are no others but gray ones.
    """
    good, bad, gray = [], [], set()
    for path in list_images(folder):
        try:
            with Image.open(path) as image:
                image.load()
                check_range(image)
                if image.size != (SIZE, SIZE):
                    raise ValueError("not a digit of the course")
                if image.mode in ("1", "L", "LA", "I", "I;16"):
                    gray.add(True)
                elif len({channel.tobytes() for channel in image.convert("RGB").split()}) > 1:
                    gray.add(False)
                good.append(path)
        except UNREADABLE:
            bad.append(path)
    if bad:
        what = f"{len(bad)} of {len(bad) + len(good)} files cannot be read or are not 28x28: {name_some(bad)}"
        if not good:
            raise UserError(f"{what}; give a folder of digits")
        if not skip_bad:
            raise UserError(f"{what}; remove them, or leave them out with --skip-bad")
        print(f"note: left out: {what}", file=sys.stderr)
    return good, gray or {True}


def find_target(folder: Path, gray: set[bool]) -> str:
    """svhn or usps, from the path, else from the images. Raises UserError when neither tells."""
    seen = {True: "usps", False: "svhn"}[next(iter(gray))] if len(gray) == 1 else None
    for part in reversed(folder.resolve().parts):
        named = [t for t in TARGETS if t in part.lower()]
        if len(named) == 1:
            if seen and seen != named[0]:
                print(
                    f"note: {folder}: {named[0]} by its path, {seen} by its images; --target decides", file=sys.stderr
                )
            return named[0]
    if seen:
        return seen
    raise UserError(f"{folder}: holds gray and colour images, and its path names no domain; add --target svhn or usps")


class Reader:
    """A trained network with the view of images it was trained with."""

    def __init__(self, weights: Path, device: torch.device):
        self.network, self.card = load_network(weights, NETWORKS)
        self.network.to(device)
        self.device, self.options = device, self.card.get("options", {})
        if not {"size", "standardise", "gray"} <= set(self.options):
            raise UserError(f"{weights}: does not say how its network sees images; train it again with this version")

    def see(self, images: Tensor) -> Iterator[Tensor]:
        """Batches of uint8 (N, 3, 28, 28) as the network sees them, on its device."""
        o = self.options
        for batch in images.split(SLICE):
            yield digit_input(batch.to(self.device), o["size"], o["standardise"], o["gray"])

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, 28, 28) -> (N, 10)."""
        return torch.cat([self.network(x).softmax(1).cpu() for x in self.see(images)])

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, 28, 28) -> (N, 512)."""
        extractor: nn.Module = self.network.extractor
        return torch.cat([extractor(x).cpu() for x in self.see(images)])


def read_truth(path: Path, names: set[str]) -> dict[str, int]:
    """The labels in the list ``path``, by image name. Raises UserError when it has others than ``names``."""
    truth = dict(read_labels(path))
    missing = [name for name in truth if name not in names]
    if missing:
        where = f"lists {len(missing)} images that are not read: {name_some(missing)}"
        raise UserError(f"{path}: {where}; give the list that fits")
    return truth


def write_labels(names: list[str], labels: list[int], out: Path) -> None:
    make_folder(out.parent)
    with atomic(out) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        csv.writer(f, lineterminator="\n").writerows([("image_name", "label"), *zip(names, labels, strict=True)])


def print_scores(names: list[str], guesses: list[int], truth: dict[str, int]) -> float:
    """Print accuracy on the images of the list, accuracy of each class and the confusion matrix; returns the accuracy
    in percent."""
    guessed = dict(zip(names, guesses, strict=True))
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for name, label in truth.items():
        matrix[label, guessed[name]] += 1
    accuracy = float(100 * matrix.trace() / matrix.sum())
    print(f"accuracy {accuracy:.3f} % of {matrix.sum()} images")
    print("true \\ read" + "".join(f"{c:6d}" for c in range(CLASSES)) + "     right")
    for c, row in enumerate(matrix):
        right = 100 * row[c] / row.sum().clamp(min=1)
        print(f"{c:11d}" + "".join(f"{n:6d}" for n in row.tolist()) + f"{right:8.1f} %")
    return accuracy


def draw_errors(images: Tensor, p: Tensor, names: list[str], truth: dict[str, int], path: Path) -> None:
    """The images of ``names`` that are read wrongly, with the highest probability p (N, 10) first, as a sheet."""
    sure, read = p.max(1)
    wrong = [i for i in sure.argsort(descending=True).tolist() if truth.get(names[i], read[i]) != read[i]][:ERRORS]
    if not wrong:
        print(f"{path}: not drawn, every image is read correctly")
        return
    titles = [f"{truth[names[i]]} read as {read[i]}\n{sure[i]:.2f}" for i in wrong]
    plot_images(images[wrong], titles, path, columns=8)


def domain_distance(source: Tensor, target: Tensor) -> float:
    """Proxy A-distance 2 (1 - 2 error) of features (N, D), (M, D): 2 when a linear classifier tells every image's
    domain, 0 when it guesses (Ben-David et al. 2007). The error is that on the half it was not trained on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = torch.cat([source, target]).numpy()
    y = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(x[::2], y[::2])
    return 2 * (1 - 2 * (1 - classifier.score(x[1::2], y[1::2])))


def draw_tsne(reader: Reader, target: str, data: Path, out: Path) -> None:
    """Two plots of the features of validation images of both domains: by class, and by domain.

    Leaves a network that was trained with ``separate`` batch statistics with those of the source.
    """
    from sklearn.manifold import TSNE

    folders = [data / name for name in ("mnistm", target)]
    source_images, target_images = (load_digits(folder, "val")[:TSNE_IMAGES] for folder in folders)
    for folder, images in zip(folders, (source_images, target_images), strict=True):
        if len(images) < 10:
            raise UserError(f"{folder}: {len(images)} validation images; --tsne needs 10 or more")
    labels = [load_labels(folder, "val")[:TSNE_IMAGES] for folder in folders]
    target_features = reader.features(target_images)  # the weights come with batch statistics of the target
    if reader.options["separate"]:
        reestimate_batch_norm(reader.network, reader.see(source_images))
    source_features = reader.features(source_images)
    x = torch.cat([source_features, target_features])
    points = TSNE(init="pca", random_state=0, perplexity=min(30, len(x) // 4)).fit_transform(x.numpy())
    domains = torch.tensor([0] * len(labels[0]) + [1] * len(labels[1]))
    distance = domain_distance(source_features, target_features)
    title = f"MNIST-M to {target.upper()}, proxy A-distance {distance:.2f}"
    digits = [str(c) for c in range(CLASSES)]
    plot_points(points, torch.cat(labels).tolist(), digits, f"{title}, by digit", out / f"tsne_{target}_class.png")
    names = ["MNIST-M", target.upper()]
    plot_points(points, domains.tolist(), names, f"{title}, by domain", out / f"tsne_{target}_domain.png")
    print(f"{out}: tsne_{target}_class.png, tsne_{target}_domain.png; proxy A-distance {distance:.3f}")


def main() -> None:
    o = parse_options(sys.argv[1:])
    device = pick_device(o.device)
    paths, gray = good_images(o.images, o.skip_bad) if o.images else ([], set())
    target = o.target or find_target(o.images, gray)
    truth = read_truth(o.evaluate, {path.name for path in paths}) if o.evaluate else None
    weights = o.weights or CHECKPOINTS / f"p3_{target}.safetensors"
    reader = Reader(weights, device)
    if o.tsne and not hasattr(reader.network, "extractor"):
        raise UserError(f"{weights}: --tsne draws the features of the report's own network, and this is another")
    check_apart(o.images, o.errors, o.tsne)
    check_file(o.out)
    check_file(o.errors)
    if o.tsne:
        check_writable(o.tsne)
    if o.images:
        images, names = decode_files(paths, SIZE), [path.name for path in paths]
        p = reader.probabilities(images)
        guesses = p.argmax(1).tolist()
        write_labels(names, guesses, o.out)
        print(f"{o.out}: {len(paths)} images of {target}")
        if truth is not None:
            accuracy = print_scores(names, guesses, truth)
            if o.errors:
                draw_errors(images, p, names, truth, o.errors)
            if o.record:
                key = {"target": target} | {name: reader.options[name] for name in ("method", "network", "seed")}
                key |= training_key(reader.card) | {"checkpoint": weights.stem, "scored": o.evaluate.stem}
                scores = {"accuracy": accuracy, "minutes": reader.card["minutes"]} | reader.card["held_out_scores"]
                record(o.record, key, scores, weights, device)
    if o.tsne:
        draw_tsne(reader, target, o.data, o.tsne)


if __name__ == "__main__":
    run_main(main)

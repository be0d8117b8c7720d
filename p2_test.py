"""Generate digits (problem 2) from a weight file, and score them.

  python3 p2_test.py --out digits                                              # 0_001.png ... 9_100.png
  python3 p2_test.py --out digits --evaluate hw2_data/digits/mnistm            # and their scores
  python3 p2_test.py --out some --digits 37 --per-digit 10 --sampler ddpm      # the report's 600 steps
  python3 p2_test.py --out digits --grid grid.png --trajectory trajectory.png  # the report's two figures

Needs nothing but weight files: the UNet's and, for autoguidance, that of a worse UNet. Image (digit, number) depends
on weights, settings of the sampler, number format (--bf16) and seed alone: not on which other images are asked for, and
its noise is drawn on the CPU for every device. Scores are computed from the PNG files.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import load_network
from common.device import autocast, device_and_format, step_generator
from common.errors import Parser, UserError, run_main
from common.files import check_apart, check_file, check_writable
from common.options import add_device_option, add_dims_option, from_zero, positive_int, seed
from common.pictures import plot_images, save_images, save_png, sheet, to_uint8
from common.results import add_record_option, check_record, record, weights_id, weights_name
from common.run import given_options
from datasets.augment import normalise, resize
from datasets.digits import CLASSES, SIZE
from models.diffusion import (
    Predict,
    Process,
    Watch,
    autoguided,
    calibrated,
    ddim,
    ddpm,
    dpm_solver_pp,
    guided,
    timesteps,
)
from models.unet import UNet_conditional

WEIGHTS = Path(__file__).resolve().parent / "checkpoints" / "p2_unet.safetensors"
WORSE = WEIGHTS.with_name("p2_guide.safetensors")  # for autoguidance: smaller, and trained for a shorter time
SLICE = 20  # images per forward pass; a constant, because float sums may differ in the last bit between sizes
SAMPLERS = ("dpm++", "ddim", "ddpm")
# Taken without --sampler: chosen on held-out training digits with the weights CHOSEN_WITH, w, rescale, autoguide and
# TINT with the shipped ones (validation digits had a part in w and rescale); 20 calls of the network an image, and 6 of
# the worse one.
FAST = {
    "sampler": "dpm++",
    "steps": 15,
    "power": 2.0,
    "eta": 0.8,
    "w": 4.5,
    "guide": (190, 500),
    "rescale": 0.43,
    "mean": (118.1, 119.1, 107.4),  # of MNIST-M's training digits; gives way to what the card of the weights says
    "calibrate": None,  # where the card of the weights tells mean errors
    "autoguide": 0.06,  # with the shipped weights alone: others have no worse network of their kind here
    "autoguide_t": (20, 189),
}
# Added to the mean colour of the card, with the shipped weights alone: guidance darkens backgrounds on the way, in blue
# most, which a brighter start makes up for in part.
TINT = (0.0, 0.0, 12.0)
# SHA-256 of weights with which much was tried; the report shows what
CHOSEN_WITH = ("be0eb9633c1e", "53500a9fd780", "7cb8ecc404af", "3ccc4a2956c1", "d7fa1cb8051b")
# what is taken with --sampler
USUAL = {"steps": 20, "power": 1.0, "eta": 0.0, "w": 2.0, "rescale": 0.0, "calibrate": False, "autoguide": 0.0}
UNSURE = 20  # digits in the sheet of those that the classifier is least sure of
NEIGHBOURS = 7  # nearest training digits that are shown
FIGURE_T = (0, 120, 240, 360, 480, 600)  # reverse steps done in the report's figure


def shipped(weights: Path) -> bool:
    """Whether these are the weights that the default sampler was tuned for, and that have a worse network here."""
    return weights.resolve() == WEIGHTS


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the images; made when missing")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"default: checkpoints/{WEIGHTS.name}")
    parser.add_argument("--digits", default="0123456789", help="which digits")
    parser.add_argument("--per-digit", type=positive_int, default=100, help="images of each")
    default = (
        "default: {sampler} with {steps} steps, power {power:g}, eta {eta:g}, w {w:g}, guided {guide[0]} to "
        "{guide[1]}, rescale {rescale:g}, mean as in the card of the weights; with the shipped weights a bluer "
        "mean, and autoguide {autoguide:g} from {autoguide_t[0]} to {autoguide_t[1]}"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help=default.format(**FAST))
    parser.add_argument(
        "--steps", type=positive_int, help="network steps (with --sampler: 20; ddpm always takes all 600)"
    )
    parser.add_argument("--power", type=float, help="spacing: t = T (1 - i/steps)^power (with --sampler: 1, even)")
    parser.add_argument("--eta", type=float, help="fresh noise in each step: 0 none, 1 as in ddpm (with --sampler: 0)")
    parser.add_argument("--w", type=float, help="guidance: (1 + w) eps_y - w eps; 0 is none (with --sampler: 2)")
    parser.add_argument("--guide", type=int, nargs=2, metavar="T", help="guide from this t to this t only")
    parser.add_argument(
        "--rescale", type=float, help="share of guidance's contrast taken back; above 0 the median is kept, too"
    )
    what = "autoguidance: (1 + W) eps - W eps of a worse network; 0 is none (with --sampler or other weights: 0)"
    parser.add_argument("--autoguide", type=float, metavar="W", help=what)
    parser.add_argument(
        "--autoguide-t", type=int, nargs=2, metavar="T", help="autoguide from this t to this t only, best below --guide"
    )
    parser.add_argument("--autoguide-by", type=Path, metavar="FILE", help=f"default: checkpoints/{WORSE.name}")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="mean colour (0 to 255) of x_T")
    what = "take off the mean errors of predictions that the card of the weights tells of these steps, as by default"
    parser.add_argument("--calibrate", action=argparse.BooleanOptionalAction, help=what)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write the first 10 of each digit as a sheet, too")
    parser.add_argument("--trajectory", type=Path, metavar="FILE", help="draw the reverse process of the first image")
    parser.add_argument("--evaluate", type=Path, metavar="REAL", help="score against the digits of this folder")
    parser.add_argument("--held-out", action="store_true", help="with --evaluate: against the held-out training digits")
    what = "with --evaluate: start from training digits noised to this t instead: what the steps below it cost"
    parser.add_argument("--from-real", type=from_zero, metavar="T", help=what)
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="the course's Classifier.pth instead of ours")
    parser.add_argument("--neighbours", type=Path, metavar="FILE", help="with --evaluate: sheet of nearest neighbours")
    parser.add_argument("--unsure", type=Path, metavar="FILE", help=f"with --evaluate: the {UNSURE} least surely read")
    add_dims_option(parser)
    add_record_option(parser)
    add_device_option(parser)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where the processor profits")
    o = parser.parse_args(argv)
    T = Process().T
    defaults = USUAL | ({"steps": T} if o.sampler == "ddpm" else {}) if o.sampler else FAST
    if not shipped(o.weights):
        defaults = defaults | {"autoguide": 0.0}
    for name, value in defaults.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if not o.digits or set(o.digits) - set("0123456789") or len(set(o.digits)) < len(o.digits):
        raise UserError(f"--digits {o.digits}: give each digit once, such as 0123456789")
    if not -1 <= o.w <= 100:
        raise UserError(f"--w {o.w}: from -1 (no label) over 0 (no guidance) to 100; 0 to 4 make sense")
    if o.sampler == "ddpm" and o.steps != T:
        raise UserError(f"--steps {o.steps}: ddpm takes all {T}; leave --steps out, or use --sampler ddim")
    if o.steps > T:
        raise UserError(f"--steps {o.steps}: the process has T = {T}; give at most so many")
    if not 1 <= o.power <= 10:
        raise UserError(f"--power {o.power}: from 1 (even steps) to 10; 1 to 2 make sense")
    if o.power != 1 and o.sampler == "ddpm":
        raise UserError(f"--power {o.power}: ddpm takes all {T} steps; leave it out, or use --sampler ddim")
    if not 0 <= o.eta <= 1 or (o.eta and o.sampler == "ddpm"):
        raise UserError(f"--eta {o.eta}: from 0 to 1, for --sampler ddim and dpm++ only")
    if not 0 <= o.rescale <= 1:
        raise UserError(f"--rescale {o.rescale}: from 0 (guidance as it is) to 1 (contrast as without guidance)")
    if o.mean and not all(0 <= c <= 255 for c in o.mean):
        raise UserError(f"--mean {' '.join(map(str, o.mean))}: give red, green and blue, each from 0 to 255")
    if not 0 <= o.autoguide <= 100:
        raise UserError(f"--autoguide {o.autoguide}: from 0 (none) to 100; 0 to 1 make sense")
    if o.autoguide_by and not o.autoguide:
        raise UserError(f"--autoguide-by {o.autoguide_by}: is not used; add --autoguide 0.2")
    if "autoguide_t" in given_options(parser, argv) and not o.autoguide:
        raise UserError(f"--autoguide-t {' '.join(map(str, o.autoguide_t))}: is not used; add --autoguide 0.2")
    o.autoguide_by = o.autoguide_by or WORSE
    for name in ("guide", "autoguide_t"):
        low, high = interval = tuple(getattr(o, name) or (1, T))
        if not 1 <= low <= high <= T:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {low} {high}: give the lowest and the highest t, from 1 to {T}")
        setattr(o, name, interval)
    check_record(o.record, bool(o.evaluate))
    if o.record and o.classifier:
        raise UserError(f"--classifier {o.classifier}: rows of --record are of the shipped classifier; leave one out")
    if o.evaluate and len(o.digits) * o.per_digit < 2:
        raise UserError(f"--per-digit {o.per_digit}: a Fréchet distance needs at least 2 images")
    if o.from_real is not None and (o.from_real > T or o.sampler == "ddpm"):
        raise UserError(f"--from-real {o.from_real}: give a t from 0 to {T}, and another sampler than ddpm")
    for name in ("held_out", "from_real", "classifier", "neighbours", "unsure", "dims"):
        if getattr(o, name) != parser.get_default(name) and not o.evaluate:
            raise UserError(f"--{name.replace('_', '-')}: needs scores; add --evaluate hw2_data/digits/mnistm")
    return o


def solve(
    predict: Predict,
    sampler: str,
    steps: list[int],
    generators: list[torch.Generator],
    device: torch.device,
    watch: Watch | None = None,
    eta: float = 0.0,
    image: Tensor | None = None,
    size: int = SIZE,
) -> Tensor:
    """x_0 (N, 3, size, size), one for each of the CPU ``generators``, from which x_t and all later noise is drawn.

    ``steps`` as from ``timesteps``, or from a lower t on; ancestral sampling takes all T whatever they are. ``image``
    (-1 to 1; N of them, or one for all): the first x_t is drawn from q(x_t | image) instead of N(0, I).
    """
    process = Process()

    def draw(_t: int) -> Tensor:
        return torch.stack([torch.randn(3, size, size, generator=g) for g in generators]).to(device)

    x_t = draw(steps[0])
    if image is not None:
        x_t = process.q_sample(image, torch.full((len(x_t),), steps[0], device=device), x_t)
    if sampler == "ddpm":
        return ddpm(predict, x_t, process, draw, watch)
    along = ddim if sampler == "ddim" else dpm_solver_pp
    return along(predict, x_t, process, steps, watch, eta, draw)


def predictor(
    network: nn.Module, worse: nn.Module | None, process: Process, y: Tensor, o: argparse.Namespace
) -> Predict:
    """The noise that ``o``'s guidance predicts for images of the labels y (N,)."""
    predict = guided(network, process, y, o.w, o.guide, o.rescale)
    if o.errors is not None:
        predict = calibrated(predict, process, o.errors)
    if worse is None:
        return predict
    return autoguided(predict, guided(worse, process, y, w=0), o.autoguide, o.autoguide_t)


def mean_colour(card: dict, weights: Path) -> list[float]:
    """The --mean of the default sampler, in gray levels: what the card of the weights tells, and ``TINT`` if they are
    the shipped ones."""
    mean = card.get("mean", FAST["mean"])
    return [round(m + t, 1) for m, t in zip(mean, TINT, strict=True)] if shipped(weights) else list(mean)


def one_colour(mean: Sequence[float] | None, device: torch.device) -> Tensor | None:
    """The image (3, 1, 1) of --mean's colour, which x_T is the noise of. In training x_T still has a twentieth of its
    image, and the network takes the colour of the whole image from it."""
    return (torch.tensor(mean, device=device) / 127.5 - 1).view(3, 1, 1) if mean else None


def error_table(errors: dict[str, Sequence[float]], T: int) -> Tensor:
    """A card's mean errors, t: (red, green, blue) in gray levels -> (T + 1, 3) in units of x_0, for
    ``models.diffusion.calibrated``; 0 at other t."""
    table = torch.zeros(T + 1, 3)
    for t, error in errors.items():
        table[int(t)] = torch.tensor(error) / 127.5
    return table


def image_generator(seed: int, digit: int, number: int) -> torch.Generator:
    """The noise of image (digit, number): a CPU generator that depends on the seed and these two alone."""
    return step_generator(torch.device("cpu"), seed, digit, number)


@torch.inference_mode()
def generate(
    network: nn.Module,
    digits: list[int],
    per_digit: int,
    o: argparse.Namespace,
    device: torch.device,
    bar: bool = True,
    real: Tensor | None = None,
    worse: nn.Module | None = None,
) -> Tensor:
    """Images 1 ... ``per_digit`` of each digit, uint8 (len(digits) * per_digit, 3, 28, 28) on the CPU, by digit.

    ``network`` is in eval mode on ``device``; ``o`` has sampler, steps, power, eta, w, guide, rescale, mean, errors
    (as of ``error_table``, on ``device``, or None), seed and bf16. With ``worse``, a network like it for autoguidance,
    it has autoguide and autoguide_t; with ``real``, images like those returned, ``from_real``, the t that they are
    noised to and sampled from. Every forward pass has exactly SLICE images.
    """
    wanted = [(digit, number) for digit in digits for number in range(1, per_digit + 1)]
    images = []
    process = Process()
    steps, image = timesteps(process, o.steps, o.power), one_colour(o.mean, device)
    if real is not None:
        steps = [o.from_real, *(t for t in steps if t < o.from_real)]
    with tqdm(total=len(wanted), desc="generating", unit="img", leave=False, disable=not bar) as progress:
        for start in range(0, len(wanted), SLICE):
            rows = [min(row, len(wanted) - 1) for row in range(start, start + SLICE)]
            y = torch.tensor([wanted[row][0] for row in rows], device=device)
            predict = predictor(network, worse, process, y, o)
            generators = [image_generator(o.seed, *wanted[row]) for row in rows]
            if real is not None:
                image = resize(normalise(real[rows].to(device)), network.size, antialias=True)
            with autocast(device, o.bf16):
                x_0 = solve(predict, o.sampler, steps, generators, device, eta=o.eta, image=image, size=network.size)
                images.append(to_uint8(resize(x_0, SIZE, antialias=True)))
            progress.update(min(SLICE, len(wanted) - start))
    return torch.cat(images)[: len(wanted)]


@torch.inference_mode()
def draw_trajectory(
    network: nn.Module, worse: nn.Module | None, digit: int, o: argparse.Namespace, device: torch.device, path: Path
) -> None:
    """The report's figure: ancestral sampling of image (digit, 1), after 0, 120, ..., 600 reverse steps."""
    process, seen = Process(), {}

    def watch(t: int, x: Tensor) -> None:
        if process.T - t in FIGURE_T:
            seen[process.T - t] = to_uint8(x)[0]

    predict = predictor(network, worse, process, torch.full((1,), digit, device=device), o)
    with tqdm(total=process.T, desc="trajectory", unit="step", leave=False) as bar, autocast(device, o.bf16):

        def counted(x: Tensor, t: int) -> Tensor:
            bar.update()
            return predict(x, t)

        generators, image = [image_generator(o.seed, digit, 1)], one_colour(o.mean, device)
        solve(counted, "ddpm", [process.T], generators, device, watch, image=image, size=network.size)
    plot_images([seen[t] for t in FIGURE_T], [f"t = {t}" for t in FIGURE_T], path, columns=len(FIGURE_T))


def load_worse(path: Path, size: int, device: torch.device) -> nn.Module:
    """The network of --autoguide-by, for images of ``size``."""
    worse, _ = load_network(path, {"unet": UNet_conditional})
    if worse.size != size:
        raise UserError(f"{path}: was trained on {worse.size}x{worse.size}, --weights on {size}x{size}; take another")
    return worse.to(device, memory_format=torch.channels_last)


class Judge:
    """Accuracy, Fréchet distances, colours and nearest training neighbours of image files.

    Set up before anything is generated, so that missing data or weights stop the script at once. Real digits to
    compare with are the first 200 of each class in val, or, to choose a sampler by, the training digits that
    p2_train.py holds out. The first 100 of each class in the rest of train show what perfect samples would score.
    """

    def __init__(
        self, root: Path, classifier: Path | None, held_out: bool, device: torch.device, dims: int | None = None
    ):
        from datasets.digits import load_digits, load_folds, load_labels
        from datasets.images import cache_file
        from metrics.classify import load_classifier
        from metrics.frechet import Inception

        self.classifier = load_classifier(classifier).to(device)
        self.root = root
        if held_out:
            self.scored, self.what = "held-out", "held-out training digits"
            (self.train, self.labels), (self.real, self.real_labels) = load_folds(root)
        else:
            self.scored, self.what = "val", "validation digits"
            self.train, self.labels = load_digits(root, "train"), load_labels(root, "train")
            self.real, self.real_labels = first_of_each(load_digits(root, "val"), load_labels(root, "val"), 200)
        self.floor, _ = first_of_each(self.train, self.labels, 100)
        if min(len(self.real), len(self.floor)) < 2:
            raise UserError(f"{root}: a Fréchet distance needs at least 2 {self.what} and 2 others")
        if len(self.train) < NEIGHBOURS:
            raise UserError(f"{root}: {len(self.train)} training digits; at least {NEIGHBOURS} are needed")
        self.inception = Inception(device, dims, also=(64, 192))
        name = f"inception{'_'.join(map(str, self.inception.sizes))}"
        self.real_features = self.inception.reference(self.real, cache_file(root, f"{name}_{self.scored}"))
        self.floor_features = self.inception.reference(self.floor, cache_file(root, f"{name}_train"))

    def starts(self, digits: list[int], per_digit: int) -> Tensor:
        """The first ``per_digit`` training digits of each of ``digits``, for --from-real."""
        images, _ = first_of_each(self.train, self.labels, per_digit, digits)
        if len(images) < len(digits) * per_digit:
            raise UserError(f"--per-digit {per_digit}: {self.root} has fewer of a digit; give less with --from-real")
        return images

    def __call__(
        self, paths: list[Path], labels: Tensor, neighbours: Path | None, unsure: Path | None
    ) -> dict[str, float]:
        from datasets.images import decode_files
        from metrics.classify import accuracy, probabilities

        images, scores = decode_files(paths, SIZE), {}
        p = probabilities(self.classifier, images)
        right = (p.argmax(1) == labels).float()
        for digit in labels.unique().tolist():
            scores[f"digit_{digit}"] = 100 * float(right[labels == digit].mean())
            print(f"digit {digit}: {scores[f'digit_{digit}']:6.2f} % read as {digit}")
        scores["accuracy"] = 100 * float(right.mean())
        real = accuracy(self.classifier, self.real, self.real_labels)
        print(f"accuracy {scores['accuracy']:.2f} % (real {self.what} {real:.2f} %)")
        if unsure:
            draw_unsure(images, p, labels, unsure)
        return scores | self.distances(images) | self.colours(images) | self.nearest(images, neighbours)

    def distances(self, images: Tensor) -> dict[str, float]:
        features = self.inception.features(images, what="Inception, samples")
        floor = self.inception.distances(self.floor_features, self.real_features)
        scores = self.inception.distances(features, self.real_features)
        against = f"{len(self.real)} {self.what}"
        for name, value in scores.items():
            print(f"{name} {value:.4f} to {against} (training digits {floor[name]:.4f}){self.inception.note}")
        return scores | {f"{name}_floor": value for name, value in floor.items()}

    def colours(self, images: Tensor) -> dict[str, float]:
        """How far mean and deviation of red, green and blue are from those of the real digits, in percent of these."""
        from metrics.colour import COLOURS, colour_statistics

        scores, real = {}, colour_statistics(self.real)
        for suffix, what, of in (("", "samples", images), ("_floor", "training digits", self.floor)):
            differences = (100 * (colour_statistics(of) / real - 1)).tolist()
            mean, deviation = (", ".join(f"{d:+.1f}" for d in part) for part in (differences[:3], differences[3:]))
            print(f"red, green, blue of {what}: mean {mean} %, deviation {deviation} % of {self.what}'")
            scores |= {f"{name}{suffix}": d for name, d in zip(COLOURS, differences, strict=True)}
        return scores

    def nearest(self, images: Tensor, path: Path | None) -> dict[str, float]:
        from metrics.neighbours import nearest

        distances, rows = nearest(torch.cat([images, self.real]), self.train, NEIGHBOURS)
        ours, real = distances[:, 0].tensor_split([len(images)])
        scores = {}
        for name, what, d in (("nearest", "samples", ours), ("nearest_real", self.what, real)):
            least, median = float(d.min()), float(d.median())
            scores |= {f"{name}_least": least, f"{name}_median": median}
            print(f"nearest training digit of {what}: {least:.1f} gray levels at least, {median:.1f} in the median")
        if path:
            closest = ours.argsort()[:10]
            rows_of_sheet = [torch.cat([images[i : i + 1], self.train[rows[i]]]) for i in closest]
            save_png(sheet(torch.cat(rows_of_sheet), columns=1 + NEIGHBOURS), path)
        return scores


def draw_unsure(images: Tensor, p: Tensor, labels: Tensor, path: Path) -> None:
    """The images with the lowest probability, of p (N, 10), of being what they were asked to be, as a sheet.

    Above each stand the digit asked for, the digit read, and the probability of the former.
    """
    sure = p.gather(1, labels[:, None]).flatten()
    least = sure.argsort(stable=True)[:UNSURE].tolist()
    titles = [f"{labels[i]} as {p[i].argmax()}\n{sure[i]:.2f}" for i in least]
    plot_images(images[least], titles, path, columns=10)


def first_of_each(
    images: Tensor, labels: Tensor, count: int, digits: Iterable[int] = range(CLASSES)
) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of each class, or of these, and their labels, by class."""
    rows = torch.cat([(labels == digit).nonzero()[:count, 0] for digit in digits])
    return images[rows], labels[rows]


def main() -> None:
    o = parse_options(sys.argv[1:])
    device, o.bf16 = device_and_format(o.device, o.bf16)
    network, card = load_network(o.weights, {"unet": UNet_conditional})
    if o.mean is FAST["mean"]:  # no other was asked for
        o.mean = mean_colour(card, o.weights)
    if o.calibrate and "mean_errors" not in card:
        raise UserError(f"--calibrate: {o.weights} tells no mean errors; leave it out, or train with p2_train.py anew")
    if o.calibrate is None:
        o.calibrate = "mean_errors" in card
    o.errors = error_table(card["mean_errors"], Process().T).to(device) if o.calibrate else None
    network = network.to(device, memory_format=torch.channels_last)
    worse = load_worse(o.autoguide_by, network.size, device) if o.autoguide else None
    digits = [int(d) for d in o.digits]
    labels = torch.tensor(digits).repeat_interleave(o.per_digit)
    pictures = (o.grid, o.trajectory, o.neighbours, o.unsure)
    check_apart(o.evaluate, o.out, *pictures)
    check_apart(o.out, *pictures)
    judge = Judge(o.evaluate, o.classifier, o.held_out, device, o.dims) if o.evaluate else None
    real = judge.starts(digits, o.per_digit) if judge and o.from_real is not None else None
    check_writable(o.out)
    for path in pictures:
        check_file(path)
    start = time.monotonic()
    images = generate(network, digits, o.per_digit, o, device, real=real, worse=worse)
    seconds = time.monotonic() - start
    names = [f"{digit}_{number:03d}.png" for digit in digits for number in range(1, o.per_digit + 1)]
    save_images(images, names, o.out)
    if o.grid:
        columns = min(10, o.per_digit)
        save_png(sheet(images.unflatten(0, (len(digits), -1))[:, :columns].flatten(0, 1), columns), o.grid)
    if o.trajectory:
        draw_trajectory(network, worse, digits[0], o, device, o.trajectory)
    print(f"{o.out}: {len(images)} images in {seconds:.0f} s")
    if judge:
        scores = judge([o.out / name for name in names], labels, o.neighbours, o.unsure)
        if o.record:
            unused = set() if o.autoguide else {"autoguide", "autoguide_t"}
            unused |= set() if o.calibrate else {"calibrate"}
            settings = [name for name in FAST if name not in unused]
            key = {"weights": weights_name(o.weights), "scored": judge.scored}
            key |= {name: getattr(o, name) for name in (*settings, "digits", "per_digit", "seed")}
            key |= {"autoguide_by": weights_id(o.autoguide_by)} if o.autoguide else {}
            key |= {"from_real": o.from_real} if o.from_real is not None else {}
            record(o.record, key, scores | {"seconds": seconds}, o.weights, device)


if __name__ == "__main__":
    run_main(main)

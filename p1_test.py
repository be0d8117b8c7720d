"""Generate faces (problem 1) from a weight file, and score them.

  python3 p1_test.py --out faces                                       # 1,000 faces, 0001.png ... 1000.png
  python3 p1_test.py --out faces --evaluate hw2_data/face/val          # and their Fréchet distance and face rate
  python3 p1_test.py --out real --evaluate hw2_data/face --real        # the floor: what real faces score
  python3 p1_test.py --out more --count 5000 --seed 1 --sheet first32.png

Needs nothing but the weight file, which says what network it belongs to. Face i depends on (weights, seed, i)
alone, not on the count; noise is drawn on the CPU for every device. Scores are computed from the PNG files.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import load_network
from common.device import noise, pick_device
from common.errors import Parser, UserError, run_main
from common.files import check_apart, check_file, check_writable
from common.options import add_device_option, add_dims_option, positive_int, seed
from common.pictures import save_images, save_png, sheet, to_uint8
from common.results import add_record_option, check_record, record, weights_name
from common.run import given_options
from models.dcgan import Generator

WEIGHTS = Path(__file__).resolve().parent / "checkpoints" / "p1_dcgan.safetensors"
SLICE = 50  # images per forward pass; a constant, because float sums may differ in the last bit between sizes


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the images; made when missing")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"default: checkpoints/{WEIGHTS.name}")
    parser.add_argument("--count", type=positive_int, default=1000, help="images to write")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write the first 32 images as a sheet, too")
    parser.add_argument("--evaluate", type=Path, metavar="REAL", help="score against the images of this folder")
    parser.add_argument("--real", action="store_true", help="with --evaluate: score real training faces instead")
    add_dims_option(parser)
    add_record_option(parser)
    add_device_option(parser)
    o = parser.parse_args(argv)
    check_record(o.record, bool(o.evaluate))
    for name in ("real", "dims"):
        if getattr(o, name) and not o.evaluate:
            raise UserError(f"--{name}: is about scores; add --evaluate hw2_data/face")
    useless = given_options(parser, argv) & {"weights", "seed"} if o.real else set()
    if useless:
        raise UserError(f"--real: takes the first training faces; leave out {', '.join(f'--{x}' for x in useless)}")
    return o


@torch.inference_mode()
def generate(generator: nn.Module, count: int, seed: int, device: torch.device) -> Tensor:
    """Images 0 ... ``count`` - 1 of ``seed``: uint8 (count, 3, 64, 64) on the CPU, computed in float32.

    ``generator`` is in eval mode on ``device``. Every forward pass has exactly SLICE images.
    """
    images = []
    starts = range(0, count, SLICE)
    for start in tqdm(starts, "generating", unit="batch", leave=False, disable=count < 5000):
        z = noise(seed, range(start, start + SLICE), generator.z_dim)
        images.append(to_uint8(generator(z.to(device))))
    return torch.cat(images)[:count]


def real_faces(root: Path, count: int) -> Tensor:
    """The first ``count`` training faces: what perfect samples would score. Raises UserError when there are fewer."""
    from datasets.faces import load_faces

    images = load_faces(root, "train")[:count]
    if len(images) < count:
        raise UserError(f"{root}: has {len(images)} training faces, fewer than --count {count}")
    return images


class Judge:
    """Fréchet distance and face rate of image files against real faces.

    Set up before anything is generated, so that missing data or Inception weights stop the script at once.
    """

    def __init__(self, real: Path, device: torch.device, dims: int | None = None):
        from datasets.faces import load_reference
        from datasets.images import cache_file
        from metrics.detect import face_counts
        from metrics.frechet import Inception

        self.real, images = real, load_reference(real)
        if len(images) < 2:
            raise UserError(f"{real}: holds one image; a Fréchet distance needs at least 2")
        face_counts(images[:0])  # dlib is there
        self.inception = Inception(device, dims)
        self.features = self.inception.reference(images, cache_file(real, f"inception{self.inception.dims}"))

    def __call__(self, paths: list[Path]) -> dict[str, float]:
        from datasets.faces import SIZE
        from datasets.images import decode_files
        from metrics.detect import face_counts, face_rate
        from metrics.frechet import frechet_distance

        images = decode_files(paths, SIZE)
        distance = frechet_distance(self.inception.features(images, what="Inception, samples"), self.features)
        against = f"{len(images)} images against {len(self.features)} of {self.real}{self.inception.note}"
        print(f"{self.inception.name} {distance:.4f}: {against}")
        rate = face_rate(face_counts(images))
        print(f"faces {rate:.1f} %: images in which dlib finds exactly one face")
        return {self.inception.name: distance, "faces": rate}


def main() -> None:
    o = parse_options(sys.argv[1:])
    device = pick_device(o.device)
    generator = None if o.real else load_network(o.weights, {"sngan": Generator, "dcgan": Generator})[0].to(device)
    if o.evaluate and o.count < 2:
        raise UserError(f"--count {o.count}: a Fréchet distance needs at least 2 images")
    check_apart(o.evaluate, o.out, o.sheet)
    check_apart(o.out, o.sheet)
    judge = Judge(o.evaluate, device, o.dims) if o.evaluate else None
    check_writable(o.out)
    check_file(o.sheet)
    images = generate(generator, o.count, o.seed, device) if generator else real_faces(o.evaluate, o.count)
    names = [f"{i:04d}.png" for i in range(1, o.count + 1)]
    save_images(images, names, o.out)
    if o.sheet:
        save_png(sheet(images[:32], columns=8), o.sheet)
    print(f"{o.out}: {o.count} images")
    if judge:
        scores = judge([o.out / name for name in names])
        if o.record:
            key = {"weights": "real" if o.real else weights_name(o.weights), "images": o.count, "seed": o.seed}
            record(o.record, key, scores, None if o.real else o.weights, device)


if __name__ == "__main__":
    run_main(main)

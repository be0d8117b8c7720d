"""Train the digit classifier by which generated digits are scored (the course's LeNet, on MNIST-M).

  python3 classifier_train.py --data hw2_data/digits/mnistm      # 2.5 minutes on 2 CPU cores

The weights are chosen on a held-out tenth of the training split. Validation digits are only scored, once, at the end.
"""

import common.start  # noqa: F401

# isort: split
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import autocast, pick_device, step_generator
from common.errors import Parser, run_main
from common.options import positive_float, positive_int
from common.parallel import is_first, share
from common.run import add_common_options, parse_with_resume
from common.trainer import LabelTrainer, descend
from datasets.augment import normalise, translation
from datasets.digits import load_digits, load_folds, load_labels
from datasets.images import describe
from metrics.classify import accuracy
from models.classifier import Classifier


def build_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("hw2_data/digits/mnistm"), help="folder with train and val")
    parser.add_argument("--steps", type=positive_int, default=12_000, help="updates")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per update")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="AdamW learning rate, in the second half to 0")
    parser.add_argument("--eval-every", type=positive_int, default=1000, help="steps between evaluations")
    parser.set_defaults(sample_every=10**9, anneal=True)
    add_common_options(parser)
    return parser


class ClassifierTrainer(LabelTrainer):
    def __init__(self, o: argparse.Namespace):
        device = pick_device(o.device)
        o.bf16 = bool(o.bf16)  # float32 unless asked for: so small a network does not profit
        (self.images, self.labels), (self.held_images, self.held_labels) = load_folds(o.data, 4480)
        torch.manual_seed(o.seed)
        self.network = Classifier().to(device)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), o.lr, weight_decay=0.01)
        key = describe(self.images)
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        super().__init__("classifier", o, device, key, {"network": self.network, "optimiser": self.optimiser})

    def update(self) -> Tensor:
        random = step_generator(self.device, self.o.seed, self.step)
        rows = torch.randint(len(self.images), (self.o.batch_size,), generator=random, device=self.device)
        x = share(translation(normalise(self.images[rows]), random, ratio=0.07))  # 2 pixels
        with autocast(self.device, self.o.bf16):
            logits = self.network.train()(x)
        loss = F.cross_entropy(logits.float(), share(self.labels[rows]))
        descend(loss, self.optimiser, self.o.lr * self.factor)
        return loss.detach()[None]

    def evaluate(self) -> dict[str, float]:
        return {"error": 100 - accuracy(self.network.eval(), self.held_images, self.held_labels)}

    def weights(self) -> tuple[str, dict, dict[str, Tensor]]:
        return "classifier", {}, self.network.state_dict()


def main() -> None:
    o = parse_with_resume(build_parser(), sys.argv[1:])
    images, labels = load_digits(o.data, "val"), load_labels(o.data, "val")  # told at once when they are missing
    trainer = ClassifierTrainer(o)
    trainer.train()
    if not is_first():
        return
    score = accuracy(trainer.best_network({"classifier": Classifier}), images, labels)
    print(f"{score:.2f} % of the {len(labels)} validation digits are read correctly")


if __name__ == "__main__":
    run_main(main)

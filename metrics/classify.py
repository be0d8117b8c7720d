"""Digit accuracy: the share of generated images that the course's LeNet reads as the digit they were asked to be."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import UNPICKLING, load_network
from common.errors import UserError
from datasets.augment import normalise
from models.classifier import Classifier

WEIGHTS = Path(__file__).resolve().parent.parent / "checkpoints" / "digit_classifier.safetensors"


def load_classifier(path: Path | None = None) -> nn.Module:
    """The classifier in eval mode on the CPU: ours, or the one in the course's ``Classifier.pth``.

    The latter is a ``torch.save`` file with the tensors under ``state_dict``. Raises UserError for anything else.
    """
    path = Path(path or WEIGHTS)
    if path.suffix == ".safetensors":
        return load_network(path, {"classifier": Classifier})[0]
    remedy = "give the course's Classifier.pth, or leave the option out"
    if not path.is_file():
        raise UserError(f"{path}: no such classifier file; {remedy}")
    network = Classifier()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except UNPICKLING:
        raise UserError(f"{path}: holds no classifier of this shape under 'state_dict'; {remedy}") from None
    return network.eval()


@torch.inference_mode()
def probabilities(classifier: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """uint8 (N, 3, 28, 28) -> class probabilities (N, 10), float32 on the CPU."""
    device = next(classifier.parameters()).device
    batches = [classifier(normalise(batch.to(device))).softmax(1).cpu() for batch in images.split(batch_size)]
    return torch.cat(batches)


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images read as their label, in percent."""
    return 100 * float((probabilities(classifier, images).argmax(1) == labels).float().mean())

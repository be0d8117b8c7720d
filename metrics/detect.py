"""Face rate: the share of images in which dlib's frontal-face detector finds exactly one face.

The course's scorer: HOG detector, image upsampled once. Real 64x64 faces score 94 %.
"""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from common.errors import UserError


def face_counts(images: Tensor) -> list[int]:
    """Number of faces found in each of uint8 (N, 3, H, W)."""
    try:
        import dlib
    except ImportError:
        raise UserError("the face rate needs dlib: pip install dlib-bin") from None
    detector = dlib.get_frontal_face_detector()
    return [len(detector(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), 1)) for image in images]


def face_rate(counts: Iterable[int]) -> float:
    """Share of images with exactly one face, in percent."""
    counts = list(counts)
    return 100 * sum(c == 1 for c in counts) / len(counts)

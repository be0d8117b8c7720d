"""Fréchet distance between two sets of images, from Inception features (Heusel et al. 2017, arXiv:1706.08500).

The features are those of the package ``pytorch-fid`` (same weights, same resizing); 2048 dimensions give the
number called FID. Where the official weights are incomplete, the 768-dimensional features before the auxiliary
classifier are used, and the number is called FD-768.

The distance is |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2). With S = A^T A, A being the centred features over
sqrt(n - 1), the last trace is the sum of the singular values of A1 A2^T: real by construction, also when a
covariance is rank-deficient, and fast.
"""

import contextlib
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, first_line
from datasets.images import cache_file, cached, checksum

MISSING = (
    "the Inception weights of pytorch-fid are not here and could not be downloaded; connect once, or point "
    "TORCH_HOME at a folder that holds hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Distance between the Gaussians fitted to features x (n, d) and y (m, d), in float64. n, m >= 2."""
    if min(len(x), len(y)) < 2:
        raise UserError("a Fréchet distance needs at least 2 images on both sides")
    x, y = x.double(), y.double()
    mu_x, mu_y = x.mean(0), y.mean(0)
    a, b = (x - mu_x) / (len(x) - 1) ** 0.5, (y - mu_y) / (len(y) - 1) ** 0.5
    traces = a.square().sum() + b.square().sum()  # tr S1 + tr S2
    a, b = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b, mode="r").R  # A1 A2^T = Q1 (R1 R2^T) Q2^T
    cross = torch.linalg.svdvals(a @ b.T).sum()  # tr sqrt(S1 S2)
    return float((mu_x - mu_y).square().sum() + traces - 2 * cross)


class Inception:
    r"""Inception features of images. ``dims``: 64, 192, 768 or 2048; ``name``: what the distance is called.

    With ``dims=None`` it is 2048 where the weights are complete, else 768 (``note`` says why). Features of the
    smaller sizes ``also`` stand before them: ``sizes`` is (\*also, dims).
    Raises UserError when the weights are not on this machine and cannot be downloaded.
    """

    def __init__(self, device: torch.device, dims: int | None = None, also: tuple[int, ...] = ()):
        from pytorch_fid.inception import InceptionV3

        self.device, self.note = device, ""

        def build(size: int) -> torch.nn.Module:
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[s] for s in (*also, size)])
            except OSError:  # URLError is one: no network
                raise UserError(MISSING) from None
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                reason = first_line(error)
                raise UserError(f"the Inception weights under TORCH_HOME are damaged ({reason}); delete them") from None
            return net.eval()

        self.dims = dims or 2048
        net = build(self.dims)
        if self.dims == 2048 and any(p.isnan().any() for p in net.parameters()):
            if dims is not None:
                raise UserError("2048-d features need the official Inception weights; those here stop at Mixed_7a")
            self.dims, self.note = 768, " (the Inception weights on this machine stop before the 2048-d layer)"
            net = build(self.dims)
        self.sizes = (*also, self.dims)
        self.net = fuse_batch_norm(net).to(device, memory_format=torch.channels_last)

    @property
    def name(self) -> str:
        return distance_name(self.dims)

    def distances(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Fréchet distances between two sets of ``features``, one for each of ``sizes``, by their names."""
        pairs = zip(x.split(self.sizes, dim=1), y.split(self.sizes, dim=1), strict=True)
        return {distance_name(size): frechet_distance(a, b) for size, (a, b) in zip(self.sizes, pairs, strict=True)}

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int = 50, what: str = "Inception") -> Tensor:
        """uint8 (N, 3, H, W) -> float32 features (N, sum of sizes) on the CPU."""
        batches = []
        for batch in tqdm(images.split(batch_size), what, unit="batch", leave=False, disable=len(images) < 200):
            x = batch.to(self.device).float() / 255
            blocks = self.net(x.contiguous(memory_format=torch.channels_last))
            batches.append(torch.cat([b.mean((2, 3)) for b in blocks], 1).cpu())  # 2048 comes pooled to 1x1
        return torch.cat(batches)

    def reference(self, images: Tensor, cache: Path) -> Tensor:
        """Features of real images, kept in the file ``cache`` for as long as the pixels stay the same."""
        key = f"{self.sizes} {len(images)} {checksum(images)}"

        def compute() -> Tensor:
            return self.features(images, what="Inception, real images (kept)").view(torch.uint8)

        return cached(cache, key, compute).view(torch.float32)


class HeldOutDistance:
    """The score "fd" of training: the Fréchet distance to held-out training images, uint8 (N, 3, H, W).

    Always of 768 dimensions, so that scores of a run that moves to another machine can be compared. Where Inception's
    weights cannot be had it says so, and there is no score: training goes on without.
    """

    def __init__(self, images: Tensor, device: torch.device, data: Path):
        self.images, self.cache, self.inception = images, cache_file(data, "held_out_features"), None
        try:
            self.inception = Inception(device, 768)
        except UserError as error:
            tqdm.write(f"note: no Fréchet distance in this run, the last weights are taken as the best: {error}")

    def __call__(self, samples: Tensor) -> dict[str, float]:
        if not self.inception:
            return {}
        features = self.inception.features(samples, what="Inception, samples")
        return {"fd": frechet_distance(features, self.inception.reference(self.images, self.cache))}


def distance_name(dims: int) -> str:
    """Only the distance of the 2048-dimensional features is called FID."""
    return "FID" if dims == 2048 else f"FD-{dims}"


def fuse_batch_norm(net: torch.nn.Module) -> torch.nn.Module:
    """Fold every batch norm of the Inception blocks into its convolution: the same features, fewer passes."""
    for module in net.modules():
        if hasattr(module, "conv") and isinstance(getattr(module, "bn", None), torch.nn.BatchNorm2d):
            module.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()
    return net

"""SNGAN: the DCGAN generator with a spectrally normalised discriminator.

Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018 (arXiv:1802.05957).
Against the DCGAN discriminator: spectral norm on every weight layer, no batch norm, no sigmoid.
"""

from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from models.dcgan import Generator, init_weights

__all__ = ["Discriminator", "Generator"]


class Discriminator(nn.Module):
    """Images (N, 3, 64, 64) in [-1, 1] -> logits of being real (N,).

    4,314,753 weights at ``dim`` 64, power-iteration vectors not counted. One power iteration
    (algorithm 1 of the paper) runs at every forward pass in training mode. The hook-based
    ``torch.nn.utils.spectral_norm`` is used because it leaves the printed network as the report has it.
    """

    batch_norm = False

    def __init__(self, dim: int = 64):
        super().__init__()

        def down(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 5, stride=2, padding=2), nn.LeakyReLU(0.2))

        self.ls = nn.Sequential(
            nn.Conv2d(3, dim, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            down(dim, dim * 2),
            down(dim * 2, dim * 4),
            down(dim * 4, dim * 8),
            nn.Conv2d(dim * 8, 1, 4),
        )
        self.apply(init_weights)
        for module in self.ls.modules():
            if isinstance(module, nn.Conv2d):
                spectral_norm(module)

    def logits(self, x: Tensor) -> Tensor:
        return self.ls(x).flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)

"""DCGAN for 64x64 RGB images: the generator both methods share, and the batch-norm discriminator.

Source: Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", 2016 (arXiv:1511.06434), with 5x5 kernels as in the paper's figure 1.
"""

from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """DCGAN section 4: weights ~ N(0, 0.02). Batch-norm scales ~ N(1, 0.02) and biases 0, as is usual with it.

    Use as ``network.apply(init_weights)``, before spectral norm wraps anything.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z (N, z_dim) ~ N(0, I) -> images (N, 3, 64, 64) in [-1, 1].

    ``dim`` is the width of the last hidden layer; the report's 64 gives 5,142,083 parameters.
    """

    def __init__(self, z_dim: int = 100, dim: int = 64):
        super().__init__()
        self.z_dim = z_dim

        def up(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.ConvTranspose2d(c_in, c_out, 5, stride=2, padding=2, output_padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            )

        self.l1 = nn.Sequential(
            nn.Linear(z_dim, dim * 8 * 4 * 4, bias=False),
            nn.BatchNorm1d(dim * 8 * 4 * 4),
            nn.ReLU(),
        )
        self.l2_5 = nn.Sequential(
            up(dim * 8, dim * 4),
            up(dim * 4, dim * 2),
            up(dim * 2, dim),
            nn.ConvTranspose2d(dim, 3, 5, stride=2, padding=2, output_padding=1),
            nn.Tanh(),
        )
        self.apply(init_weights)

    def forward(self, z: Tensor) -> Tensor:
        h = self.l1(z)
        h = h.view(h.shape[0], -1, 4, 4)  # (N, 512, 4, 4)
        return self.l2_5(h)  # (N, 3, 64, 64)


class Discriminator(nn.Module):
    """Images (N, 3, 64, 64) in [-1, 1] -> probability of being real (N,). 4,316,545 parameters at ``dim`` 64."""

    batch_norm = True  # what it says of an image depends on the others in the batch

    def __init__(self, dim: int = 64):
        super().__init__()

        def down(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 5, stride=2, padding=2),
                nn.BatchNorm2d(c_out),
                nn.LeakyReLU(0.2),
            )

        self.ls = nn.Sequential(
            nn.Conv2d(3, dim, 5, stride=2, padding=2),
            nn.LeakyReLU(0.2),
            down(dim, dim * 2),
            down(dim * 2, dim * 4),
            down(dim * 4, dim * 8),
            nn.Conv2d(dim * 8, 1, 4),
            nn.Sigmoid(),
        )
        self.apply(init_weights)

    def logits(self, x: Tensor) -> Tensor:
        """``forward`` before the sigmoid, (N,), for training: BCELoss(forward(x)) equals BCEWithLogitsLoss(logits(x)),
        which stays finite when the discriminator is certain."""
        return self.ls[:-1](x).flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.ls(x).flatten()

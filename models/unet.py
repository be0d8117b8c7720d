"""UNet_conditional: the noise predictor of problem 2, as the report prints it (15,664,515 parameters).

Sources: Ronneberger et al. 2015 (arXiv:1505.04597), the U shape; Ho et al. 2020 (arXiv:2006.11239), its use as
eps_theta(x_t, t); Vaswani et al. 2017 (arXiv:1706.03762), the sinusoidal code of t and the attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_DIM = 256  # length of the code of t, and of a label's embedding


def time_code(t: Tensor, dim: int = TIME_DIM) -> Tensor:
    """Steps t (N,) -> (N, dim): dim / 2 sines, then the cosines, at frequencies 10000^(-2i / dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=t.device).float() / dim)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with one-group normalisation: f(x), or gelu(x + f(x)) when ``residual``."""

    def __init__(self, c_in: int, c_out: int, c_mid: int | None = None, residual: bool = False):
        super().__init__()
        self.residual = residual
        c_mid = c_mid or c_out
        self.double_conv = nn.Sequential(
            nn.Conv2d(c_in, c_mid, 3, padding=1, bias=False),
            nn.GroupNorm(1, c_mid),
            nn.GELU(),
            nn.Conv2d(c_mid, c_out, 3, padding=1, bias=False),
            nn.GroupNorm(1, c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.double_conv(x)) if self.residual else self.double_conv(x)


def emb_layer(c_out: int) -> nn.Sequential:
    """Code of time and label (N, 256) -> an offset for each channel (N, c_out)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(TIME_DIM, c_out))


class Down(nn.Module):
    """(N, c_in, H, W) -> (N, c_out, H / 2, W / 2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2),
            DoubleConv(c_in, c_in, residual=True),
            DoubleConv(c_in, c_out),
        )
        self.emb_layer = emb_layer(c_out)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return self.maxpool_conv(x) + self.emb_layer(code)[:, :, None, None]


class Up(nn.Module):
    """x (N, C, H, W) and a skip connection (N, c_in - C, 2H, 2W) -> (N, c_out, 2H, 2W)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = nn.Sequential(
            DoubleConv(c_in, c_in, residual=True),
            DoubleConv(c_in, c_out, c_in // 2),
        )
        self.emb_layer = emb_layer(c_out)

    def forward(self, x: Tensor, skip: Tensor, code: Tensor) -> Tensor:
        x = torch.cat([skip, self.up(x)], dim=1)
        return self.conv(x) + self.emb_layer(code)[:, :, None, None]


class SelfAttention(nn.Module):
    """Attention among all pixels, pre-norm, 4 heads; (N, channels, H, W) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]),
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (N, H W, C)
        tokens = tokens + self.attend(self.ln(tokens))
        tokens = tokens + self.ff_self(tokens)
        return tokens.transpose(1, 2).reshape(n, c, h, w)

    def attend(self, tokens: Tensor) -> Tensor:
        """What ``self.mha(tokens, tokens, tokens)`` gives, (N, L, C). Its own inference path keeps all L x L weights
        in memory, and is slower."""
        projected = F.linear(tokens, self.mha.in_proj_weight, self.mha.in_proj_bias)
        heads = projected.unflatten(2, (3, self.mha.num_heads, -1)).permute(2, 0, 3, 1, 4)  # q, k, v: (N, 4, L, C / 4)
        mixed = F.scaled_dot_product_attention(*heads)
        return self.mha.out_proj(mixed.transpose(1, 2).flatten(2))


class UNet_conditional(nn.Module):
    """eps_theta(x_t, t, y): noisy images (N, 3, H, W), steps t (N,) in 1 ... T, labels y (N,) -> predicted noise.

    With ``predicts`` = "velocity" the output is v_theta(x_t, t, y) instead; ``models.diffusion.predict_eps`` turns it
    into noise. Nothing in the network changes with it.
    A label of -1 means unconditional: its embedding is left out of the code. H and W are padded to a multiple of 8
    by reflection and the output is cropped back, so 28x28 digits are predicted at 32x32 and nothing is resized.
    ``dim`` is the width of the first layer; the report has 64. ``size`` is the side of the images it is trained on,
    for those who sample from it: 28, or 32 as in the report, which resizes digits. The layers take any.
    """

    def __init__(self, dim: int = 64, classes: int = 10, predicts: str = "noise", size: int = 28):
        super().__init__()
        self.predicts, self.size = predicts, size
        self.inc = DoubleConv(3, dim)
        self.down1 = Down(dim, dim * 2)
        self.sa1 = SelfAttention(dim * 2)
        self.down2 = Down(dim * 2, dim * 4)
        self.sa2 = SelfAttention(dim * 4)
        self.down3 = Down(dim * 4, dim * 4)
        self.sa3 = SelfAttention(dim * 4)
        self.bot1 = DoubleConv(dim * 4, dim * 4)
        self.bot3 = DoubleConv(dim * 4, dim * 4)
        self.up1 = Up(dim * 8, dim * 2)
        self.sa4 = SelfAttention(dim * 2)
        self.up2 = Up(dim * 4, dim)
        self.sa5 = SelfAttention(dim)
        self.up3 = Up(dim * 2, dim)
        self.sa6 = SelfAttention(dim)
        self.outc = nn.Conv2d(dim, 3, 1)
        self.label_emb = nn.Embedding(classes, TIME_DIM)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x, top, left = pad_to_multiple(x, 8)  # (N, 3, 32, 32) for digits
        labelled = (y >= 0)[:, None]
        code = time_code(t) + labelled * self.label_emb(y.clamp(min=0))  # (N, 256)

        x1 = self.inc(x)  # (N, 64, 32, 32)
        x2 = self.sa1(self.down1(x1, code))  # (N, 128, 16, 16)
        x3 = self.sa2(self.down2(x2, code))  # (N, 256, 8, 8)
        x4 = self.sa3(self.down3(x3, code))  # (N, 256, 4, 4)
        x4 = self.bot3(self.bot1(x4))
        x = self.sa4(self.up1(x4, x3, code))  # (N, 128, 8, 8)
        x = self.sa5(self.up2(x, x2, code))  # (N, 64, 16, 16)
        x = self.sa6(self.up3(x, x1, code))  # (N, 64, 32, 32)
        return self.outc(x)[:, :, top : top + h, left : left + w]


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, int, int]:
    """(x padded by reflection so that both sides divide by ``multiple``, rows added above, columns added left)."""
    rows, columns = -x.shape[2] % multiple, -x.shape[3] % multiple
    top, left = rows // 2, columns // 2
    return F.pad(x, (left, columns - left, top, rows - top), mode="reflect"), top, left

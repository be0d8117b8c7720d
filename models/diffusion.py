"""Denoising diffusion: the process, the training loss, three samplers, two kinds of guidance and calibration.

Notation of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (DDPM, arXiv:2006.11239): steps t = 1 ... T,
x_0 an image in [-1, 1], x_T nearly N(0, I), alpha_bar_t the share of the image's variance left at t, alpha_bar_0 = 1.
Every sampler is a function of a noise predictor and a start:

    sampler(predict, x_T, process, ...) -> x_0        predict(x_t, t) -> eps,  t an int in 1 ... T

and calls ``watch(t, x_t)``, where given, at the start and after every step. What is random in a step comes from
``draw(t)`` -> standard normal noise like x_t, for the step that begins at t.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Predict = Callable[[Tensor, int], Tensor]
Watch = Callable[[int, Tensor], None]
Draw = Callable[[int], Tensor]


class Process:
    """The forward process with the linear schedule beta_1 = 1e-4 ... beta_T = 0.02, in float64.

    ``beta``, ``alpha``, ``alpha_bar``: (T + 1,), indexed by t; index 0 is the clean image (beta_0 = 0).
    """

    def __init__(self, T: int = 600, beta_1: float = 1e-4, beta_T: float = 0.02):
        self.T = T
        self.beta = torch.cat([torch.zeros(1), torch.linspace(beta_1, beta_T, T, dtype=torch.float64)])
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        self.copies: dict[torch.device, Tensor] = {}

    def alpha_bar_on(self, device: torch.device) -> Tensor:
        """``alpha_bar``, copied to ``device`` once: a copy at every step would wait for all work queued there."""
        if device not in self.copies:
            self.copies[device] = self.alpha_bar.to(device)
        return self.copies[device]

    def signal(self, t: int) -> float:
        """sqrt(alpha_bar_t), the scale of x_0 in x_t."""
        return math.sqrt(self.alpha_bar[t])

    def sigma(self, t: int) -> float:
        """sqrt(1 - alpha_bar_t), the scale of eps in x_t."""
        return math.sqrt(1 - self.alpha_bar[t])

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM eq. 4). x_0, eps (N, C, H, W); t (N,)."""
        alpha_bar = self.alpha_bar_on(t.device)[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(x_0.dtype) * x_0 + (1 - alpha_bar).sqrt().to(x_0.dtype) * eps

    def to_x_0(self, x_t: Tensor, t: int, eps: Tensor, clamp: bool = True) -> Tensor:
        """The image that x_t and eps imply: eq. 4 solved for x_0, with ``clamp`` limited to [-1, 1]."""
        x_0 = (x_t - self.sigma(t) * eps) / self.signal(t)
        return x_0.clamp(-1, 1) if clamp else x_0

    def to_eps(self, x_t: Tensor, t: int, x_0: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply: eq. 4 solved for eps."""
        return (x_t - self.signal(t) * x_0) / self.sigma(t)


def predict_eps(network: nn.Module, process: Process, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """eps_theta(x_t, t, y) of a network that predicts the noise, or the velocity v = sqrt(alpha_bar_t) eps -
    sqrt(1 - alpha_bar_t) x_0, in float32. x_t (N, C, H, W); t (N,) in 1 ... T; y (N,) labels, -1 for none.

    Salimans & Ho 2022, "Progressive Distillation" (arXiv:2202.00512), section 4 and appendix D. At high noise v is
    nearly -x_0. A network that predicts the noise has to hand x_t through to a thousandth there: at t = 600 its errors
    are 21 times larger in the image.
    """
    out = network(x_t, t, y).float()
    if network.predicts == "noise":
        return out
    return process.q_sample(x_0=out, t=t, eps=x_t)  # sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t


def snr_weight(process: Process, gamma: float = 5.0, floor: float = 0.0) -> Tensor:
    """Loss weights (T + 1,) of the noise error, so that the image error is weighted by the signal-to-noise ratio
    SNR_t = alpha_bar_t / (1 - alpha_bar_t) within [``floor``, ``gamma``]: |x_0 error|^2 = |eps error|^2 / SNR.

    ``gamma`` (0 for none): Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
    (arXiv:2303.09556), section 3.4. ``floor``: the truncated SNR of Salimans & Ho 2022 (arXiv:2202.00512), section 4,
    1 there. It gives weight to the steps where the content of an image is decided.
    """
    snr = process.alpha_bar / (1 - process.alpha_bar)  # infinite at t = 0, which is never trained
    return snr.clamp(floor, gamma or math.inf) / snr


def training_loss(
    network: nn.Module, process: Process, x_0: Tensor, y: Tensor, t: Tensor, eps: Tensor, weight: Tensor | None = None
) -> Tensor:
    """|eps - eps_theta(x_t, t, y)|^2, mean over pixels and images (DDPM algorithm 1, eq. 14), weighted by t if asked.

    x_0, eps (N, C, H, W); y (N,) labels, -1 for none; t (N,) in 1 ... T; ``weight`` (T + 1,).
    """
    predicted = predict_eps(network, process, process.q_sample(x_0, t, eps), t, y)
    losses = (predicted - eps).square().mean((1, 2, 3))  # (N,)
    return losses.mean() if weight is None else (weight.to(t.device)[t].to(losses.dtype) * losses).mean()


def guided(
    network: nn.Module,
    process: Process,
    y: Tensor,
    w: float,
    interval: tuple[float, float] = (0, math.inf),
    rescale: float = 0.0,
) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6) as a noise predictor:

        eps = (1 + w) eps_theta(x_t, t, y) - w eps_theta(x_t, t)

    w = 0 is the conditional network alone. Both branches go through the network in one batch. Outside
    ``interval`` (lowest and highest guided t) w counts as 0, which saves the second branch (Kynkäänniemi et al. 2024,
    arXiv:2404.07724). With ``rescale`` the guided noise is ``rescaled``. y (N,) labels.
    """
    both = torch.cat([y, torch.full_like(y, -1)])

    def predict(x: Tensor, t: int) -> Tensor:
        if w == 0 or not interval[0] <= t <= interval[1]:
            return predict_eps(network, process, x, torch.full_like(y, t), y)
        eps_y, eps = predict_eps(network, process, torch.cat([x, x]), torch.full_like(both, t), both).chunk(2)
        eps_w = (1 + w) * eps_y - w * eps
        return rescaled(process, x, t, eps_y, eps_w, rescale) if rescale else eps_w

    return predict


def rescaled(process: Process, x_t: Tensor, t: int, eps_y: Tensor, eps_w: Tensor, share: float) -> Tensor:
    """The guided noise eps_w (N, C, H, W), changed so that each channel of the image it implies gets the median that
    it has in the unguided image, of eps_y and clamped as in sampling, and its standard deviation ``share`` (above 0,
    at most 1) of the way.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), eq. 15 and 16,
    there without the medians: guidance raises contrast, and the more the larger w is. That guidance is to leave medians
    alone holds where most of an image is background, and that tells nothing of the class, as in MNIST-M. With means
    in their place strokes that become brighter darken the background, from step to step, and the darkest channel most.
    """
    x_y = process.to_x_0(x_t, t, eps_y)
    x_w = process.to_x_0(x_t, t, eps_w, clamp=False)
    factor = 1 - share + share * x_y.std((2, 3), keepdim=True) / x_w.std((2, 3), keepdim=True)
    return process.to_eps(x_t, t, channel_medians(x_y) + factor * (x_w - channel_medians(x_w)))


def autoguided(predict: Predict, worse: Predict, w: float, interval: tuple[float, float] = (0, math.inf)) -> Predict:
    """Autoguidance (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", arXiv:2406.02507;
    w is one more there) as a noise predictor:

        eps = (1 + w) eps(x_t, t) - w eps_worse(x_t, t)

    ``worse`` predicts for the same labels with a network that is smaller and was trained for a shorter time. It errs
    where ``predict`` errs, only farther, and so the way from one to the other goes on towards the data. Outside
    ``interval`` (lowest and highest t) w counts as 0, which saves the call of ``worse``.
    """

    def predicted(x: Tensor, t: int) -> Tensor:
        eps = predict(x, t)
        if w == 0 or not interval[0] <= t <= interval[1]:
            return eps
        return (1 + w) * eps - w * worse(x, t)

    return predicted


def mean_error(network: nn.Module, process: Process, x_0: Tensor, y: Tensor, t: int, eps: Tensor) -> Tensor:
    """By how much the images predicted at t are too bright on average: the mean over images and pixels (C,), in units
    of x_0, of the predicted minus the real one. x_0, eps (N, C, H, W); y (N,) labels. See ``calibrated``."""
    steps = torch.full_like(y, t)
    x_t = process.q_sample(x_0, steps, eps)
    return (process.to_x_0(x_t, t, predict_eps(network, process, x_t, steps, y), clamp=False) - x_0).mean((0, 2, 3))


def calibrated(predict: Predict, process: Process, errors: Tensor) -> Predict:
    """``predict`` without its mean errors (T + 1, C), those of ``mean_error`` at each t, as a noise predictor.

    Pang et al. 2023, "On Calibrating Diffusion Probabilistic Models" (arXiv:2302.10688): over the data, the noise that
    the best predictor finds is 0 on average at every t, and so the average that a trained one finds is taken off. Here
    it is one number for each channel: the brightness of the image that the noise implies.
    """

    def predicted(x: Tensor, t: int) -> Tensor:
        return predict(x, t) + process.signal(t) / process.sigma(t) * errors[t].view(-1, 1, 1)

    return predicted


def channel_medians(x: Tensor) -> Tensor:
    """The (lower) median of each channel of images (N, C, H, W) -> (N, C, 1, 1)."""
    return x.flatten(2).median(2).values[..., None, None]


def timesteps(process: Process, steps: int, power: float = 1.0) -> list[int]:
    """T = t_0 > ... > t_steps = 0 with t_i near T (1 - i / steps)^power. ``steps`` network calls lead from T to 0.

    power = 1 is the linear, 2 the quadratic spacing of DDIM (arXiv:2010.02502, section D.2). Above 1 steps are wider
    where noise is left alone and narrower where the image takes its last details.
    """
    if not 1 <= steps <= process.T or not 1 <= power < math.inf:
        raise ValueError(f"{steps} steps with power {power}: 1 to T = {process.T} steps, power 1 or more")
    return [max(round(process.T * (1 - i / steps) ** power), steps - i) for i in range(steps + 1)]


def ddpm(predict: Predict, x: Tensor, process: Process, draw: Draw, watch: Watch | None = None) -> Tensor:
    """Ancestral sampling (DDPM algorithm 2) in T steps, with the variance of the posterior (eq. 7) and x_0 clamped."""
    if watch:
        watch(process.T, x)
    for t in range(process.T, 0, -1):
        alpha, beta = float(process.alpha[t]), float(process.beta[t])
        before, now = float(process.alpha_bar[t - 1]), float(process.alpha_bar[t])
        x_0 = process.to_x_0(x, t, predict(x, t))
        mean = (math.sqrt(before) * beta * x_0 + math.sqrt(alpha) * (1 - before) * x) / (1 - now)  # eq. 7
        variance = beta * (1 - before) / (1 - now)
        x = mean + math.sqrt(variance) * draw(t) if t > 1 else mean
        if watch:
            watch(t - 1, x)
    return x


def ddim(
    predict: Predict,
    x: Tensor,
    process: Process,
    steps: Sequence[int],
    watch: Watch | None = None,
    eta: float = 0.0,
    draw: Draw | None = None,
) -> Tensor:
    """Sampling along ``steps`` (descending, T to 0): DDIM, eq. 12, with sigma of eq. 16. x_0 is clamped, and eps
    derived from it again.

    Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502). ``eta`` = 0 is deterministic; with 1,
    along all T steps, it is ancestral sampling. ``draw`` is needed for eta > 0.
    """
    if watch:
        watch(steps[0], x)
    for t, s in pairwise(steps):
        x_0 = process.to_x_0(x, t, predict(x, t))
        now, then = float(process.alpha_bar[t]), float(process.alpha_bar[s])
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        eps = process.to_eps(x, t, x_0)
        x = process.signal(s) * x_0 + math.sqrt(1 - then - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * draw(t)
        if watch:
            watch(s, x)
    return x


def dpm_solver_pp(
    predict: Predict,
    x: Tensor,
    process: Process,
    steps: Sequence[int],
    watch: Watch | None = None,
    eta: float = 0.0,
    draw: Draw | None = None,
) -> Tensor:
    """DPM-Solver++(2M) along ``steps`` (descending, T to 0): Lu et al. 2022 (arXiv:2211.01095), algorithm 2.

    The second-order multistep solver of the data prediction; the first step is of first order, and so is the last
    one when it ends in the clean image, where the log signal-to-noise ratio lambda is infinite. x_0 is clamped.
    ``eta`` = 0 is deterministic; 1 is SDE-DPM-Solver++(2M) of the same paper. Values between, with less fresh noise z,
    are not in it. ``draw`` is needed for eta > 0. With lambda = ``log_snr``, h = lambda_s - lambda_t and D the x_0
    extrapolated from the last two predictions, a step is

        x_s = sigma_s / sigma_t e^(-eta h) x_t  +  sqrt(alpha_bar_s) (1 - e^(-(1 + eta) h)) D
              +  sigma_s sqrt(1 - e^(-2 eta h)) z
    """
    if watch:
        watch(steps[0], x)
    x_0_before, h_before = None, 0.0
    for t, s in pairwise(steps):
        x_0 = process.to_x_0(x, t, predict(x, t))
        data = x_0
        if s == 0:
            x = x_0
        else:
            h = log_snr(process, s) - log_snr(process, t)
            if x_0_before is not None:
                r = h_before / h
                data = x_0 + (x_0 - x_0_before) / (2 * r)  # D
            kept = process.sigma(s) / process.sigma(t) * math.exp(-eta * h)
            x = kept * x - process.signal(s) * math.expm1(-(1 + eta) * h) * data
            if eta > 0:
                x = x + process.sigma(s) * math.sqrt(-math.expm1(-2 * eta * h)) * draw(t)
            h_before = h
        x_0_before = x_0
        if watch:
            watch(s, x)
    return x


def log_snr(process: Process, t: int) -> float:
    """lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), half the log signal-to-noise ratio; t >= 1."""
    return math.log(process.signal(t) / process.sigma(t))

"""The diffusion equations against closed forms, and the samplers against a public implementation."""

import math
from itertools import pairwise

import pytest
import torch

from models.diffusion import (
    Process,
    autoguided,
    calibrated,
    ddim,
    ddpm,
    dpm_solver_pp,
    guided,
    log_snr,
    mean_error,
    predict_eps,
    snr_weight,
    timesteps,
    training_loss,
)

PROCESS = Process()
MEAN, STD = 0.2, 0.1  # data ~ N(MEAN, STD^2), for which the best noise predictor is known


class Network:
    """A function (x, t, y) -> what it ``predicts``, in the place of a network."""

    def __init__(self, function, predicts="noise"):
        self.function, self.predicts = function, predicts

    def __call__(self, x, t, y):
        return self.function(x, t, y)


def predict_gaussian(x: torch.Tensor, t: int) -> torch.Tensor:
    """E[eps | x_t] for Gaussian data."""
    a, s = PROCESS.signal(t), PROCESS.sigma(t)
    return s * (x - a * MEAN) / (a**2 * STD**2 + s**2)


def flow(x: torch.Tensor, t: int, s: int) -> torch.Tensor:
    """The exact solution of the probability-flow ODE from t to s for Gaussian data: quantiles stay quantiles."""

    def spread(u: int) -> float:
        return math.sqrt(PROCESS.signal(u) ** 2 * STD**2 + PROCESS.sigma(u) ** 2)

    return PROCESS.signal(s) * MEAN + spread(s) / spread(t) * (x - PROCESS.signal(t) * MEAN)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(like: torch.Tensor, seed: int):
    """draw(t) for the samplers."""
    random = torch.Generator().manual_seed(seed)
    return lambda _t: torch.randn(like.shape, dtype=like.dtype, generator=random)


def test_schedule_is_that_of_the_report():
    assert PROCESS.T == 600
    assert PROCESS.beta.dtype == torch.float64
    assert PROCESS.beta[[1, 600]].tolist() == pytest.approx([1e-4, 0.02])
    assert PROCESS.beta[1:].diff().std() < 1e-15
    assert PROCESS.alpha_bar[0] == 1
    assert PROCESS.alpha_bar[3].item() == pytest.approx(math.prod(1 - b for b in PROCESS.beta[1:4].tolist()))


def test_q_sample_is_the_chain_of_single_steps():
    """t single noising steps (DDPM eq. 2) give the mean and variance of eq. 4."""
    mean, variance = 1.0, 0.0
    for t in range(1, 201):
        mean *= math.sqrt(1 - PROCESS.beta[t])
        variance = (1 - PROCESS.beta[t]) * variance + PROCESS.beta[t]
    assert PROCESS.signal(200) == pytest.approx(mean)
    assert PROCESS.sigma(200) == pytest.approx(math.sqrt(variance))
    x_0, eps = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    x_t = PROCESS.q_sample(x_0, torch.tensor([1, 200, 600]), eps)
    assert torch.allclose(x_t[1], mean * x_0[1] + math.sqrt(variance) * eps[1])


def test_x_0_and_eps_follow_from_each_other():
    x_0, eps = normal(4, 1, 2, 2).clamp(-1, 1), normal(4, 1, 2, 2, seed=1)
    x_t = PROCESS.q_sample(x_0, torch.full((4,), 350), eps)
    assert torch.allclose(PROCESS.to_x_0(x_t, 350, eps), x_0)
    assert torch.allclose(PROCESS.to_eps(x_t, 350, x_0), eps)
    assert PROCESS.to_x_0(x_t, 350, eps - 100).max() == 1


def test_loss_of_known_predictions():
    x_0, eps = normal(4, 3, 2, 2).float(), normal(4, 3, 2, 2, seed=1).float()
    t, y = torch.tensor([1, 200, 400, 600]), torch.tensor([0, 1, 2, -1])
    seen = {}

    def network(x, t, y):
        seen.update(x=x, t=t, y=y)
        return eps + t.view(-1, 1, 1, 1) / 100

    loss = training_loss(Network(network), PROCESS, x_0, y, t, eps)
    assert loss.item() == pytest.approx((0.01**2 + 2**2 + 4**2 + 6**2) / 4, rel=1e-5)
    assert torch.equal(seen["x"], PROCESS.q_sample(x_0, t, eps))
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["y"], y)
    weight = torch.zeros(601)
    weight[200] = 0.5
    weighted = training_loss(Network(network), PROCESS, x_0, y, t, eps, weight)
    assert weighted.item() == pytest.approx(0.5 * 2**2 / 4, rel=1e-5)


def test_velocity_and_noise_follow_from_each_other():
    """From the true velocity follows the true noise, and its image error is the velocity's error times sigma."""
    x_0, eps, t = normal(3, 3, 2, 2).float(), normal(3, 3, 2, 2, seed=1).float(), torch.tensor([1, 300, 600])
    x_t, y = PROCESS.q_sample(x_0, t, eps), torch.zeros(3, dtype=torch.int64)
    signal, sigma = (
        torch.tensor([f(s) for s in t.tolist()]).view(-1, 1, 1, 1) for f in (PROCESS.signal, PROCESS.sigma)
    )

    def velocity(x, t, y):
        return signal * eps - sigma * x_0

    def wrong(x, t, y):
        return velocity(x, t, y) + 0.01

    assert torch.allclose(predict_eps(Network(velocity, "velocity"), PROCESS, x_t, t, y), eps, atol=1e-6)
    error = predict_eps(Network(wrong, "velocity"), PROCESS, x_t, t, y) - eps
    assert torch.allclose(error * sigma / signal, 0.01 * sigma, atol=1e-5)
    assert torch.equal(predict_eps(Network(velocity), PROCESS, x_t, t, y), velocity(x_t, t, y))


def test_loss_weights():
    """Weighted noise errors are image errors times the SNR within bounds: |x_0 error|^2 = |eps error|^2 / SNR."""
    snr = PROCESS.alpha_bar / (1 - PROCESS.alpha_bar)
    for gamma, floor in ((5, 0), (5, 0.5), (1, 1), (0, 0.5)):
        weight = snr_weight(PROCESS, gamma, floor)
        for t in (1, 50, 120, 300, 600):
            bounded = max(min(snr[t].item(), gamma or math.inf), floor)
            assert weight[t].item() == pytest.approx(bounded / snr[t].item())
    assert snr_weight(PROCESS, gamma=5)[600] == 1
    assert torch.equal(snr_weight(PROCESS, gamma=0)[1:], torch.ones(600, dtype=torch.float64))


def test_timesteps_go_from_T_to_0():
    assert timesteps(PROCESS, 5) == [600, 480, 360, 240, 120, 0]
    assert timesteps(PROCESS, 4, power=2) == [600, 338, 150, 38, 0]
    for steps in (1, 7, 15, 50, 599, 600):
        for power in (1, 1.3, 2, 5):
            t = timesteps(PROCESS, steps, power)
            assert (t[0], t[-1], len(t)) == (600, 0, steps + 1)
            assert all(a > b for a, b in pairwise(t))
    for wrong in ((0,), (601,), (5, 0.9), (5, math.inf), (5, math.nan)):
        with pytest.raises(ValueError, match=f"{wrong[0]} steps"):
            timesteps(PROCESS, *wrong)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp, 2)])
def test_solvers_converge_to_the_flow_at_their_order(sampler, order):
    """On a grid even in log-SNR, halving the steps multiplies the error by 2^order."""
    x = normal(200, 1, 1, 1)
    errors = []
    for count in (40, 80):
        grid = torch.linspace(log_snr(PROCESS, 600), log_snr(PROCESS, 40), count + 1).tolist()
        lambdas = [log_snr(PROCESS, t) for t in range(1, 601)]
        steps = [1 + min(range(600), key=lambda i: abs(lambdas[i] - g)) for g in grid]
        errors.append((sampler(predict_gaussian, x, PROCESS, steps) - flow(x, 600, 40)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_ancestral_sampling_gives_the_data_distribution():
    x_T = normal(20_000, 1, 1, 1)
    x = ddpm(predict_gaussian, x_T, PROCESS, draws(x_T, seed=0))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert x.std().item() == pytest.approx(STD, rel=0.06)


def test_ddim_with_all_steps_and_noise_is_ancestral_sampling():
    x_T, noise = normal(100, 1, 1, 1), {t: normal(100, 1, 1, 1, seed=t) for t in range(1, 601)}
    ancestral = ddpm(predict_gaussian, x_T, PROCESS, noise.get)
    steps = timesteps(PROCESS, 600)
    assert torch.allclose(ddim(predict_gaussian, x_T, PROCESS, steps, eta=1, draw=noise.get), ancestral, atol=1e-9)
    some = ddim(predict_gaussian, x_T, PROCESS, steps, eta=0.5, draw=noise.get)
    assert not torch.allclose(some, ancestral, atol=1e-3)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver_pp])
def test_noise_is_not_left_out(sampler):
    """Without ``draw`` the old noise would shrink, and nothing take its place."""
    with pytest.raises(TypeError):
        sampler(lambda x, t: x, torch.zeros(1, 3, 4, 4), PROCESS, [600, 300, 0], eta=0.5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("sampler", [ddim, dpm_solver_pp])
def test_fresh_noise_takes_the_place_of_the_old(sampler, eta):
    """On the way to a known image x_t has the mean and variance of q(x_t | x_0), whatever the steps."""
    x_0, t = 0.7, 80
    x_T = PROCESS.signal(600) * x_0 + PROCESS.sigma(600) * normal(40_000, 1, 1, 1)

    def sampled(draw):
        def oracle(x, t):
            return PROCESS.to_eps(x, t, torch.full_like(x, x_0))

        return sampler(oracle, x_T, PROCESS, [600, 420, 300, t], eta=eta, draw=draw)

    x_t = sampled(draws(x_T, seed=1))
    assert x_t.mean().item() == pytest.approx(PROCESS.signal(t) * x_0, abs=0.005)
    assert x_t.std().item() == pytest.approx(PROCESS.sigma(t), rel=0.02)
    assert sampled(torch.zeros_like(x_T).mul).std() < 0.95 * PROCESS.sigma(t)  # a part of it was fresh


def test_the_second_order_pays_with_fresh_noise_too():
    """Deviation of samples of Gaussian data, in as many steps."""
    x_T = normal(40_000, 1, 1, 1)

    def error(sampler, steps):
        along, draw = timesteps(PROCESS, steps, power=2), draws(x_T, seed=1)
        x = sampler(predict_gaussian, x_T, PROCESS, along, eta=0.5, draw=draw)
        return abs(x.std().item() / STD - 1)

    assert error(dpm_solver_pp, 40) < 0.5 * error(ddim, 40)
    assert error(dpm_solver_pp, 40) < 0.05


def test_one_exact_prediction_is_enough():
    """With the true noise, every sampler returns the image."""
    x_0, eps = normal(2, 3, 4, 4).clamp(-1, 1), normal(2, 3, 4, 4, seed=1)
    x_T = PROCESS.q_sample(x_0, torch.full((2,), 600), eps)

    def oracle(x, t):
        return PROCESS.to_eps(x, t, x_0)

    for sampler in (ddim, dpm_solver_pp):
        assert torch.allclose(sampler(oracle, x_T, PROCESS, timesteps(PROCESS, 7)), x_0, atol=1e-9)
    assert torch.allclose(ddpm(oracle, x_T, PROCESS, torch.zeros_like(x_T).mul), x_0, atol=1e-9)


def test_trajectories():
    seen = []
    x = normal(1, 1, 1, 1)
    for sampler in (ddim, dpm_solver_pp):
        end = sampler(predict_gaussian, x, PROCESS, [600, 300, 0], watch=lambda t, x: seen.append((t, x)))
        assert [t for t, _ in seen] == [600, 300, 0]
        assert seen[0][1] is x
        assert seen[-1][1] is end
        seen.clear()
    ddpm(predict_gaussian, x, PROCESS, lambda t: torch.zeros_like(x), watch=lambda t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == list(range(600, -1, -1))


def test_guidance():
    calls = []

    def network(x, t, y):
        calls.append(len(x))
        return x * (y.view(-1, 1, 1, 1) + 2) * t.view(-1, 1, 1, 1)

    x, y = torch.ones(3, 1, 1, 1), torch.tensor([0, 4, 9])
    conditional, unconditional = 10 * (y + 2.0), torch.full((3,), 10.0)  # label -1 multiplies by 1

    def predicted(w, **interval):
        return guided(Network(network), PROCESS, y, w, **interval)(x, 10).flatten()

    assert torch.equal(predicted(0), conditional)
    assert torch.equal(predicted(-1), unconditional)
    assert torch.equal(predicted(2), 3 * conditional - 2 * unconditional)
    assert torch.equal(predicted(2, interval=(11, 99)), conditional)
    assert torch.equal(predicted(2, interval=(1, 9)), conditional)
    assert calls == [3, 6, 6, 3, 3]
    assert torch.equal(predicted(2, interval=(10, 10)), 3 * conditional - 2 * unconditional)


def test_autoguidance_takes_back_errors_of_one_kind():
    """A worse network whose error is k times as large, guided away from with w = 1 / (k - 1), leaves no error."""
    truth, error, k = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), 3
    x, asked = torch.zeros_like(truth), []

    def predict(x, t):
        return truth + error

    def worse(x, t):
        asked.append(t)
        return truth + k * error

    ours = autoguided(predict, worse, 1 / (k - 1), (10, 20))
    for t in (10, 20):
        assert torch.allclose(ours(x, t), truth, atol=1e-6)
    for t in (9, 21):
        assert torch.equal(ours(x, t), truth + error)
    assert torch.equal(autoguided(predict, worse, 0)(x, 15), truth + error)
    assert torch.allclose(autoguided(predict, worse, 1)(x, 600), truth - error, atol=1e-6)
    assert asked == [10, 20, 600]


def test_calibration_takes_back_the_mean_error():
    """Of a network whose images are too bright by another amount in each channel; what errs both ways stays."""
    x_0, eps, t = normal(4, 3, 8, 8).float(), normal(4, 3, 8, 8, seed=1).float(), 300
    too_bright, pattern = torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1), 0.5 * torch.tensor([1.0, -1.0]).repeat(4)
    x_t, y = PROCESS.q_sample(x_0, torch.full((4,), t), eps), torch.zeros(4, dtype=torch.int64)

    def network(x, t, y):
        return PROCESS.to_eps(x, int(t[0]), x_0 + too_bright + pattern)

    errors = torch.zeros(601, 3)
    errors[t] = mean_error(Network(network), PROCESS, x_0, y, t, eps)
    assert torch.allclose(errors[t], too_bright.flatten(), atol=1e-5)
    ours = calibrated(guided(Network(network), PROCESS, y, w=0), PROCESS, errors)
    assert torch.allclose(PROCESS.to_x_0(x_t, t, ours(x_t, t), clamp=False), x_0 + pattern, atol=1e-5)
    assert torch.equal(ours(x_t, 299), network(x_t, torch.tensor([299]), y))


def test_rescaled_guidance_keeps_median_and_contrast():
    """Of each channel of the image that the noise implies: the median always, the deviation as far as asked."""
    t, (x_t, clean, direction) = 300, (0.07 * normal(4, 3, 8, 8, seed=seed) for seed in range(3))
    conditional = PROCESS.to_eps(x_t, t, clean)
    unconditional = PROCESS.to_eps(x_t, t, clean - direction - 0.1)

    def network(x, _t, y):
        return torch.cat([conditional, unconditional]) if len(x) == 8 else conditional

    def implied(w, rescale):
        predict = guided(Network(network), PROCESS, torch.zeros(4, dtype=torch.long), w, rescale=rescale)
        return PROCESS.to_x_0(x_t, t, predict(x_t, t))

    def moments(x):
        return x.flatten(2).sort().values[..., 31], x.std((2, 3))  # the 32nd of 64 pixels: the lower median

    (median, deviation), (_, raised) = moments(implied(0, 0)), moments(implied(2, 0))
    for share in (0.25, 1.0):
        ours = moments(implied(2, share))
        assert torch.allclose(ours[0], median, atol=1e-5)
        assert torch.allclose(ours[1], (1 - share) * raised + share * deviation, atol=1e-5)
    assert (moments(implied(2, 0))[0] - median > 0.1).all()  # as they are without
    assert (raised > 1.5 * deviation).all()


# x_0 for x_T = -2, -1, 0, 1, 2 by diffusers 0.35.2: DDIMScheduler(clip_sample=True, clip_sample_range=1.0) stepped with
# use_clipped_model_output=True, DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2,
# final_sigmas_type="zero"), both with num_train_timesteps=600, beta_start=1e-4, beta_end=0.02,
# timestep_spacing="trailing" and predict_gaussian as the model. Their timesteps count from 0.
DIFFUSERS = {
    ("ddim", 10): [0.128974, 0.164317, 0.19966, 0.235003, 0.270347],
    ("ddim", 20): [0.084818, 0.142134, 0.199449, 0.256764, 0.31408],
    ("ddim", 50): [0.038837, 0.119033, 0.199229, 0.279425, 0.359621],
    ("dpm++", 10): [0.128102, 0.163879, 0.199656, 0.235433, 0.27121],
    ("dpm++", 20): [0.080639, 0.140034, 0.199429, 0.258824, 0.318219],
    ("dpm++", 50): [0.026284, 0.112727, 0.199169, 0.285612, 0.372054],
}


@pytest.mark.parametrize(("name", "steps"), DIFFUSERS)
def test_agrees_with_diffusers(name, steps):
    sampler = {"ddim": ddim, "dpm++": dpm_solver_pp}[name]
    start = torch.linspace(-2, 2, 5).view(5, 1, 1, 1)
    ours = sampler(predict_gaussian, start, PROCESS, timesteps(PROCESS, steps))
    assert ours.flatten().tolist() == pytest.approx(DIFFUSERS[name, steps], abs=2e-6)

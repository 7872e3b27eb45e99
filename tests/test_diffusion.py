"""diffusion.py against closed forms and against diffusers; learning and wiring of the denoisers."""
import math

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

import diffusion
from diffusion import SCHEDULES, Diffusion, StepEmbedding, Transformer, UNet, alpha_bar_cosine, alpha_bar_linear, drop_condition, modulate


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# -- schedules and the forward process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_equal_diffusers(name, theirs):
    alpha_bar = SCHEDULES[name](1000)
    assert alpha_bar.dtype == torch.float64 and len(alpha_bar) == 1001 and alpha_bar[0] == 1
    reference = diffusers.DDPMScheduler(1000, beta_schedule=theirs).alphas_cumprod
    torch.testing.assert_close(alpha_bar[1:].float(), reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("T", [10, 50, 300, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_end_in_noise_for_any_T(name, T):
    alpha_bar = SCHEDULES[name](T)
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] < 1e-3


def test_schedule_that_keeps_the_signal_is_refused():
    unscaled = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 300)).cumprod(0)])
    with pytest.raises(ValueError, match="at most 0.01 and above 0, got 1 to 0.04"):
        Diffusion(unscaled)


def test_q_sample_moments():
    process, x0 = Diffusion(alpha_bar_cosine(100)), torch.full((200_000, 1), 2.0)
    for t in (1, 50, 100):
        xt = process.q_sample(x0, torch.full((len(x0),), t), torch.randn(x0.shape, generator=rng(t)))
        alpha_bar = alpha_bar_cosine(100)[t].item()
        assert abs(xt.mean() - 2 * math.sqrt(alpha_bar)) < 0.01
        assert abs(xt.var() / (1 - alpha_bar) - 1) < 0.02
    assert torch.equal(process.q_sample(x0, torch.zeros(len(x0), dtype=torch.long), torch.randn_like(x0)), x0)


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_min_snr_weights_one_error_alike_in_every_parameterisation(predict):
    """A denoiser whose guess of x0 is off by 0.1 has loss mean(min(SNR, 5)) 0.01, whatever its output means. min-SNR eq. 5."""
    alpha_bar, x0 = alpha_bar_cosine(1000), torch.randn(4096, 3, generator=rng())
    process, seen = Diffusion(alpha_bar, predict, "min-snr"), {}

    def model(xt, t, y):
        a, s = (table[t][:, None] for table in (alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()))
        seen["t"], guess = t, x0 + 0.1
        eps = (xt - a * guess) / s
        return {"eps": eps, "x0": guess, "v": a * eps - s * guess}[predict]

    torch.manual_seed(0)
    loss, snr = process.loss(model, x0), (alpha_bar / (1 - alpha_bar))[seen["t"]]
    assert seen["t"].min() == 1 and seen["t"].max() == 1000
    assert loss.item() == pytest.approx(0.01 * snr.clamp(max=5).mean().item(), rel=2e-3)


# -- samplers against diffusers -----------------------------------------------------------------------------------------


def denoiser(xt, t, y=None):
    """A fixed smooth function in place of a network; t counts from 1."""
    return torch.tanh(xt.roll(1, -1) * 0.7 + torch.sin(t.float() / 50)[:, None]) * 0.8


KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def theirs(scheduler, steps, **step_settings):
    generator = rng(7)
    x = torch.randn(16, 32, generator=generator)
    if isinstance(steps, list):
        scheduler.set_timesteps(timesteps=steps)
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = denoiser(x, torch.full((16,), int(t) + 1))
        noise = {} if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) else dict(generator=generator)
        x = scheduler.step(out, t, x, **noise, **step_settings).prev_sample
    return x


def ours(predict, alpha_bar, **settings):
    return Diffusion(alpha_bar, predict).sample(denoiser, (16, 32), generator=rng(7), **settings)


@pytest.mark.parametrize("predict", KINDS)
def test_ddpm_equals_diffusers(predict):
    scheduler = diffusers.DDPMScheduler(1000, prediction_type=KINDS[predict], clip_sample=False, timestep_spacing="leading")
    got = ours(predict, alpha_bar_linear(1000), sampler="ddpm", steps=1000)
    torch.testing.assert_close(got, theirs(scheduler, 1000), rtol=1e-5, atol=1e-5 * max(1, got.abs().max().item()))


@pytest.mark.parametrize("predict", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(predict, eta):
    scheduler = diffusers.DDIMScheduler(1000, prediction_type=KINDS[predict], clip_sample=False, timestep_spacing="trailing")
    got = ours(predict, alpha_bar_linear(1000), sampler="ddim", steps=20, eta=eta)
    torch.testing.assert_close(got, theirs(scheduler, 20, eta=eta), rtol=1e-5, atol=1e-5 * max(1, got.abs().max().item()))


@pytest.mark.parametrize("predict", KINDS)
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_dpm_solver_equals_diffusers(predict, steps):
    settings = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero")
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, prediction_type=KINDS[predict], **settings)
    process = Diffusion(alpha_bar_linear(1000), predict)
    ts = process.timesteps(steps, "karras")
    assert len(ts) == steps + 1 and ts[-1] == 0
    got = process.sample(denoiser, (16, 32), generator=rng(7), sampler="dpm++", steps=steps)
    torch.testing.assert_close(got, theirs(scheduler, [t - 1 for t in ts[:-1]]), rtol=1e-5, atol=1e-5 * max(1, got.abs().max().item()))


def test_karras_spacing_follows_its_rule():
    process = Diffusion(alpha_bar_cosine(1000))
    sigma = lambda t: process.s[t] / process.a[t]
    for t, want in zip(process.timesteps(10, "karras"), np.linspace(80 ** (1 / 7), sigma(1) ** (1 / 7), 10) ** 7):
        assert abs(math.log(sigma(t) / want)) <= abs(math.log(sigma(t + 1) / sigma(max(t - 1, 1))))  # within the table's own spacing


def test_number_of_evaluations_is_the_number_asked_for():
    process, calls = Diffusion(alpha_bar_cosine(1000)), []
    for sampler, steps in [("ddpm", 250), ("ddim", 7), ("dpm++", 1), ("dpm++", 8), ("dpm++", 250), ("dpm++", 999), ("dpm++", 1000)]:
        calls.clear()
        process.sample(lambda xt, t, y: calls.append(1) or xt * 0, (1, 2), sampler=sampler, steps=steps)
        assert len(calls) == steps
        ts = process.timesteps(steps, "karras")
        assert len(ts) == steps + 1 and all(a > b for a, b in zip(ts, ts[1:])) and ts[0] <= 1000 and ts[-1] == 0
    with pytest.raises(ValueError, match="1..1000"):
        process.sample(denoiser, (1, 2), steps=1001)


# -- samplers against distributions in closed form ----------------------------------------------------------------------


def gaussian_denoiser(process, mu, sd):
    """The optimal x0 of data N(mu, sd^2): the posterior mean given xt."""

    def model(xt, t, y=None):
        a, s = process.a[int(t[0])], process.s[int(t[0])]
        return mu + a * sd**2 / (a**2 * sd**2 + s**2) * (xt - a * mu)

    return model


@pytest.mark.parametrize("sampler, spacing, order", [("ddim", "trailing", 1), ("dpm++", "karras", 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, spacing, order):
    """For Gaussian data the exact map of the noise x at step t is mu + sd (x - a mu) / sqrt(a^2 sd^2 + s^2)."""
    process, mu, sd = Diffusion(alpha_bar_cosine(20_000), "x0"), 0.3, 0.5
    x, errors = torch.randn(64, 1, generator=rng(3)), []
    for steps in (20, 40, 80):
        t = process.timesteps(steps, spacing)[0]
        exact = mu + sd * (x - process.a[t] * mu) / math.sqrt(process.a[t] ** 2 * sd**2 + process.s[t] ** 2)
        got = process.sample(gaussian_denoiser(process, mu, sd), (64, 1), sampler=sampler, steps=steps, generator=rng(3))
        errors.append((got - exact).abs().mean().item())
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(order - 0.25 < rate < order + 0.6 for rate in rates), (errors, rates)


@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_have_the_standard_deviation_of_the_data(name):
    """The slip of one index in DDIM that a peer has gives 0.49 here at 299 of 300 steps."""
    process, sd = Diffusion(SCHEDULES[name](300), "x0"), 0.5
    for sampler, steps in [("ddim", 299), ("ddim", 300), ("ddpm", 300), ("dpm++", 50)]:
        x = process.sample(gaussian_denoiser(process, 0.0, sd), (20_000, 1), sampler=sampler, steps=steps, generator=rng(1))
        assert abs(x.std() / sd - 1) < (0.04 if sampler == "ddpm" else 0.025), (sampler, steps)  # ddpm: its own error at T = 300


@pytest.mark.parametrize("settings", [dict(sampler="ddpm", steps=300), dict(sampler="ddim", steps=300, eta=0.5), dict(sampler="dpm++", steps=60)])
def test_samplers_reach_a_mixture(settings):
    """Data 0.3 N(-1, 0.1^2) + 0.7 N(0.8, 0.2^2), whose posterior mean is known: Wasserstein distance of samples to the data."""
    process = Diffusion(alpha_bar_cosine(1000), "x0")
    w, mu, sd = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.1, 0.2])

    def model(xt, t, y):
        a, s = process.a[int(t[0])], process.s[int(t[0])]
        var = a**2 * sd**2 + s**2
        p = (w.log() - var.log() / 2 - (xt - a * mu) ** 2 / (2 * var)).softmax(-1)  # (B, 2)
        return (p * (mu + a * sd**2 / var * (xt - a * mu))).sum(-1, keepdim=True)

    x = process.sample(model, (20_000, 1), generator=rng(0), **settings)[:, 0]
    k = torch.multinomial(w, 20_000, replacement=True, generator=rng(1))
    data = mu[k] + sd[k] * torch.randn(20_000, generator=rng(2))
    assert scipy.stats.wasserstein_distance(x, data) < 0.035


def test_ddpm_steps_have_the_posterior_of_eq_7():
    """With a denoiser that knows x0, a step from t to t-1 is a draw of q(x_{t-1} | x_t, x0)."""
    alpha_bar, x0 = alpha_bar_cosine(12), torch.full((100_000, 1), 0.7)
    process = Diffusion(alpha_bar, "x0")
    xt = torch.randn(100_000, 1, generator=rng(5))
    for u, xu, _ in process.trajectory(lambda x, t, y: x0, (100_000, 1), sampler="ddpm", steps=12, generator=rng(5)):
        if u:
            beta = 1 - alpha_bar[u + 1] / alpha_bar[u]
            mean = alpha_bar[u].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - alpha_bar[u]) * xt
            z = (xu - mean / (1 - alpha_bar[u + 1])) / ((1 - alpha_bar[u]) / (1 - alpha_bar[u + 1]) * beta).sqrt()
            assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
        xt = xu
    assert torch.equal(xt, x0)  # and the last step adds no noise


def test_guidance_clip_and_shape_of_the_trajectory():
    process, settings = Diffusion(alpha_bar_cosine(100), "x0"), dict(sampler="ddim", steps=5, generator=rng())
    conditional = lambda xt, t, y: torch.full_like(xt, 0.1 if y is None else 0.3)
    y = torch.zeros(4, dtype=torch.long)
    assert process.sample(conditional, (4, 2), y, guidance=0.0, **settings).unique().tolist() == pytest.approx([0.3])
    assert process.sample(conditional, (4, 2), y, guidance=2.0, **settings).unique().tolist() == pytest.approx([0.7])  # 3 * 0.3 - 2 * 0.1
    assert process.sample(conditional, (4, 2), y, guidance=9.0, clip=1.0, **settings).unique().tolist() == [1.0]
    assert [t for t, _, _ in process.trajectory(conditional, (4, 2), y, **settings)] == [80, 60, 40, 20, 0]


# -- denoisers ----------------------------------------------------------------------------------------------------------


def context(B, L=5, d=6):
    return torch.randn(B, L, d, generator=rng(9)), torch.arange(L) < torch.arange(2, 2 + B)[:, None].clamp(max=L)


def make(name):
    """A small denoiser, a batch x0 for it, and a condition."""
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    if name == "unet":
        return UNet(3, (16, 32), (1, 2), classes=3), torch.randn(4, 3, 8, 12), y
    if name == "patches":
        return Transformer(3, 64, depth=2, patch=4, classes=3), torch.randn(4, 3, 8, 12), y
    return Transformer(5, 64, depth=2, classes=3, d_context=6), torch.randn(4, 7, 5), (y, *context(4))


DENOISERS = ["unet", "patches", "vectors"]


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_overfits_one_batch(name):
    """It learns to tell four samples apart by xt and their condition, and DDIM finds them again."""
    model, x0, y = make(name)
    process, opt = Diffusion(alpha_bar_cosine(100)), torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for step in range(400):
        loss = process.loss(model, x0.repeat(4, *[1] * (x0.dim() - 1)), tuple(c.repeat(4, *[1] * (c.dim() - 1)) for c in y) if isinstance(y, tuple) else y.repeat(4))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.15 * losses[0]
    found = process.sample(model, x0.shape, y, sampler="ddim", steps=20, generator=rng(4))
    nearest = torch.cdist(found.flatten(1), x0.flatten(1)).min(1).values / math.sqrt(x0[0].numel())
    assert nearest.mean() < 0.3  # per-element distance; unrelated standard normals are at 1.4


def stir(model):
    """Replace the zeros that a denoiser starts with, so that nothing hides behind them."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None
    return model


def test_one_embedding_for_all_modulates_as_one_for_each():
    torch.manual_seed(0)
    h, scale, shift = torch.randn(3, 5, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    torch.testing.assert_close(modulate(h, scale, shift), modulate(h, scale.expand(3, 5, 8), shift.expand(3, 5, 8)))


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_starts_at_zero_and_every_parameter_gets_a_gradient(name):
    model, x0, y = make(name)
    assert not model(x0, torch.full((4,), 10), y).any()
    stir(model)
    (model(x0, torch.tensor([1, 10, 50, 100]), y) * torch.randn(x0.shape, generator=rng())).sum().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), parameter_name


@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_sees_step_condition_and_treats_samples_apart(name):
    model, x0, y = make(name)
    model, t = stir(model).eval(), torch.full((4,), 10)
    out, pick = model(x0, t, y), lambda c: tuple(v[:1] for v in c) if isinstance(c, tuple) else c[:1]
    torch.testing.assert_close(model(x0[:1], t[:1], pick(y)), out[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x0, t + 50, y), out, atol=1e-3)
    nothing = drop_condition(y, 1.0)
    assert not torch.allclose(model(x0, t, nothing), out, atol=1e-3)
    torch.testing.assert_close(model(x0, t, nothing), model(x0, t, None), rtol=1e-4, atol=1e-5)


def test_masked_context_counts_for_nothing_and_the_rest_counts():
    model, x0, (y, c, mask) = make("vectors")
    model, t = stir(model).eval(), torch.full((4,), 10)
    out = model(x0, t, (y, c, mask))
    torch.testing.assert_close(model(x0, t, (y, torch.where(mask[..., None], c, 1e3), mask)), out)
    assert not torch.allclose(model(x0, t, (y, torch.where(mask[..., None], c.flip(0), c), mask)), out, atol=1e-3)
    torch.testing.assert_close(model(x0, t, (y, c[:, :5], mask)), model(x0, t, (y, torch.cat([c, c], 1), torch.cat([mask, mask & False], 1))))


def test_denoisers_take_any_size_that_they_divide_and_name_the_others():
    unet, vit, t = UNet(1, (8, 16, 16), (1, 1, 1)), Transformer(1, 32, 1, 2, patch=4), torch.ones(2, dtype=torch.long)
    for size in [(8, 8), (16, 12), (28, 28)]:
        for model in (unet, vit):
            assert model(torch.zeros(2, 1, *size), t).shape == (2, 1, *size)
    for model in (unet, vit):
        with pytest.raises(ValueError, match="divisible by .*4, got"):
            model(torch.zeros(2, 1, 30, 28), t)
    assert Transformer(5, 32, 1, 2)(torch.zeros(2, 9, 5), t).shape == (2, 9, 5)


def test_drop_condition_rate_and_labels():
    torch.manual_seed(0)
    y = torch.arange(10_000) % 10
    dropped = drop_condition(y, 0.1)
    assert 0.08 < (dropped == -1).float().mean() < 0.12 and torch.equal(dropped[dropped >= 0], y[dropped >= 0])
    labels, _, mask = drop_condition((y, torch.zeros(10_000, 2, 1), torch.ones(10_000, 2, dtype=torch.bool)), 0.1)
    assert torch.equal(labels == -1, ~mask.any(1))  # label and context go together
    embed = StepEmbedding(8, 10)
    assert torch.equal(embed(torch.ones(1), torch.tensor([-1])), embed(torch.ones(1), None))


def test_noise_shift_divides_the_signal_to_noise_ratio():
    before = diffusion.alpha_bar_cosine(100)
    after = diffusion.noise_shift(before, 3.0)
    snr = lambda a: a[1:] / (1 - a[1:])
    torch.testing.assert_close(snr(after) * 9, snr(before))
    assert after[0] == 1 and torch.equal(diffusion.noise_shift(before, 1.0), before)


def test_self_conditioning_shows_the_guess_of_the_step_before():
    """In training the first guess, without gradient, in the share of steps asked for; in sampling the guess of the step before, the first time none."""
    process = diffusion.Diffusion(diffusion.alpha_bar_cosine(50), "x0", self_condition=0.5)
    w, seen = torch.nn.Parameter(torch.tensor(0.3)), []

    def model(xt, t, y=None, x0=None):
        seen.append(x0)
        return w * xt

    torch.manual_seed(0)
    for _ in range(200):
        process.loss(model, torch.randn(4, 3, 2))
    guesses = [g for g in seen if g is not None]
    assert 70 < len(guesses) < 130 and len(seen) == 200 + len(guesses)
    assert not any(g.requires_grad for g in guesses)
    seen.clear()
    steps = list(process.trajectory(model, (4, 3, 2), sampler="ddim", steps=5))
    assert seen[0] is None and all(torch.equal(a, b[2]) for a, b in zip(seen[1:], steps))


def test_transformer_reads_its_guess_and_none_is_zero():
    torch.manual_seed(0)
    net = diffusion.Transformer(6, 32, 1, self_condition=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    xt, t, x0 = torch.randn(2, 4, 6), torch.tensor([3, 9]), torch.randn(2, 4, 6)
    assert torch.equal(net(xt, t), net(xt, t, None, torch.zeros_like(xt)))
    assert (net(xt, t) - net(xt, t, None, x0)).abs().max() > 1e-3
    images = diffusion.Transformer(1, 32, 1, patch=2, self_condition=True)
    assert images(torch.randn(2, 1, 4, 4), t, None, torch.randn(2, 1, 4, 4)).shape == (2, 1, 4, 4)


def test_guess_of_x0_takes_a_step_for_each_sample():
    for predict in ("eps", "x0", "v"):
        process = diffusion.Diffusion(diffusion.alpha_bar_cosine(50), predict)
        out, xt = torch.randn(3, 4), torch.randn(3, 4)
        together = process.predict_x0(out, xt, torch.tensor([1, 20, 45]))
        for i, step in enumerate((1, 20, 45)):
            torch.testing.assert_close(together[i], process.predict_x0(out[i], xt[i], step), rtol=1e-4, atol=1e-5)


# -- the masked process and chains of thoughts --------------------------------------------------------------------------


def one_hot(*shape, V=5, seed=0):
    return torch.nn.functional.one_hot(torch.randint(V, shape, generator=rng(seed)), V).float()


def test_masks_fall_at_the_rate_of_the_step():
    process, x0 = diffusion.Masked(100), one_hot(4000, 10)
    for t in (1, 30, 100):
        xt = process.q_sample(x0, torch.full((4000,), t))
        assert abs((~xt.any(-1)).float().mean() - t / 100) < 0.01
        assert torch.equal(xt[xt.any(-1)], x0[xt.any(-1)])


def test_elbo_of_a_denoiser_that_knows_nothing_is_log_V_a_token():
    """MDLM eq. 10: with uniform logits every masked token costs log V, and E[masked T/t] = 1."""
    torch.manual_seed(0)
    x0, nothing = one_hot(20_000, 8), lambda xt, t, y: torch.zeros_like(xt)
    assert abs(diffusion.Masked(1000, "elbo").loss(nothing, x0) / math.log(5) - 1) < 0.03
    assert abs(diffusion.Masked(1000, "plain").loss(nothing, x0) / math.log(5) - 0.5) < 0.01


class Knows(torch.nn.Module):
    """A denoiser that knows x0, surest at the position `first`, and counts how often it is asked."""

    def __init__(self, x0, first=0):
        super().__init__()
        self.x0, self.first, self.p, self.seen = x0, first, torch.nn.Parameter(torch.zeros(())), []

    def forward(self, xt, t, y, *guess):
        self.seen.append(xt)
        sure = torch.full(self.x0.shape[1:2], 3.0)
        sure[self.first] = 9.0
        return self.x0 * sure[:, None]


@pytest.mark.parametrize("sampler", ["confident", "random"])
@pytest.mark.parametrize("steps", [1, 3, 6, 64])
def test_masked_sampling_ends_in_what_the_denoiser_knows(sampler, steps):
    model = Knows(one_hot(7, 6))
    states = [xt for _, xt, _ in diffusion.Masked(64).trajectory(model, (7, 6, 5), sampler=sampler, steps=steps, generator=rng())]
    assert torch.equal(states[-1], model.x0)
    assert len(model.seen) == min(steps, 6)  # more would make no more tokens known
    known = [xt.any(-1) for xt in model.seen] + [states[-1].any(-1)]
    assert not known[0].any() and all((a <= b).all() for a, b in zip(known, known[1:]))  # what is known stays


def test_the_surest_token_comes_first_and_temperature_draws():
    model = Knows(one_hot(3, 6), first=4)
    _, xt, _ = next(diffusion.Masked(60).trajectory(model, (3, 6, 5), steps=6))
    assert torch.equal(xt.any(-1), torch.arange(6).expand(3, 6) == 4)
    uniform = Knows(torch.zeros(2000, 6, 5))
    draws = diffusion.Masked(60).sample(uniform, (2000, 6, 5), steps=3, temperature=1.0, generator=rng())
    assert (draws.mean((0, 1)) - 0.2).abs().max() < 0.02 and torch.equal(draws.sum(-1), torch.ones(2000, 6))


def test_sampling_can_start_from_a_noised_x0():
    x0 = one_hot(50, 6)
    model = Knows(one_hot(50, 6, seed=1))
    first = next(diffusion.Masked(60).trajectory(model, x0.shape, steps=6, start=(x0, 30), generator=rng()))[1]
    kept = model.seen[0].any(-1)
    assert torch.equal(kept.sum(1), torch.full((50,), 3)) and torch.equal(first[kept], x0[kept])
    one = list(diffusion.Masked(60).trajectory(Knows(x0[:, :1]), (50, 1, 5), steps=4, start=(x0[:, :1], 20)))
    assert len(one) == 1 and torch.equal(one[0][1], x0[:, :1])  # of a single token, one is masked
    process, gauss = Diffusion(alpha_bar_cosine(100)), torch.randn(4000, 2, generator=rng())
    t, xt = {}, {}

    def spy(x, t_, y):
        t.setdefault(0, t_), xt.setdefault(0, x)
        return torch.zeros_like(x)

    process.sample(spy, gauss.shape, start=(gauss, 40), sampler="ddim", steps=10, generator=rng(3))
    assert t[0].unique().item() == 40
    assert abs(torch.corrcoef(torch.stack([xt[0].flatten(), gauss.flatten()]))[0, 1] - process.a[40]) < 0.02


def test_token_prediction_is_a_softmax_and_its_loss_a_cross_entropy():
    torch.manual_seed(0)
    process, x0 = Diffusion(alpha_bar_cosine(100), "token", "plain"), one_hot(64, 6)
    assert process.loss(lambda xt, t, y: 100 * x0, x0) < 1e-6
    assert abs(process.loss(lambda xt, t, y: 0 * xt, x0) - math.log(5)) < 1e-5
    torch.testing.assert_close(process.sample(lambda xt, t, y: 100 * x0, x0.shape, sampler="ddim", steps=5), x0)


def two_thoughts(seed=0, count=None, depth=2, places=9):
    """A Transformer and a chain as reason.py lays it out: two thoughts of 3 and 2 positions, a question of 4, the first thought clean."""
    torch.manual_seed(seed)
    block, of = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, -1, -1, -1, -1, 0, 0, 0])
    noised = torch.arange(12) < 5
    see = torch.where(noised[None], noised[:, None] & (of[:, None] == of), torch.where(noised[:, None], of < of[:, None], of <= of[:, None]))[None]
    position = torch.cat([torch.arange(4, 9), torch.arange(7)])
    model = Transformer(5, 32, depth, d_context=5, places=places)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # adaLN-zero would let nothing through
    question, x0 = one_hot(2, 4), one_hot(2, 5, seed=1)
    chain = lambda q, r: diffusion.Chain(block, torch.cat([q, r[:, :3]], 1), position, see, n=2, count=count)
    return model.eval(), question, x0, chain


def test_a_thought_sees_the_question_and_the_clean_thoughts_before_and_nothing_else():
    model, q, x0, chain = two_thoughts()
    t, xt = torch.tensor([[3, 50], [7, 20]]), torch.randn(2, 5, 5, generator=rng())
    out = model(xt, t, chain(q, x0))
    other = xt.clone()
    other[:, 3:] += 1
    assert torch.equal(model(other, t, chain(q, x0))[:, :3], out[:, :3])  # not the noised thought after
    other = xt.clone()
    other[:, :3] += 1
    torch.testing.assert_close(model(other, t, chain(q, x0))[:, 3:], out[:, 3:])  # not the noise of the one before
    assert torch.equal(model(xt, t, chain(q, 1 - x0))[:, :3], out[:, :3])  # not its own clean version
    assert not torch.allclose(model(xt, t, chain(q, 1 - x0))[:, 3:], out[:, 3:], atol=1e-3)  # but the clean one before
    assert (model(xt, t, chain(1 - q, x0)) - out).abs().amax((0, 2)).min() > 1e-3  # and all see the question
    moved = model(xt, torch.tensor([[3, 60], [7, 20]]), chain(q, x0))
    assert torch.equal(moved[:, :3], out[:, :3]) and not torch.allclose(moved[0, 3:], out[0, 3:], atol=1e-4)  # each thought has its own t


@pytest.mark.parametrize("timeless, places", [(False, 9), (True, 9), (False, 0)])
def test_cached_thoughts_are_the_same_as_the_whole_sequence(timeless, places):
    model, q, x0, chain = two_thoughts(places=places)
    t, xt = torch.tensor([[3, 50], [7, 20]]), torch.randn(2, 5, 5, generator=rng())
    whole = model(xt, None if timeless else t, chain(q, x0))

    def thought(k, context, position, past, p):
        see = torch.ones(1, k + context.shape[1], p + k + context.shape[1], dtype=torch.bool)
        see[:, k:, p : p + k] = False  # a context sees no noise
        return diffusion.Chain(torch.zeros(k, dtype=torch.long), context, torch.tensor(position), see, past=past, keep=True)

    first = thought(3, q, [4, 5, 6, 0, 1, 2, 3], [], 0)
    for _ in range(2):  # the question is read at the first evaluation and remembered at the second
        torch.testing.assert_close(model(xt[:, :3], None if timeless else t[:, :1], first), whole[:, :3], rtol=1e-5, atol=1e-5)
        assert first.context.shape[1] == 0 and first.past[0][0].shape[2] == 4
    second = thought(2, x0[:, :3], [7, 8, 4, 5, 6], first.past, 4)
    for _ in range(2):
        torch.testing.assert_close(model(xt[:, 3:], None if timeless else t[:, 1:], second), whole[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("process", [diffusion.Masked(100), Diffusion(alpha_bar_cosine(100), "token", "plain"), Diffusion(alpha_bar_cosine(100), "v")])
def test_positions_that_do_not_count_never_do(process):
    """Their errors change nothing; those of the others do."""
    count = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    _, q, x0, chain = two_thoughts(count=count)

    def loss(wrong):
        torch.manual_seed(1)
        return process.loss(lambda xt, t, y: wrong, x0, chain(q, x0))

    base = torch.randn(2, 5, 5, generator=rng())
    padded, real = base.clone(), base.clone()
    padded[0, 3:] += 7 * torch.randn(2, 5, generator=rng(1))
    real[1, 3:] += 7 * torch.randn(2, 5, generator=rng(1))
    assert torch.equal(loss(padded), loss(base)) and abs(loss(real) - loss(base)) > 1e-3


def test_every_thought_draws_its_own_step():
    _, q, x0, chain = two_thoughts()
    t, spread = diffusion.draw_t(100, x0.repeat(500, 1, 1), chain(q, x0))
    assert t.shape == (1000, 2) and torch.equal(spread, t[:, [0, 0, 0, 1, 1]]) and (t[:, 0] != t[:, 1]).float().mean() > 0.9


def test_shift_draws_more_masks():
    """Above shift = 1 the odds t/(T - t) are `shift` times as high: of uniform steps a quarter stays in the lower half for 3."""
    _, _, x0, _ = two_thoughts()
    t, _ = diffusion.draw_t(100, x0.repeat(5000, 1, 1), None, shift=3.0)
    assert t.min() >= 1 and t.max() == 100 and (t <= 50).float().mean().item() == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match="bound for shift 1"):
        diffusion.Masked(100, "elbo", shift=3.0)


def test_masked_transformer_overfits_one_batch_of_chains():
    torch.manual_seed(0)
    _, q, x0, chain = two_thoughts()
    model, process = Transformer(5, 32, 2, d_context=5, places=9), diffusion.Masked(50)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        opt.zero_grad()
        process.loss(model, x0, chain(q, x0)).backward()
        opt.step()
    assert process.loss(model, x0, chain(q, x0)) < 0.05
    assert all(p.grad is not None for p in model.parameters())

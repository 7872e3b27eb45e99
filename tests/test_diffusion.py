"""diffusion.py against closed forms and against diffusers; learning and wiring of the denoisers."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import (
    SAMPLERS,
    SCHEDULES,
    Diffusion,
    ImageAttention,
    ImageTransformer,
    LatentTransformer,
    UNet,
    attention,
    cosine,
    drop_condition,
    karras,
    linear,
    modulate,
    rectified_flow,
    sample,
    trajectory,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# -- schedules and the forward process -------------------------------------------------------------------


@pytest.mark.parametrize("schedule, theirs", [(linear, "linear"), (cosine, "squaredcos_cap_v2")])
def test_schedules_equal_diffusers(schedule, theirs):
    a, s = schedule(1000)
    reference = diffusers.DDPMScheduler(1000, beta_schedule=theirs).alphas_cumprod
    torch.testing.assert_close(a[1:].square().float(), reference, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a**2 + s**2, torch.ones(1001, dtype=torch.float64))


def test_the_flow_schedule_equals_diffusers():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=1.0).sigmas  # from noise to data
    torch.testing.assert_close(rectified_flow(1000)[1][1:].flip(0).float(), reference[:1000])


@pytest.mark.parametrize("T", [10, 50, 300, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_from_data_to_noise_for_any_T(name, T):
    a, s = SCHEDULES[name](T)
    assert len(a) == len(s) == T + 1
    assert a.dtype == s.dtype == torch.float64
    assert (a[0], s[0]) == (1, 0)
    assert (a / s.clamp(min=1e-9)).diff().lt(0).all()
    assert a[-1] < 0.04


def test_what_has_no_samples_is_refused():
    with pytest.raises(ValueError, match="0.2, 0.8"):  # a schedule that keeps the signal
        Diffusion(torch.linspace(1, 0.2, 11), torch.linspace(0, 0.8, 11))
    with pytest.raises(ValueError, match="eps"):  # where eps says nothing of x0
        Diffusion(*rectified_flow(10), "eps")
    with pytest.raises(ValueError, match="1001"):  # more steps than the schedule has
        sample(Diffusion(*cosine(1000)), denoiser, (1, 2), steps=1001)
    with pytest.raises(ValueError, match="1000"):  # sigma is infinite at one of them
        sample(Diffusion(*rectified_flow(1000)), denoiser, (1, 2), steps=1000)
    with pytest.raises(TypeError, match="uint8"):
        Diffusion(*cosine(10)).loss(denoiser, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_shift_divides_the_signal_to_noise_ratio():
    (a, s), (a3, s3) = cosine(100), cosine(100, shift=3.0)
    torch.testing.assert_close((a3 / s3)[1:] * 3, (a / s)[1:])


@pytest.mark.parametrize("name", SCHEDULES)
def test_xt_has_the_moments_of_its_schedule(name):
    """What the model is shown in training: mean a[t] x0 and variance s[t]^2."""
    a, s = SCHEDULES[name](100)
    x0, seen = torch.full((200_000, 1), 2.0), []
    for t in (1, 50, 99):
        torch.manual_seed(t)
        steps = torch.full((len(x0),), t)
        Diffusion(a, s).loss(lambda xt, t, y: seen.append(xt) or xt, x0, t=steps)
        assert abs(seen[-1].mean() - 2 * a[t]) < 0.01
        assert abs(seen[-1].std() / s[t] - 1) < 0.02


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("predict", ["eps", "x0", "v", "flow"])
def test_min_snr_weights_one_error_of_x0_alike_in_every_parameterisation(name, predict):
    """Where the guess of x0 is off by 0.1, the loss is min(SNR, 5) 0.01, whatever the output means. Eq. 5."""
    a, s = SCHEDULES[name](1000)
    if predict == "eps" and a[-1] == 0:
        pytest.skip("refused")
    x0, t = torch.randn(999, 3, generator=rng()), torch.arange(1, 1000)

    def model(xt, t, y):
        at, st = (table[t][:, None] for table in (a, s))
        guess = x0.double() + 0.1
        eps = (xt.double() - at * guess) / st
        return {"eps": eps, "x0": guess, "v": at * eps - st * guess, "flow": eps - guess}[predict]

    loss = Diffusion(a, s, predict, "min-snr").loss(model, x0, t=t)
    wanted = 0.01 * (a / s).square()[1:1000].clamp(max=5)
    np.testing.assert_allclose(loss, wanted, rtol=0.05, atol=1e-4)


def test_a_step_of_its_own_for_each_position_gives_a_loss_for_each():
    process, x0, t = Diffusion(*cosine(50), "x0", "plain"), torch.randn(4, 3, 2), torch.randint(1, 51, (4, 3))
    loss = process.loss(lambda xt, t, y: x0 + t[..., None], x0, t=t)
    torch.testing.assert_close(loss, t.square().float())


# -- samplers against diffusers --------------------------------------------------------------------------


def denoiser(xt, t, y=None):
    """A fixed smooth function in place of a network; t counts from 1."""
    return torch.tanh(xt.roll(1, -1) * 0.7 + torch.sin(t.float() / 50)[:, None]) * 0.8


KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def reference(scheduler, steps):
    generator = rng(7)
    x = torch.randn(16, 32, generator=generator)
    how = dict(timesteps=steps) if isinstance(steps, list) else dict(num_inference_steps=steps)
    scheduler.set_timesteps(**how)
    for t in scheduler.timesteps:
        out = denoiser(x, torch.full((16,), int(t) + 1))
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


def assert_alike(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(1, got.abs().max().item()))


@pytest.mark.parametrize("predict", KINDS)
def test_ddpm_equals_diffusers(predict):
    kind = dict(prediction_type=KINDS[predict], clip_sample=False)
    scheduler = diffusers.DDPMScheduler(1000, timestep_spacing="leading", **kind)
    process = Diffusion(*linear(1000), predict)
    got = sample(process, denoiser, (16, 32), sampler="ddpm", steps=1000, generator=rng(7))
    assert_alike(got, reference(scheduler, 1000))


@pytest.mark.parametrize("predict", KINDS)
def test_ddim_equals_diffusers(predict):
    kind = dict(prediction_type=KINDS[predict], clip_sample=False)
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing="trailing", **kind)
    process = Diffusion(*linear(1000), predict)
    got = sample(process, denoiser, (16, 32), sampler="ddim", steps=20, generator=rng(7))
    assert_alike(got, reference(scheduler, 20))


@pytest.mark.parametrize("predict", KINDS)
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_dpm_solver_equals_diffusers(predict, steps):
    settings = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint")
    kind = dict(prediction_type=KINDS[predict], final_sigmas_type="zero")
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, **kind, **settings)
    process = Diffusion(*linear(1000), predict)
    got = sample(process, denoiser, (16, 32), sampler="dpm++", steps=steps, generator=rng(7))
    assert_alike(got, reference(scheduler, [t - 1 for t in karras(process, steps)[:-1]]))


def test_karras_spacing_follows_its_rule():
    process = Diffusion(*cosine(1000))
    sigma = [s / a for a, s in zip(process.a, process.s, strict=True)]
    wanted = np.linspace(80 ** (1 / 7), sigma[1] ** (1 / 7), 10) ** 7
    for t, want in zip(karras(process, 10), wanted, strict=False):
        spacing_of_the_table = abs(math.log(sigma[t + 1] / sigma[max(t - 1, 1)]))
        assert abs(math.log(sigma[t] / want)) <= spacing_of_the_table


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 9, 250, 999])
def test_steps_fall_from_noise_to_zero_with_as_many_evaluations_as_asked_for(name, sampler, steps):
    process, calls = Diffusion(*SCHEDULES[name](1000)), []
    sample(process, lambda xt, t, y: calls.append(t) or xt * 0, (1, 2), sampler=sampler, steps=steps)
    assert len(calls) == (2 * ((steps + 1) // 2) - 1 if sampler == "heun" else steps)
    ts = SAMPLERS[sampler][1](process, steps)
    assert 1000 >= ts[0] and ts[-1] == 0 and all(t > u for t, u in pairwise(ts))


# -- samplers against distributions in closed form -------------------------------------------------------


def gaussian_denoiser(process, mu, sd):
    """The optimal x0 of data N(mu, sd^2): the posterior mean given xt."""

    def model(xt, t, y=None):
        a, s = process.a[int(t[0])], process.s[int(t[0])]
        return mu + a * sd**2 / (a**2 * sd**2 + s**2) * (xt - a * mu)

    return model


@pytest.mark.parametrize("name", ["cosine", "flow"])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_deterministic_samplers_converge_at_their_order(name, sampler, order):
    """For Gaussian data the exact map of xt at step t is mu + sd (xt - a mu) / sqrt(a^2 sd^2 + s^2)."""
    process, mu, sd = Diffusion(*SCHEDULES[name](20_000), "x0"), 0.3, 0.5
    xt, errors = torch.randn(64, 1, generator=rng(3), dtype=torch.float64), []
    step, spacing = SAMPLERS[sampler]
    model = gaussian_denoiser(process, mu, sd)
    for steps in (21, 41, 81):
        ts = spacing(process, steps)
        a, s = process.a[ts[0]], process.s[ts[0]]
        exact = mu + sd * (xt - a * mu) / math.sqrt(a**2 * sd**2 + s**2)
        for _, x0, _ in step(process, lambda x, t: model(x, torch.tensor([t])), xt, ts, None):
            got = x0
        errors.append((got - exact).abs().mean().item())
    rates = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert all(order - 0.25 < rate < order + 0.6 for rate in rates), (errors, rates)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "sampler, steps", [("ddim", 299), ("ddim", 300), ("ddpm", 300), ("dpm++", 50), ("heun", 99)]
)
def test_samples_have_the_standard_deviation_of_the_data(name, sampler, steps):
    """The slip of one index in DDIM that a peer has gives 0.49 here at 299 of 300 steps."""
    process = Diffusion(*SCHEDULES[name](300), "x0")
    model = gaussian_denoiser(process, 0.0, 0.5)
    x = sample(process, model, (20_000, 1), sampler=sampler, steps=steps, generator=rng(1))
    own_error = 0.06 if (name, sampler) == ("flow", "ddpm") else 0.04  # of few steps with noise
    assert abs(x.std() / 0.5 - 1) < (own_error if sampler == "ddpm" else 0.025)


@pytest.mark.parametrize("name", ["cosine", "flow"])
@pytest.mark.parametrize("sampler, steps", [("ddpm", 300), ("ddim", 100), ("dpm++", 30), ("heun", 49)])
def test_samplers_reach_a_mixture(name, sampler, steps):
    """Data 0.3 N(-1, 0.1^2) + 0.7 N(0.8, 0.2^2), whose posterior mean is known, by Wasserstein distance."""
    process = Diffusion(*SCHEDULES[name](1000), "x0")
    w, mu, sd = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.1, 0.2])

    def model(xt, t, y):
        a, s = process.a[int(t[0])], process.s[int(t[0])]
        var = a**2 * sd**2 + s**2
        p = (w.log() - var.log() / 2 - (xt - a * mu) ** 2 / (2 * var)).softmax(-1)  # (B, 2)
        return (p * (mu + a * sd**2 / var * (xt - a * mu))).sum(-1, keepdim=True)

    x = sample(process, model, (8000, 1), sampler=sampler, steps=steps, generator=rng(0))[:, 0]
    k = torch.multinomial(w, 8000, replacement=True, generator=rng(1))
    data = mu[k] + sd[k] * torch.randn(8000, generator=rng(2))
    assert scipy.stats.wasserstein_distance(x, data) < 0.035


def test_a_student_learns_the_linear_map_of_the_probability_flow_of_a_gaussian():
    """Data N(0, 0.5^2): the flow scales noise at step t by the ratio of the standard deviations."""
    process = Diffusion(*cosine(1000), "x0")
    deviation = [math.hypot(a * 0.5, s) for a, s in zip(process.a, process.s, strict=True)]

    def teacher(xt, t, y):
        a = process.a[int(t[0])]
        return a * 0.25 / deviation[int(t[0])] ** 2 * xt

    (t, noise, _), *_, (_, x0, _) = trajectory(process, teacher, (512, 1), steps=100, generator=rng(0))
    student = torch.nn.Linear(1, 1)
    opt = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(200):
        opt.zero_grad()
        process.regression(lambda xt, t, y: student(xt), noise, t, x0).mean().backward()
        opt.step()
    assert student.weight.item() == pytest.approx(0.5 / deviation[t], rel=0.02)
    assert abs(student.bias.item()) < 0.01


def test_ddpm_steps_have_the_posterior_of_eq_7():
    """With a denoiser that knows x0, a step from t to t-1 is a draw of q(x_{t-1} | x_t, x0)."""
    a, s = cosine(12)
    alpha_bar, x0, xt = a**2, torch.full((100_000, 1), 0.7), torch.randn(100_000, 1, generator=rng(5))
    settings = dict(sampler="ddpm", steps=12, generator=rng(5))
    (_, noise, _), *states = trajectory(Diffusion(a, s, "x0"), lambda x, t, y: x0, (100_000, 1), **settings)
    torch.testing.assert_close(noise, xt)
    for u, xu, _ in states:
        if u:
            beta = 1 - alpha_bar[u + 1] / alpha_bar[u]
            mean = alpha_bar[u].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - alpha_bar[u]) * xt
            variance = (1 - alpha_bar[u]) / (1 - alpha_bar[u + 1]) * beta
            z = (xu - mean / (1 - alpha_bar[u + 1])) / variance.sqrt()
            assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
        xt = xu
    assert torch.equal(xt, x0)  # and the last step adds no noise


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_and_clipping_hold_in_every_sampler(sampler):
    process, y = Diffusion(*cosine(100), "x0"), torch.zeros(4, dtype=torch.long)

    def model(xt, t, y):
        return torch.full_like(xt, 0.1 if y is None else 0.3)

    for guidance, clip, wanted in [(0.0, 9.0, 0.3), (2.0, 9.0, 3 * 0.3 - 2 * 0.1), (9.0, 1.0, 1.0)]:
        settings = dict(guidance=guidance, clip=clip, sampler=sampler, steps=5, generator=rng())
        assert sample(process, model, (4, 2), y, **settings).unique().tolist() == pytest.approx([wanted])


def test_self_conditioning_shows_the_first_guess_in_training_and_the_last_one_in_sampling():
    process = Diffusion(*cosine(50), "x0", self_condition=0.5)
    w, seen = torch.nn.Parameter(torch.tensor(0.3)), []

    def model(xt, t, y=None, x0=None):
        seen.append(x0)
        return w * xt

    torch.manual_seed(0)
    for _ in range(200):
        process.loss(model, torch.randn(4, 3, 2))
    guesses = [guess for guess in seen if guess is not None]
    assert 70 < len(guesses) < 130
    assert len(seen) == 200 + len(guesses)
    assert not any(guess.requires_grad for guess in guesses)
    seen.clear()
    _, *steps = trajectory(process, model, (4, 3, 2), sampler="ddim", steps=5)
    assert seen[0] is None
    assert all(torch.equal(shown, step[2]) for shown, step in zip(seen[1:], steps, strict=False))


# -- denoisers -------------------------------------------------------------------------------------------


def make(name):
    """A small denoiser, a batch x0 for it, and a condition."""
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    if name == "unet":
        return UNet(3, (8, 16), (1, 2), classes=3), torch.randn(4, 3, 4, 8), y
    if name == "images":
        return ImageTransformer(3, 32, depth=2, p=2, classes=3), torch.randn(4, 3, 4, 8), y
    if name == "latents":
        return LatentTransformer(5, 32, depth=2, classes=3), torch.randn(4, 7, 5), y
    mask = torch.arange(5) < torch.arange(2, 6)[:, None]
    context = torch.randn(4, 5, 6, generator=rng(9)), mask
    return LatentTransformer(5, 32, depth=2, d_context=6), torch.randn(4, 7, 5), context


def rows(y, index):
    return tuple(part[index] for part in y) if isinstance(y, tuple) else y[index]


DENOISERS = ["unet", "images", "latents", "latents in a context"]


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_overfits_one_batch(name):
    """It learns to tell four samples apart by xt and their condition, and DDIM finds them again."""
    model, x0, y = make(name)
    process, losses = Diffusion(*cosine(100)), []
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    batch = torch.arange(4).repeat(8)
    for _ in range(100):
        loss = process.loss(model, x0[batch], rows(y, batch)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])
    found = sample(process, model, x0.shape, y, sampler="ddim", steps=10, generator=rng(4))
    nearest = torch.cdist(found.flatten(1), x0.flatten(1)).min(1).values / math.sqrt(x0[0].numel())
    assert nearest.median() < 0.7  # per-element distance; unrelated standard normals are at 1.4


def stir(model):
    """Replace the zeros that a denoiser starts with, so that nothing hides behind them."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_one_embedding_for_all_modulates_as_one_for_each():
    torch.manual_seed(0)
    h, scale, shift = torch.randn(3, 5, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    each = modulate(h, scale.expand(3, 1, 8), shift.expand(3, 1, 8))
    torch.testing.assert_close(modulate(h, scale, shift), each)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_starts_at_zero_and_every_parameter_gets_a_gradient(name):
    model, x0, y = make(name)
    assert not model(x0, torch.full((4,), 10), y).any()
    stir(model)
    (model(x0, torch.tensor([1, 10, 50, 100]), y) * torch.randn(x0.shape, generator=rng())).sum().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), parameter_name


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_sees_step_and_condition_and_treats_samples_apart(name):
    model, x0, y = make(name)
    model, t = stir(model).eval(), torch.full((4,), 10)
    out = model(x0, t, y)
    torch.testing.assert_close(model(x0[:1], t[:1], rows(y, slice(1))), out[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x0, t + 50, y), out, atol=1e-3)
    nothing = drop_condition(y, 1.0)
    assert not torch.allclose(model(x0, t, nothing), out, atol=1e-3)
    torch.testing.assert_close(model(x0, t, nothing), model(x0, t, None), rtol=1e-4, atol=1e-5)


def test_masked_context_counts_for_nothing_and_the_rest_counts():
    model, x0, (c, mask) = make("latents in a context")
    model, t = stir(model).eval(), torch.full((4,), 10)
    out = model(x0, t, (c, mask))
    masked_changed = torch.where(mask[..., None], c, 1e3)
    torch.testing.assert_close(model(x0, t, (masked_changed, mask)), out)
    visible_changed = torch.where(mask[..., None], c.flip(0), c)
    assert not torch.allclose(model(x0, t, (visible_changed, mask)), out, atol=1e-3)


def test_the_latents_denoiser_reads_its_guess_and_none_is_zero():
    torch.manual_seed(0)
    net = LatentTransformer(6, 32, 1, self_condition=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    xt, t, x0 = torch.randn(2, 4, 6), torch.tensor([3, 9]), torch.randn(2, 4, 6)
    assert torch.equal(net(xt, t), net(xt, t, None, torch.zeros_like(xt)))
    assert (net(xt, t) - net(xt, t, None, x0)).abs().max() > 1e-3


@pytest.mark.parametrize("model", [UNet(1, (8, 16, 16), (1, 1, 1)), ImageTransformer(1, 32, 1, 4)])
def test_image_denoisers_take_any_size_that_they_divide(model):
    for size in [(8, 8), (16, 12), (28, 28)]:
        assert model(torch.zeros(2, 1, *size), torch.ones(2, dtype=torch.long)).shape == (2, 1, *size)
    assert torch.equal(model.embed(torch.ones(1), torch.tensor([-1])), model.embed(torch.ones(1), None))


def test_conditions_are_dropped_at_their_rate():
    torch.manual_seed(0)
    y = torch.arange(10_000) % 10
    dropped = drop_condition(y, 0.1)
    assert 0.08 < (dropped == -1).float().mean() < 0.12
    assert torch.equal(dropped[dropped >= 0], y[dropped >= 0])
    context = torch.randn(10_000, 2, 1)
    kept, mask = drop_condition((context, torch.ones(10_000, 2, dtype=torch.bool)), 0.1)
    assert torch.equal(kept, context)
    assert torch.equal(mask.any(1), mask.all(1))  # all of a sample's context goes, or none
    assert 0.08 < (~mask.any(1)).float().mean() < 0.12


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_attention_over_a_large_image_does_without_the_matrix_of_all_pairs():
    q, k, v = torch.randn(3, 1, 2, 8, 1024, generator=rng()).transpose(-1, -2)  # as a convolution leaves them
    short = torch.cat([attention(part, k, v, None) for part in q.split(256, dim=2)], dim=2)
    assert torch.allclose(attention(q, k, v, None), short, atol=1e-5)
    with Largest() as largest:
        ImageAttention(8)(torch.randn(1, 8, 32, 32, generator=rng()))
    assert largest.numel < 1024**2

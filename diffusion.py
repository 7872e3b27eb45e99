"""Noise is put on, a network learns to take it off, and what it learned makes new data out of noise.

Gaussian noise on vectors: xt = a[t] x0 + s[t] eps for t = 0..T, where t = 0 is clean and t = T is noise.
Masks on tokens: at t in [0, 1] each token is MASK with probability t. A denoiser is any model(xt, t, y).

Sources: DDPM 2006.11239, iDDPM 2102.09672, DDIM 2010.02502, progressive distillation (v) 2202.00512,
classifier-free guidance (CFG) 2207.12598, DPM-Solver++ 2211.01095, EDM 2206.00364, rectified flow 2209.03003,
min-SNR 2303.09556, simple diffusion 2301.11093, analog bits (self-conditioning) 2208.04202,
DiT (adaLN-zero) 2212.09748, masked diffusion (MDLM) 2406.07524, MaskGIT 2202.04200.
Axes: B batch, C channels, H W image, L positions, k vectors or tokens, d width of a vector, D model width,
V vocabulary.
"""

import math
import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- schedules: two tables a and s, (T + 1,) float64 each ------------------------------------------------


def variance_preserving(alpha_bar: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """a and s of alpha_bar (T + 1,), its signal-to-noise ratio divided by shift^2. Simple diffusion eq. 4."""
    alpha_bar = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def cumulated(beta: Tensor) -> Tensor:
    """alpha_bar (T + 1,) of beta (T,), each at most 0.999. DDPM section 2."""
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta.clamp(max=0.999)).cumprod(0)])


def linear(T: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Linear betas, scaled by 1000 / T so that any T ends in noise. DDPM section 4."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return variance_preserving(cumulated(beta), shift)


def cosine(T: int, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Squared-cosine alpha_bar. iDDPM eq. 17."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return variance_preserving(cumulated(1 - f[1:] / f[:-1]), shift)


def rectified_flow(T: int) -> tuple[Tensor, Tensor]:
    """A straight line from data to noise. Rectified flow eq. 1."""
    s = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    return 1 - s, s


SCHEDULES = {"cosine": cosine, "linear": linear, "flow": rectified_flow}


# -- the Gaussian process --------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """The process q(xt | x0) = N(a[t] x0, s[t]^2 I) and its training loss.

    a, s: (T + 1,) float64, from (1, 0) to noise. predict: what the denoiser's output means: "eps", "x0",
    "v" (a eps - s x0) or "flow" (eps - x0). weight: "plain" mean squared error of that output, or "min-snr"
    with gamma 5. self_condition: share of training steps in which the denoiser, then model(xt, t, y, x0),
    also sees its first guess of x0; above 0, each step of sampling shows it the guess of the step before.
    Raises ValueError for a schedule that does not begin with data and end in noise.
    """

    def __init__(self, a: Tensor, s: Tensor, predict="v", weight="min-snr", self_condition: float = 0.0):
        super().__init__()
        if not (a[0] == 1 and s[0] == 0 and 0 <= a[-1] <= 0.1 * s[-1]):
            ends = f"({a[0]:.3g}, {s[0]:.3g}) to ({a[-1]:.3g}, {s[-1]:.3g})"
            raise ValueError(f"(a, s) must go from (1, 0) to noise, a at most a tenth of s, got {ends}")
        if predict == "eps" and a[-1] == 0:
            raise ValueError("eps says nothing of x0 where a is 0: predict v, x0 or flow with this schedule")
        self.T, self.predict, self.self_condition = len(a) - 1, predict, self_condition
        self.a, self.s = a.tolist(), s.tolist()  # float64 for the samplers
        weights = torch.ones_like(a)
        if (
            weight == "min-snr"
        ):  # it weights the error of x0: that of the output has the square of d x0 / d output
            slope = {"eps": s / a, "x0": 1, "v": s / (a**2 + s**2), "flow": s / (a + s)}[predict]
            weights = (a / s.clamp(min=1e-10)).square().clamp(max=5) * slope**2  # min-SNR eq. 5
        for name, table in dict(a=a, s=s, weight=weights).items():
            self.register_buffer(f"{name}_table", table.float(), persistent=False)

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at steps t (B,) or (B, k), shaped to multiply x (B, ...)."""
        shape = t.shape + (1,) * (x.dim() - t.dim())
        return self.a_table[t].view(shape), self.s_table[t].view(shape)

    def loss(self, model, x0: Tensor, y=None, t: Tensor | None = None) -> Tensor:
        """Losses (B,) of x0 (B, ...) at random steps, or (B, k) at steps t (B, k) of your own. Alg. 1."""
        check_scale(x0)
        if t is None:
            t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device)
        (a, s), eps, guess = self.at(t, x0), torch.randn_like(x0), ()
        xt = a * x0 + s * eps  # DDPM eq. 4
        if self.self_condition and torch.rand(()) < self.self_condition:
            guess = (self.guess(model, xt, t, y),)  # Analog bits section 3.2
        out = model(xt, t, y, *guess).float()
        target = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}[self.predict]
        return self.weight_table[t] * (out - target).square().flatten(t.dim()).mean(-1)  # DDPM eq. 14

    @torch.no_grad()
    def guess(self, model, xt: Tensor, t: Tensor, y=None) -> Tensor:
        """The denoiser's guess of x0 (B, ...) from xt at steps t (B,), in one evaluation."""
        x0 = self.predict_x0(model(xt, t, y).float(), xt, *self.at(t, xt))
        torch.clear_autocast_cache()  # the bf16 copies of the weights that it made have no gradients
        return x0

    def predict_x0(self, out: Tensor, xt: Tensor, a, s) -> Tensor:
        """The clean x0 that the denoiser's output `out` stands for, where xt = a x0 + s eps."""
        if self.predict == "eps":
            return (xt - s * out) / a  # DDPM eq. 15
        if self.predict == "v":
            return (a * xt - s * out) / (a**2 + s**2)  # progressive distillation app. D
        if self.predict == "flow":
            return (xt - s * out) / (a + s)
        return out


def check_scale(x0: Tensor) -> None:
    """Raise ValueError for bytes and, on a CPU, where checking is cheap, for floats as large as bytes.

    Their size is the root of their mean square: a few latents of real texts lie 50 standard deviations out.
    """
    size = float(x0.float().square().mean().sqrt()) if x0.device.type == "cpu" and len(x0) else 0.0
    if not x0.is_floating_point() or size > 30:
        wanted = "x0 must be floats: images in [-1, 1] (x / 127.5 - 1), other data of about variance 1"
        raise ValueError(f"{wanted}; got {x0.dtype} of size {size:g}")
    if x0.dim() == 4 and size > 0 and x0.min() >= 0:
        warnings.warn("x0 has no negative value: images in [0, 1] must become 2 * x - 1", stacklevel=3)


# -- its samplers: from xt at step ts[0] down to x0 at step 0; they yield (step reached, xt, guess of x0) ---


def ddim(process, x0_of, xt, ts, noise, eta=0.0):
    """DDIM eq. 12 and 16; on a rectified flow this is Euler's method."""
    a, s = process.a, process.s
    for t, u in pairwise(ts):
        x0 = x0_of(xt, t)
        eps = (xt - a[t] * x0) / s[t]
        sigma = eta * s[u] / s[t] * math.sqrt(s[t] ** 2 - (a[t] / a[u] * s[u]) ** 2)
        xt = a[u] * x0 + math.sqrt(s[u] ** 2 - sigma**2) * eps
        if sigma:
            xt = xt + sigma * noise()
        yield u, xt, x0


def ddpm(process, x0_of, xt, ts, noise):
    """Ancestral sampling, DDPM Alg. 2: DDIM with as much noise as the posterior has, eq. 7."""
    return ddim(process, x0_of, xt, ts, noise, eta=1.0)


def dpm_solver(process, x0_of, xt, ts, noise):
    """DPM-Solver++(2M), Algorithm 2, with lambda = log(a / s)."""
    a, s, before = process.a, process.s, None
    for t, u in pairwise(ts):
        x0 = x0_of(xt, t)
        if u == 0:
            yield u, x0, x0
            return
        lam = math.log(a[t] / s[t])
        h = math.log(a[u] / s[u]) - lam
        D = x0 if before is None else x0 + h / (lam - before[1]) / 2 * (x0 - before[0])
        xt, before = s[u] / s[t] * xt - a[u] * math.expm1(-h) * D, (x0, lam)
        yield u, xt, x0


def heun(process, x0_of, xt, ts, noise):
    """EDM Algorithm 2 without churn, in z = xt / a at sigma = s / a: two evaluations a step, the last one."""
    a, s = process.a, process.s
    for t, u in pairwise(ts):
        x0 = x0_of(xt, t)
        if u == 0:
            yield u, x0, x0
            return
        z, sigma, sigma_u = xt / a[t], s[t] / a[t], s[u] / a[u]
        d = (z - x0) / sigma
        euler = z + (sigma_u - sigma) * d
        d_u = (euler - x0_of(a[u] * euler, u)) / sigma_u
        xt = a[u] * (z + (sigma_u - sigma) * (d + d_u) / 2)
        yield u, xt, x0


def even(process, n: int) -> list[int]:
    """n steps [T, ..., 0], evenly spaced."""
    return [round(process.T * i / n) for i in range(n, -1, -1)]


def karras(process, n: int, rho: float = 7) -> list[int]:
    """n steps even in sigma^(1/rho), from a sigma of at most 80 to 0. EDM eq. 5.

    Steps that would fall on one integer move apart to neighbouring ones. A step where a is 0, and sigma
    infinite, is left out: ValueError where n needs it.
    """
    a, s = (torch.tensor(table[1:], dtype=torch.float64) for table in (process.a, process.s))
    log_sigma = (s / a)[a > 0].log()
    last = len(log_sigma)
    if n > last:
        raise ValueError(f"sigma is finite at {last} steps only, got {n}: take fewer, or ddim")
    low, high = log_sigma[0].exp(), log_sigma[-1].exp().clamp(max=80)
    wanted = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64).flip(0).log() * rho
    t = (wanted[:, None] - log_sigma).abs().argmin(1) + 1  # (n,) ascending
    i = torch.arange(n)
    t = (t - i).cummax(0).values.clamp(max=last - n + 1) + i  # each above the one before, none above the last
    return [*t.flip(0).tolist(), 0]


def karras_heun(process, n: int) -> list[int]:
    """Steps for at most n evaluations of Heun's method."""
    return karras(process, (n + 1) // 2)


SAMPLERS = {
    "ddpm": (ddpm, even),
    "ddim": (ddim, even),
    "dpm++": (dpm_solver, karras),
    "heun": (heun, karras_heun),
}


@torch.no_grad()
def trajectory(
    process, model, shape, y=None, *, sampler="dpm++", steps=10, guidance=0.0, clip=math.inf, generator=None
):
    """Yield (t, xt, x0) after every step from noise to data: t the step reached, x0 the denoiser's guess.

    shape: (B, ...) of x0. steps: evaluations of the denoiser, 1..T (two each with guidance). guidance: w of
    CFG eq. 6; 0 is the plain conditional model. clip: largest absolute value of x0. generator: one on the
    CPU gives the same noise on any device. Raises ValueError for steps outside 1..T.
    """
    if not 1 <= steps <= process.T:
        raise ValueError(f"steps must be in 1..{process.T} (T), got {steps}")
    device, guess = process.a_table.device, ()

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu" if generator else device).to(device)

    def x0_of(xt: Tensor, t: int) -> Tensor:
        nonlocal guess
        t_batch = torch.full(shape[:1], t, device=device)
        out = model(xt, t_batch, y, *guess).float()
        if guidance:  # linear in every kind of output
            out = (1 + guidance) * out - guidance * model(xt, t_batch, None, *guess).float()  # CFG eq. 6
        x0 = process.predict_x0(out, xt, process.a[t], process.s[t]).clamp(-clip, clip)
        guess = (x0,) if process.self_condition else ()
        return x0

    method, spacing = SAMPLERS[sampler]
    ts = spacing(process, steps)
    xt = math.hypot(process.a[ts[0]], process.s[ts[0]]) * noise()  # as data of variance 1 would be there
    yield from method(process, x0_of, xt, ts, noise)


def sample(process, model, shape, y=None, **settings) -> Tensor:
    """x0 of the given shape (B, ...); the settings are those of `trajectory`."""
    for _, xt, _ in trajectory(process, model, shape, y, **settings):
        x0 = xt  # the last one is clean
    return x0


def drop_condition(y, p: float):
    """y, labels (B,) or (context, mask), with each sample's taken away with probability p. CFG Alg. 1."""
    of = y[1] if isinstance(y, tuple) else y
    drop = torch.rand(len(of), device=of.device) < p  # (B,)
    return (y[0], of & ~drop[:, None]) if isinstance(y, tuple) else of.masked_fill(drop, -1)


# -- the masked process ----------------------------------------------------------------------------------


class Masked:
    """The absorbing process on token ids: at t in [0, 1] each is mask_id with probability t. MDLM eq. 3."""

    def __init__(self, mask_id: int):
        self.mask_id = mask_id

    def q_sample(self, x0: Tensor, t: Tensor) -> Tensor:
        """xt for x0 (B, k) at t (B,), or (B, k) for each position."""
        hit = torch.rand(x0.shape, device=x0.device) < (t if t.dim() == 2 else t[:, None])
        return x0.masked_fill(hit, self.mask_id)

    def loss(self, model, x0: Tensor, y=None, t: Tensor | None = None) -> Tensor:
        """Cross-entropies (B, k) of the masked tokens of x0 (B, k), 0 at the others; t as in `q_sample`.

        All masked tokens count alike; MDLM eq. 10, a bound on the likelihood, divides by t.
        """
        t = torch.rand(x0.shape[:1], device=x0.device) if t is None else t
        return self.errors(model, x0, self.q_sample(x0, t) == self.mask_id, y, t)

    def errors(self, model, x0: Tensor, hidden: Tensor, y=None, t: Tensor | None = None) -> Tensor:
        """Cross-entropies (B, k) of x0 (B, k) where it is hidden, bool (B, k), given the rest; else 0."""
        t = hidden.float().mean(1) if t is None else t
        logits = model(x0.masked_fill(hidden, self.mask_id), t, y).float()
        return F.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0) * hidden


@torch.no_grad()
def unmask(
    model, xt: Tensor, mask_id: int, y=None, *, steps=8, order="confident", temperature=0.0, generator=None
):
    """Yield xt (B, k) after every step: what is masked in it becomes known, what is known stays.

    steps: evaluations of the denoiser, at most; each makes known at least one token of a sequence. order:
    "confident" keeps the tokens that the denoiser is surest of (MaskGIT section 3.2), "margin" those with
    the widest gap between the two likeliest (2502.06768), "random" any (MDLM eq. 7). temperature: of the
    tokens' distribution; 0 takes the likeliest. generator: one on the CPU gives the same draws on any device.
    """
    masked = xt == mask_id
    n = masked.sum(1)  # (B,)
    wanted = n.clamp(max=steps)  # evaluations of each sequence, which is whole when it has had them
    for i in range(1, 1 + max(wanted.tolist(), default=0)):
        left = (n * (wanted - i).clamp(min=0) / wanted.clamp(min=1)).round()
        logits = model(xt, masked.float().mean(1), y).float()
        noise = -(-uniform(logits, generator).clamp(min=1e-9).log()).log() if temperature else 0.0  # Gumbel's
        x0 = (logits + temperature * noise).argmax(-1)
        sure = sureness(logits, x0, order) if order != "random" else uniform(x0, generator)
        rank = sure.masked_fill(~masked, math.inf).argsort(1).argsort(1)
        x0 = torch.where(masked, x0, xt)
        masked = rank < left[:, None]
        xt = torch.where(masked, mask_id, x0)
        yield xt


def uniform(like: Tensor, generator=None) -> Tensor:
    """Uniform draws in [0, 1) of the shape and on the device of `like`; a generator on the CPU serves any."""
    device = "cpu" if generator else like.device
    return torch.rand(like.shape, generator=generator, device=device).to(like.device)


def sureness(logits: Tensor, x0: Tensor, order: str) -> Tensor:
    """How sure (B, k) logits (B, k, V) are of tokens x0 (B, k): for the orders "confident" and "margin"."""
    p = logits.softmax(-1)
    own = p.gather(-1, x0[..., None])
    if order == "confident":
        return own[..., 0]
    return (own - p.scatter(-1, x0[..., None], 0.0).amax(-1, keepdim=True))[..., 0]


# -- what the denoisers share ----------------------------------------------------------------------------


def zero(layer):
    """The layer with weights and bias set to 0: a residual branch or an output that starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines (..., dim) of steps or positions t (...), wavelengths 2 pi to 20,000 pi. DDPM B."""
    freq = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10_000) / (dim // 2)))
    angle = t[..., None].float() * freq
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class StepEmbedding(nn.Module):
    """A vector (B, D) for steps t (B,) and class labels y (B,); -1 or None is "no label"."""

    def __init__(self, D: int, classes: int = 0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)  # row 0 is "no label"

    def forward(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.label.weight.dtype != torch.float32:
            got = f"a network in {self.label.weight.dtype}"
            raise TypeError(f"{got}: keep it in float32, and run it under torch.autocast for half precision")
        y = torch.full_like(t, -1, dtype=torch.long) if y is None else y
        if not isinstance(y, Tensor) or y.shape != t.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else repr(y)
            raise ValueError(f"y must be a tensor of {len(t)} labels, one for each sample, got {got}")
        try:
            label = self.label(y + 1)
        except IndexError as error:  # on a CPU; to look on a GPU would mean to wait for it at every step
            classes = self.label.num_embeddings - 1
            known = f"a network with classes={classes} takes labels y from -1 (none) to {classes - 1}"
            raise ValueError(f"{known}, got {y.min()} to {y.max()}") from error
        return self.mlp(sinusoid(t, self.mlp[0].in_features)) + label


# -- the UNet --------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the step embedding scales and shifts between them. DDPM appendix B."""

    def __init__(self, c_in: int, c_out: int, D: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.emb = nn.Linear(D, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class ImageAttention(nn.Module):
    """Residual self-attention over the H*W positions of an image."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, c)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, H W, C/heads)
        h = attention(q, k, v, None).transpose(-1, -2).reshape(x.shape)
        return x + self.out(h)


class UNet(nn.Module):
    """Convolutional denoiser of images (B, C, H, W); H and W must be divisible by 2^(levels - 1).

    channels: width of each level, multiples of 8, from full resolution down. blocks: residual blocks of each
    level on the way down, and on the way up. Attention once, at the lowest resolution. classes: number of
    labels, 0 for none. Raises ValueError for sides that it cannot halve often enough.
    """

    def __init__(self, image_channels: int, channels=(32, 64, 128), blocks=(1, 1, 2), classes=0, heads=4):
        super().__init__()
        D = 4 * channels[0]
        self.embed = StepEmbedding(D, classes)
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = channels[0]
        for c, n in zip(channels, blocks, strict=True):
            shrink, grow = nn.Identity(), nn.Identity()
            if self.down:
                shrink = nn.Conv2d(above, c, 3, stride=2, padding=1)
                # The 1x1 convolution comes before the upsampling: few channels up there.
                grow = nn.Sequential(nn.Conv2d(c, above, 1), nn.Upsample(scale_factor=2))
            self.down.append(nn.ModuleList([shrink, *(ResBlock(c, c, D) for _ in range(n))]))
            self.up.insert(0, nn.ModuleList([*(ResBlock(2 * c, c, D) for _ in range(n)), grow]))
            above = c
        self.middle = ImageAttention(channels[-1], heads)
        self.norm = nn.GroupNorm(8, channels[0])
        self.head = zero(nn.Conv2d(channels[0], image_channels, 3, padding=1))

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        divisor = 2 ** (len(self.down) - 1)
        if xt.shape[-2] % divisor or xt.shape[-1] % divisor:
            raise ValueError(f"image sides must be divisible by {divisor}, got {tuple(xt.shape[-2:])}")
        emb = F.silu(self.embed(t, y))  # (B, D)
        h, skips = self.stem(xt), []
        for shrink, *blocks in self.down:
            h = shrink(h)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        h = self.middle(h)
        for *blocks, grow in self.up:
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            h = grow(h)
        return self.head(F.silu(self.norm(h)))


# -- the transformer: one body; thin heads for images and latents (that for tokens is in blocks.py) --------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d)) v of q (B, heads, L, d) and k, v (B, heads, M, d), where mask is True."""
    # On a CPU, at short lengths and in bf16, the backward pass of torch's takes three times as long. At long
    # ones only torch's avoids the matrix of all pairs, provided that the last axis is contiguous.
    if q.device.type == "cuda" or q.shape[2] * k.shape[2] >= 2**20:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    a = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    a = a if mask is None else a.masked_fill(~mask, -1e9)
    return a.softmax(-1).to(v.dtype) @ v


def rotation(place: Tensor, d: int) -> Tensor:
    """Cosines and sines (2, L, d/2) by which positions place (L,) turn vectors (d,). RoFormer eq. 15."""
    sines, cosines = sinusoid(place, d).chunk(2, dim=-1)
    return torch.stack([cosines, sines])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, heads, L, d), each pair of its numbers turned by `rotation`. RoFormer, 2104.09864, eq. 34."""
    (a, b), (cosines, sines) = x.chunk(2, dim=-1), turn.to(x.dtype)
    return torch.cat([a * cosines - b * sines, a * sines + b * cosines], dim=-1)


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of h (B, L, D), scaled and shifted by (B or 1, 1, D) each. DiT section 3.2."""
    if scale.numel() == h.shape[-1]:  # one for all: they are the norm's own weights, in one pass over h
        return F.layer_norm(h, h.shape[-1:], (1 + scale.flatten()).to(h.dtype), shift.flatten().to(h.dtype))
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention and MLP, each scaled, shifted and gated by emb (adaLN-zero). DiT section 3.2."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.ada = zero(nn.Linear(D, 6 * D))

    def forward(self, h: Tensor, emb: Tensor, mask: Tensor | None, past, n: int, turn: Tensor | None = None):
        """The last n positions of h (B, L, D), and the keys and values of all; for the rest see `Body`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(emb).chunk(6, dim=-1)  # (B or 1, 1, D)
        x = self.qkv(modulate(h, scale1, shift1)).unflatten(2, (3, self.heads, -1))
        q, k, v = x.permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, heads, P + L, ...)
        mask = mask if mask is None else mask[..., -n:, :]
        x = attention(q[:, :, -n:], k, v, mask).transpose(1, 2).flatten(2)
        h = h[:, -n:] + gate1 * self.out(x)
        return h + gate2 * self.mlp(modulate(h, scale2, shift2)), (k, v)


class Body(nn.Module):
    """The transformer itself, which knows neither pixels nor chains."""

    def __init__(self, D: int, depth: int, heads: int, d_out: int):
        super().__init__()
        if D % (4 * heads):
            raise ValueError(f"width D must be divisible by 4 * heads = {4 * heads}, got {D}")
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.ada, self.head = zero(nn.Linear(D, 2 * D)), zero(nn.Linear(D, d_out))

    def forward(self, h: Tensor, emb: Tensor, n: int, mask: Tensor | None = None, cache=None, turn=None):
        """Outputs (B, n, d_out) of the last n of the embedded positions h (B, L, D), and the longer cache.

        emb: (B or 1, 1, D), how noisy they are. mask: bool, (L, P + L) or with axes (B, heads) before, who
        (row) sees whom (column). cache: for each block keys and values (B, heads, P, D/heads) of P positions
        before these. turn: `rotation` of the L positions, where h does not say where they stand.
        """
        seen, last = [], self.blocks[-1]
        for block, past in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            # What stands before the last n is read by them, and after the last block by no one.
            h, kv = block(h, emb, mask, past, n if block is last else h.shape[1], turn)
            seen.append(kv)
        shift, scale = self.ada(emb).chunk(2, dim=-1)
        return self.head(modulate(h, scale, shift)), seen


class ImageTransformer(nn.Module):
    """Denoiser of images (B, C, H, W) cut into patches of side p, of any size that p divides.

    D: width, divisible by 4 * heads. classes: number of labels, 0 for none. ValueError for other sides.
    """

    def __init__(self, image_channels: int, D=192, depth=6, p=2, classes=0, heads=4):
        super().__init__()
        self.p, self.embed, self.inp = p, StepEmbedding(D, classes), nn.Linear(image_channels * p**2, D)
        self.body = Body(D, depth, heads, image_channels * p**2)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if xt.shape[-2] % self.p or xt.shape[-1] % self.p:
            raise ValueError(f"image sides must be divisible by {self.p}, got {tuple(xt.shape[-2:])}")
        x = F.pixel_unshuffle(xt, self.p)  # (B, C p^2, H/p, W/p)
        half = self.inp.out_features // 2
        row, column = (sinusoid(torch.arange(n, device=x.device), half) for n in x.shape[2:])
        place = torch.cat(torch.broadcast_tensors(row[:, None], column[None]), dim=-1)  # (H/p, W/p, D)
        h = (self.inp(x.permute(0, 2, 3, 1)) + place).flatten(1, 2)  # (B, L, D)
        out, _ = self.body(h, F.silu(self.embed(t, y))[:, None], h.shape[1])
        return F.pixel_shuffle(out.transpose(1, 2).reshape(x.shape), self.p)


class LatentTransformer(nn.Module):
    """Denoiser of latents (B, k, d) under a condition y: labels (B,), or (context, mask).

    context: vectors (B, L, d_context), which count where mask (B, L) is True. classes, d_context: 0 for none.
    self_condition: a guess of x0, shaped like xt, is a fourth argument; without one it is 0.
    """

    def __init__(self, d: int, D: int, depth: int, classes=0, d_context=0, self_condition=False, heads=4):
        super().__init__()
        self.embed, self.inp = StepEmbedding(D, classes), nn.Linear(d * (1 + self_condition), D)
        self.context = nn.Linear(d_context, D) if d_context else None
        self.self_condition, self.body = self_condition, Body(D, depth, heads, d)

    def forward(self, xt: Tensor, t: Tensor, y=None, x0: Tensor | None = None) -> Tensor:
        labels, context, mask = (None, *y) if isinstance(y, tuple) else (y, None, None)
        if self.self_condition:
            xt = torch.cat([xt, torch.zeros_like(xt) if x0 is None else x0], dim=-1)
        k, D = xt.shape[1], self.inp.out_features
        h = self.inp(xt) + sinusoid(torch.arange(k, device=xt.device), D)
        if context is not None:
            place = sinusoid(torch.arange(context.shape[1], device=xt.device), D)
            h = torch.cat([self.context(context) + place, h], dim=1)  # (B, L + k, D)
            mask = F.pad(mask, (0, k), value=True)[:, None, None]  # (B, 1, 1, L + k)
        return self.body(h, F.silu(self.embed(t, labels))[:, None], k, mask)[0]

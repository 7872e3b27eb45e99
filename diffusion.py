"""Gaussian diffusion: noise schedules, the process (loss and samplers) and the denoisers UNet and Transformer.

Indexing is the papers': alpha_bar[0] = 1 is clean data, t runs 1..T, and xT is noise. A denoiser is any model(xt, t, y).
Sources: DDPM 2006.11239, iDDPM 2102.09672, DDIM 2010.02502, progressive distillation (v) 2202.00512, classifier-free guidance (CFG)
2207.12598, DPM-Solver++ 2211.01095, Karras et al. (EDM) 2206.00364, min-SNR 2303.09556, DiT (adaLN-zero) 2212.09748.
Axes: B batch, C channels, H W image, L tokens, k vectors of a sequence, d their width, D model width.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- noise schedules ----------------------------------------------------------------------------------------------------


def alpha_bar_linear(T: int, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """Linear betas, scaled by 1000/T so that any T ends in noise: (T+1,) float64. DDPM section 4."""
    beta = torch.linspace(beta_1, beta_T, T, dtype=torch.float64) * 1000 / T
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta.clamp(max=0.999)).cumprod(0)])


def alpha_bar_cosine(T: int, s: float = 0.008) -> Tensor:
    """Squared-cosine alpha_bar with betas of at most 0.999: (T+1,) float64. iDDPM eq. 17."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def noise_shift(alpha_bar: Tensor, s: float) -> Tensor:
    """The schedule with its signal-to-noise ratio divided by s^2: more of the steps at high noise for s > 1. Simple diffusion 2301.11093 eq. 4."""
    return alpha_bar / (alpha_bar + s**2 * (1 - alpha_bar))


SCHEDULES = {"linear": alpha_bar_linear, "cosine": alpha_bar_cosine}


# -- the process --------------------------------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """The process q(xt | x0) = N(sqrt(alpha_bar[t]) x0, (1 - alpha_bar[t]) I), its training loss and its samplers.

    alpha_bar: (T+1,) float64, from 1 down to at most 0.01 (ValueError otherwise: sampling would start from what training never saw).
    predict: what the denoiser's output means, "eps", "x0" or "v" (v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0).
    weight: "plain" mean squared error of that output, or "min-snr" with gamma 5. It has no weights; .to(device) moves its tables.
    self_condition: share of training steps in which the denoiser, then model(xt, t, y, x0), also sees its first guess of x0;
    above 0, each step of sampling shows it the guess of the step before. Analog bits 2208.04202 section 3.2.
    """

    def __init__(self, alpha_bar: Tensor, predict: str = "v", weight: str = "min-snr", gamma: float = 5.0, self_condition: float = 0.0):
        super().__init__()
        if not alpha_bar[0] == 1 or not 0 < alpha_bar[-1] <= 0.01:
            raise ValueError(f"alpha_bar must go from 1 to at most 0.01 and above 0, got {alpha_bar[0]:.4g} to {alpha_bar[-1]:.4g}")
        if predict not in ("eps", "x0", "v") or weight not in ("plain", "min-snr"):
            raise ValueError(f"predict is eps, x0 or v and weight is plain or min-snr, got {predict!r} and {weight!r}")
        self.T, self.predict, self.self_condition = len(alpha_bar) - 1, predict, self_condition
        # x_t = a x0 + s eps. The samplers read these as Python floats (float64), the loss as float32 on the device.
        self.a, self.s = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        self.register_buffer("a_table", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("s_table", (1 - alpha_bar).sqrt().float(), persistent=False)
        snr = alpha_bar / (1 - alpha_bar).clamp(min=1e-20)
        w = torch.ones_like(snr)
        if weight == "min-snr":  # min-SNR eq. 5 weights the error of x0; the error of eps is SNR times that, of v SNR + 1 times
            w = snr.clamp(max=gamma) / {"x0": 1, "eps": snr, "v": snr + 1}[predict]
        self.register_buffer("weight_table", w.float(), persistent=False)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """xt for clean x0 (B, ...) at steps t (B,) in 0..T with noise eps (B, ...). DDPM eq. 4."""
        return self._at(self.a_table, t, x0) * x0 + self._at(self.s_table, t, x0) * eps

    def loss(self, model, x0: Tensor, y=None, drop: float = 0.0) -> Tensor:
        """Scalar training loss of x0 (B, ...) under condition y, which is dropped with probability `drop`. DDPM Alg. 1, CFG Alg. 1."""
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        if self.predict == "v":  # progressive distillation app. D
            target = self._at(self.a_table, t, x0) * eps - self._at(self.s_table, t, x0) * x0
        else:
            target = eps if self.predict == "eps" else x0
        y, guess = drop_condition(y, drop), ()
        if self.self_condition and torch.rand(()) < self.self_condition:
            with torch.no_grad():
                guess = (self.predict_x0(model(xt, t, y).float(), xt, t),)
        error = (model(xt, t, y, *guess).float() - target).square().flatten(1).mean(1)  # (B,); DDPM eq. 14
        return (self.weight_table[t] * error).mean()

    def predict_x0(self, out: Tensor, xt: Tensor, t) -> Tensor:
        """The clean x0 that the denoiser's output `out` at step t in 1..T (an int, or (B,)) stands for."""
        a, s = (self.a[t], self.s[t]) if isinstance(t, int) else (self._at(self.a_table, t, xt), self._at(self.s_table, t, xt))
        if self.predict == "eps":
            return (xt - s * out) / a  # DDPM eq. 15
        return out if self.predict == "x0" else a * xt - s * out  # progressive distillation app. D

    def timesteps(self, steps: int, spacing: str) -> list[int]:
        """Decreasing steps [t_1, ..., t_steps, 0]; "trailing": even, from T; "karras": even in sigma^(1/7), from sigma 80, EDM eq. 5.

        Karras steps that would fall on one integer move apart to neighbouring ones.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be in 1..{self.T} (T), got {steps}")
        if spacing == "trailing":
            return [round(self.T * i / steps) for i in range(steps, -1, -1)]
        log_sigma = torch.tensor([math.log(self.s[t] / self.a[t]) for t in range(1, self.T + 1)], dtype=torch.float64)
        lo, hi = log_sigma[0].exp().item(), min(80.0, log_sigma[-1].exp().item())
        ramp = torch.linspace(hi ** (1 / 7), lo ** (1 / 7), steps, dtype=torch.float64) if steps > 1 else torch.tensor([hi ** (1 / 7)])
        t = (ramp.log()[:, None] * 7 - log_sigma).abs().argmin(1) + 1  # (steps,) the nearest step of the table
        t = t.tolist()
        for i in range(steps):  # from the end up: the i-th lowest step is at least i + 1 ...
            t[-1 - i] = max(t[-1 - i], t[-i] + 1 if i else 1)
        for i in range(steps):  # ... and from the start down: the i-th highest at most T - i
            t[i] = min(t[i], self.T - i)
        return t + [0]

    @torch.no_grad()
    def trajectory(self, model, shape, y=None, *, sampler="dpm++", steps=10, eta=0.0, guidance=0.0, clip=None, generator=None):
        """Yield (t, xt, x0) after every step from noise to data: t the step reached, x0 the denoiser's guess (clipped to +-clip).

        sampler: "ddpm" (ancestral), "ddim" (with noise eta in 0..1; eta = 1 is ddpm) or "dpm++" (DPM-Solver++ 2M, no noise).
        guidance: w of CFG eq. 6; 0 is the plain conditional model. generator: a CPU generator gives the same noise on any device.
        The denoiser is used as it is: put it in eval mode first.
        """
        if sampler not in ("ddpm", "ddim", "dpm++") or not 0 <= eta <= 1:
            raise ValueError(f"sampler is ddpm, ddim or dpm++ and eta in [0, 1], got {sampler!r} and {eta}")
        a, s, device = self.a, self.s, self.a_table.device
        eta = 1.0 if sampler == "ddpm" else eta
        noise = lambda: torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
        xt, x0_before, r, guess = noise(), None, None, ()
        ts = self.timesteps(steps, "karras" if sampler == "dpm++" else "trailing")
        for t, u in zip(ts[:-1], ts[1:]):  # from step t to step u < t
            t_batch = torch.full(shape[:1], t, device=device)
            out = model(xt, t_batch, y, *guess).float()
            if guidance:
                out = (1 + guidance) * out - guidance * model(xt, t_batch, None, *guess).float()  # CFG eq. 6, linear in eps, x0 and v alike
            x0 = self.predict_x0(out, xt, t)
            x0 = x0 if clip is None else x0.clamp(-clip, clip)
            guess = (x0,) if self.self_condition else ()
            if u == 0:
                xt = x0  # every sampler's last step, as alpha_bar[0] = 1
            elif sampler == "dpm++":  # Alg. 2, with lambda = log(a / s) and h = lambda_u - lambda_t
                h = math.log(a[u] / s[u]) - math.log(a[t] / s[t])
                x0_mid = x0 if x0_before is None else x0 + (h / r / 2) * (x0 - x0_before)  # r: the step before, in lambda
                xt = s[u] / s[t] * xt + a[u] * -math.expm1(-h) * x0_mid
                x0_before, r = x0, h
            else:
                eps = (xt - a[t] * x0) / s[t]
                sigma = eta * s[u] / s[t] * math.sqrt(1 - (a[t] / a[u]) ** 2)  # DDIM eq. 16; eta = 1: the variance of DDPM eq. 7
                xt = a[u] * x0 + math.sqrt(max(s[u] ** 2 - sigma**2, 0)) * eps  # DDIM eq. 12
                xt = xt + sigma * noise() if sigma else xt
            yield u, xt, x0

    def sample(self, model, shape, y=None, **settings) -> Tensor:
        """x0 of the given shape (B, ...); the settings are those of `trajectory`."""
        for _, xt, _ in self.trajectory(model, shape, y, **settings):
            pass
        return xt

    @staticmethod
    def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return table[t].view(-1, *[1] * (x.dim() - 1))  # (B, 1, ...)


# -- what the denoisers share -------------------------------------------------------------------------------------------
# A condition y is None (nothing), labels (B,) int64 in 0..classes-1, or (labels or None, context (B, L, d), mask (B, L) bool).
# "No label" is -1 for one sample of a batch and None for all of it; "no context" is a mask without a True.


def drop_condition(y, p: float):
    """The condition with each sample's label and context removed with probability p. CFG Alg. 1."""
    if y is None or not p:
        return y
    labels, context, mask = y if isinstance(y, tuple) else (y, None, None)
    some = labels if labels is not None else mask
    drop = torch.rand(len(some), device=some.device) < p  # (B,)
    labels = labels if labels is None else labels.masked_fill(drop, -1)
    return (labels, context, mask & ~drop[:, None]) if isinstance(y, tuple) else labels


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines (..., dim) of positions or steps t (...), wavelengths 2 pi to 2 pi 10,000. DDPM appendix B."""
    freq = torch.exp(torch.arange(dim // 2, device=t.device) * (-math.log(10_000) / (dim // 2)))
    angle = t[..., None].float() * freq
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class StepEmbedding(nn.Module):
    """One vector (B, D) for step t (B,) and class label y (B,); -1 or None is "no label"."""

    def __init__(self, D: int, classes: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)  # row 0 is "no label"

    def forward(self, t: Tensor, y) -> Tensor:
        y = torch.zeros_like(t, dtype=torch.long) if y is None else y + 1
        return self.mlp(sinusoid(t, self.mlp[0].in_features)) + self.label(y)


def zero(layer):
    """The layer with weights and bias set to 0: a residual branch or an output that starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# -- denoisers ----------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two 3x3 convolutions; the step embedding scales and shifts between them. The last one starts at zero."""

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
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(1)  # (B, heads, HW, C/heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W)
        return x + self.out(h)


class UNet(nn.Module):
    """Convolutional denoiser of images (B, C, H, W); H and W must be divisible by 2^(levels - 1) (ValueError otherwise).

    channels: width of each level, multiples of 8, from full resolution down. blocks: residual blocks of each level on the way down,
    and on the way up. Attention once, at the lowest resolution. classes: number of labels, 0 for none.
    """

    def __init__(self, image_channels: int, channels=(32, 64, 128), blocks=(1, 1, 2), classes: int = 0, heads: int = 4):
        super().__init__()
        D = 4 * channels[0]
        self.divisor = 2 ** (len(channels) - 1)
        self.embed = StepEmbedding(D, classes)
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (c, n) in enumerate(zip(channels, blocks)):
            above = channels[max(i - 1, 0)]
            shrink = nn.Identity() if i == 0 else nn.Conv2d(above, c, 3, stride=2, padding=1)
            grow = nn.Identity() if i == 0 else nn.Sequential(nn.Conv2d(c, above, 1), nn.Upsample(scale_factor=2))  # few channels up there
            self.down.append(nn.ModuleList([shrink, *(ResBlock(c, c, D) for _ in range(n))]))
            self.up.insert(0, nn.ModuleList([*(ResBlock(2 * c, c, D) for _ in range(n)), grow]))
        self.middle = ImageAttention(channels[-1], heads)
        self.norm, self.head = nn.GroupNorm(8, channels[0]), zero(nn.Conv2d(channels[0], image_channels, 3, padding=1))

    def forward(self, xt: Tensor, t: Tensor, y=None) -> Tensor:
        if xt.shape[-2] % self.divisor or xt.shape[-1] % self.divisor:
            raise ValueError(f"image sides must be divisible by {self.divisor}, got {tuple(xt.shape[-2:])}")
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


class Block(nn.Module):
    """Transformer block: self-attention and MLP, each scaled, shifted and gated by the step embedding (adaLN-zero, DiT section 3.2)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.ada = zero(nn.Linear(D, 6 * D))

    def forward(self, h: Tensor, emb: Tensor, mask) -> Tensor:
        B, L, D = h.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(emb)[:, None].chunk(6, dim=-1)  # each (B, 1, D)
        x = F.layer_norm(h, (D,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, L, D)
        h = h + gate1 * self.out(x)
        x = F.layer_norm(h, (D,)) * (1 + scale2) + shift2
        return h + gate2 * self.mlp(x)


class Transformer(nn.Module):
    """Transformer denoiser of images (B, C, H, W) cut into patches, or, with patch = 0, of vectors (B, k, d).

    d_in: C or d. D: width, divisible by 4 * heads. patch: side of a patch; H and W must be divisible by it (ValueError otherwise).
    classes: number of labels, 0 for none. d_context: width of the context vectors of y, 0 for none; they join the sequence, and
    those whose mask is False count for nothing. Positions are sinusoids, so any size or length is accepted.
    self_condition: a guess of x0, shaped like xt, is a fourth argument; without one it is 0.
    """

    def __init__(self, d_in: int, D: int = 256, depth: int = 6, heads: int = 4, patch: int = 0, classes: int = 0, d_context: int = 0, self_condition: bool = False):
        super().__init__()
        if D % (4 * heads):
            raise ValueError(f"width D must be divisible by 4 * heads = {4 * heads}, got {D}")
        self.patch = self.divisor = patch
        d_token = d_in * max(patch, 1) ** 2
        self.embed, self.self_condition = StepEmbedding(D, classes), self_condition
        self.inp = nn.Linear(d_token * (1 + self_condition), D)
        self.context = nn.Linear(d_context, D) if d_context else None
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.ada, self.head = zero(nn.Linear(D, 2 * D)), zero(nn.Linear(D, d_token))

    def forward(self, xt: Tensor, t: Tensor, y=None, x0=None) -> Tensor:
        p, D = self.patch, self.inp.out_features
        labels, context, mask = y if isinstance(y, tuple) else (y, None, None)
        x = torch.cat([xt, torch.zeros_like(xt) if x0 is None else x0], dim=1 if p else -1) if self.self_condition else xt
        if p:
            B, C, H, W = xt.shape
            if H % p or W % p:
                raise ValueError(f"image sides must be divisible by the patch {p}, got {(H, W)}")
            x = x.view(B, -1, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // p**2, -1)  # (B, k, d)
            row, col = torch.meshgrid(*(torch.arange(n // p, device=x.device) for n in (H, W)), indexing="ij")
            position = torch.cat([sinusoid(row.flatten(), D // 2), sinusoid(col.flatten(), D // 2)], dim=-1)  # (k, D)
        else:
            position = sinusoid(torch.arange(x.shape[1], device=x.device), D)
        h, k, emb = self.inp(x) + position, x.shape[1], F.silu(self.embed(t, labels))  # (B, k, D), (B, D)
        if context is not None:
            h = torch.cat([h, self.context(context) + sinusoid(torch.arange(context.shape[1], device=x.device), D)], dim=1)
            mask = F.pad(mask, (k, 0), value=True)[:, None, None]  # (B, 1, 1, k + L): every position may look at these
        for block in self.blocks:
            h = block(h, emb, mask)
        shift, scale = self.ada(emb)[:, None].chunk(2, dim=-1)
        out = self.head(F.layer_norm(h[:, :k], (D,)) * (1 + scale) + shift)  # (B, k, d)
        if p:
            out = out.view(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return out

"""Diffusion: noise schedules, the processes Diffusion (Gaussian) and Masked (loss and samplers), the denoisers UNet and Transformer.

Indexing is the papers': alpha_bar[0] = 1 is clean data, t runs 1..T, and xT is noise. A denoiser is any model(xt, t, y).
Sources: DDPM 2006.11239, iDDPM 2102.09672, DDIM 2010.02502, progressive distillation (v) 2202.00512, classifier-free guidance (CFG)
2207.12598, DPM-Solver++ 2211.01095, Karras et al. (EDM) 2206.00364, min-SNR 2303.09556, DiT (adaLN-zero) 2212.09748, masked diffusion
(MDLM) 2406.07524, MaskGIT 2202.04200, block-causal training (block diffusion) 2503.09573.
Axes: B batch, C channels, H W image, L tokens, k vectors of a sequence, d their width, D model width.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

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


# -- conditions ---------------------------------------------------------------------------------------------------------
# A condition y is None (nothing), labels (B,) int64 in 0..classes-1, (labels or None, context (B, L, d), mask (B, L) bool), or a Chain.
# "No label" is -1 for one sample of a batch and None for all of it; "no context" is a mask without a True.


@dataclass
class Chain:
    """What the thoughts of a chain know of each other: the condition of xt (B, k, d) that holds one thought, or several, each with its own t.

    block: (k,) the thought, 0..n-1, that each position of xt belongs to; t is (B, n). context: (B, c, d) clean vectors, at step 0.
    position: (k + c,) place of each position of [xt, context] in the text. see: (B or 1, k + c, p + k + c) bool, whether a position
    of [xt, context] (row) sees one of [past, xt, context]. past: keys and values of p positions for each block of the Transformer.
    keep: the first evaluation moves the context into past, so that the next ones, and later thoughts, need not read it again.
    count: (B, k) bool, the positions that the loss counts; None: all.
    """

    block: Tensor
    context: Tensor
    position: Tensor
    see: Tensor
    n: int = 1
    past: list = field(default_factory=list)
    keep: bool = False
    count: Tensor | None = None

    def move(self, seen: list) -> None:
        """Move the context into past, given the keys and values (B, heads, p + k + c, D/heads) of [past, xt, context] for each block."""
        k, p = len(self.block), self.see.shape[-1] - self.see.shape[1]
        order = torch.arange(self.see.shape[-1], device=self.see.device)
        order = torch.cat([order[:p], order[p + k :], order[p : p + k]])  # [past, context, xt]
        self.past = [tuple(part[:, :, order[:-k]] for part in pair) for pair in seen]
        self.context, self.position, self.see = self.context[:, :0], self.position[:k], self.see[:, :k, order]


@contextmanager
def peek():
    """No gradients inside. Autocast forgets its bf16 copies of the weights afterwards: in older torch those made here would keep gradients from them."""
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


def draw_t(T: int, x0: Tensor, y, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    """Steps in 1..T as the denoiser wants them, (B,) or, for a chain of n thoughts, (B, n); and as x0 wants them, (B,) or (B, k).

    They are uniform for shift = 1; above it t/(T - t) is `shift` times that of a uniform step.
    """
    t = torch.randint(1, T + 1, (len(x0), y.n) if isinstance(y, Chain) else (len(x0),), device=x0.device)
    t = (t * (shift * T / (T + (shift - 1) * t))).ceil().long() if shift != 1 else t
    return (t, t[:, y.block]) if isinstance(y, Chain) else (t, t)


def full_t(t: int, x: Tensor, y) -> Tensor:
    """The step t for all of x, (B,) or, for a chain, (B, n)."""
    return torch.full((len(x), y.n) if isinstance(y, Chain) else (len(x),), t, device=x.device)


def mean_counted(error: Tensor, y) -> Tensor:
    """The mean of error (B,), or of (B, k) over the positions that a chain counts."""
    if not isinstance(y, Chain) or y.count is None:
        return error.mean()
    return (error * y.count).sum() / y.count.sum()


# -- the Gaussian process -----------------------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """The process q(xt | x0) = N(sqrt(alpha_bar[t]) x0, (1 - alpha_bar[t]) I), its training loss and its samplers.

    alpha_bar: (T+1,) float64, from 1 down to at most 0.01 (ValueError otherwise: sampling would start from what training never saw).
    predict: what the denoiser's output means, "eps", "x0" or "v" (v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0), or, for one-hot
    vectors x0, "token": logits, of which x0 is the softmax; its error is the cross-entropy (Plaid 2305.18619 section 3).
    weight: "plain" mean squared error of that output, or "min-snr" with gamma 5. It has no weights; .to(device) moves its tables.
    self_condition: share of training steps in which the denoiser, then model(xt, t, y, x0), also sees its first guess of x0;
    above 0, each step of sampling shows it the guess of the step before. Analog bits 2208.04202 section 3.2.
    """

    def __init__(self, alpha_bar: Tensor, predict: str = "v", weight: str = "min-snr", gamma: float = 5.0, self_condition: float = 0.0):
        super().__init__()
        if not alpha_bar[0] == 1 or not 0 < alpha_bar[-1] <= 0.01:
            raise ValueError(f"alpha_bar must go from 1 to at most 0.01 and above 0, got {alpha_bar[0]:.4g} to {alpha_bar[-1]:.4g}")
        if predict not in ("eps", "x0", "v", "token") or weight not in ("plain", "min-snr"):
            raise ValueError(f"predict is eps, x0, v or token and weight is plain or min-snr, got {predict!r} and {weight!r}")
        self.T, self.predict, self.self_condition = len(alpha_bar) - 1, predict, self_condition
        # x_t = a x0 + s eps. The samplers read these as Python floats (float64), the loss as float32 on the device.
        self.a, self.s = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        self.register_buffer("a_table", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("s_table", (1 - alpha_bar).sqrt().float(), persistent=False)
        snr = alpha_bar / (1 - alpha_bar).clamp(min=1e-20)
        w = torch.ones_like(snr)
        if weight == "min-snr":  # min-SNR eq. 5 weights the error of x0; the error of eps is SNR times that, of v SNR + 1 times
            w = snr.clamp(max=gamma) / {"x0": 1, "token": 1, "eps": snr, "v": snr + 1}[predict]
        self.register_buffer("weight_table", w.float(), persistent=False)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """xt for clean x0 (B, ...) at steps t (B,), or (B, k) for each position, in 0..T with noise eps (B, ...). DDPM eq. 4."""
        return self._at(self.a_table, t, x0) * x0 + self._at(self.s_table, t, x0) * eps

    def loss(self, model, x0: Tensor, y=None, drop: float = 0.0) -> Tensor:
        """Scalar training loss of x0 (B, ...) under condition y, which is dropped with probability `drop`. DDPM Alg. 1, CFG Alg. 1."""
        t, t_x0 = draw_t(self.T, x0, y)
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t_x0, eps)
        y, guess = drop_condition(y, drop), ()
        if self.self_condition and torch.rand(()) < self.self_condition:
            with peek():
                guess = (self.predict_x0(model(xt, t, y).float(), xt, t_x0),)
        out = model(xt, t, y, *guess).float()
        if self.predict == "token":
            error = F.cross_entropy(out.movedim(-1, 1), x0.argmax(-1), reduction="none")  # (B, k)
        elif self.predict == "v":  # progressive distillation app. D
            error = (out - (self._at(self.a_table, t_x0, x0) * eps - self._at(self.s_table, t_x0, x0) * x0)).square()
        else:
            error = (out - (eps if self.predict == "eps" else x0)).square()
        error = error.reshape(*t_x0.shape, -1).mean(-1)  # (B,), or (B, k); DDPM eq. 14
        return mean_counted(self.weight_table[t_x0] * error, y)

    @peek()
    def guess(self, model, x0: Tensor, y=None) -> Tensor:
        """The denoiser's guess, in one evaluation, of x0 (B, ...) noised to random steps: what it makes of a snapshot."""
        t, t_x0 = draw_t(self.T, x0, y)
        xt = self.q_sample(x0, t_x0, torch.randn_like(x0))
        return self.predict_x0(model(xt, t, y).float(), xt, t_x0)

    def predict_x0(self, out: Tensor, xt: Tensor, t) -> Tensor:
        """The clean x0 that the denoiser's output `out` at step t in 1..T (an int, (B,) or (B, k)) stands for."""
        a, s = (self.a[t], self.s[t]) if isinstance(t, int) else (self._at(self.a_table, t, xt), self._at(self.s_table, t, xt))
        if self.predict == "eps":
            return (xt - s * out) / a  # DDPM eq. 15
        if self.predict == "token":
            return out.softmax(-1)
        return out if self.predict == "x0" else a * xt - s * out  # progressive distillation app. D

    def timesteps(self, steps: int, spacing: str) -> list[int]:
        """Decreasing steps [t_1, ..., t_steps, 0]; "trailing": even, from T; "karras": even in sigma^(1/7), from sigma 80, EDM eq. 5.

        Karras steps that would fall on one integer move apart to neighbouring ones.
        """
        even = even_steps(self.T, steps)
        if spacing == "trailing":
            return even
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
    def trajectory(self, model, shape, y=None, *, sampler="dpm++", steps=10, eta=0.0, guidance=0.0, clip=None, temperature=1.0, start=None, generator=None):
        """Yield (t, xt, x0) after every step from noise to data: t the step reached, x0 the denoiser's guess (clipped to +-clip).

        sampler: "ddpm" (ancestral), "ddim" (with noise eta in 0..1; eta = 1 is ddpm) or "dpm++" (DPM-Solver++ 2M, no noise).
        guidance: w of CFG eq. 6; 0 is the plain conditional model. temperature: standard deviation of the noise drawn, 1 as trained.
        start: (x0, t) begins from that x0 noised to step t, not from noise. generator: a CPU generator gives the same noise on any device.
        The denoiser is used as it is: put it in eval mode first.
        """
        if sampler not in ("ddpm", "ddim", "dpm++") or not 0 <= eta <= 1:
            raise ValueError(f"sampler is ddpm, ddim or dpm++ and eta in [0, 1], got {sampler!r} and {eta}")
        a, s, device = self.a, self.s, self.a_table.device
        eta = 1.0 if sampler == "ddpm" else eta
        noise = lambda: temperature * torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
        xt, x0_before, r, guess = noise(), None, None, ()
        ts = self.timesteps(steps, "karras" if sampler == "dpm++" else "trailing")
        if start:
            ts, xt = start_from(ts, start[1]), a[start[1]] * start[0] + s[start[1]] * xt  # DDPM eq. 4
        for t, u in zip(ts[:-1], ts[1:]):  # from step t to step u < t
            t_batch = full_t(t, xt, y)
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
        return table[t].view(*t.shape, *[1] * (x.dim() - t.dim()))  # (B, 1, ...), or (B, k, 1)


def even_steps(T: int, steps: int) -> list[int]:
    """Decreasing steps from T to 0, evenly spaced. Raises ValueError where steps is not in 1..T."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be in 1..{T} (T), got {steps}")
    return [round(T * i / steps) for i in range(steps, -1, -1)]


def start_from(ts: list[int], t: int) -> list[int]:
    """The decreasing steps ts below t, after t itself."""
    return [t, *(u for u in ts if u < t)]


# -- the masked process -------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """The absorbing process on tokens: at step t each one is masked with probability t/T. MDLM, 2406.07524.

    x0 (B, k, V) holds one-hot vectors, a masked token is a vector of zeros, and the denoiser gives the logits of x0; it is not told t, since
    the masks that it sees say as much (MDLM section 3.5). weight: "elbo" counts
    an error at step t by T/t (MDLM eq. 10, a bound on the likelihood), "plain" counts all masked tokens alike.
    self_condition: as in `Diffusion`; the guess are the probabilities of each token.
    """

    def __init__(self, T: int = 1000, weight: str = "plain", self_condition: float = 0.0, shift: float = 1.0):
        super().__init__()
        if weight not in ("elbo", "plain") or weight == "elbo" and shift != 1:
            raise ValueError(f"weight is elbo or plain, and elbo is a bound for shift 1 only, got {weight!r} and {shift:g}")
        self.T, self.weight, self.self_condition, self.shift = T, weight, self_condition, shift

    def q_sample(self, x0: Tensor, t: Tensor) -> Tensor:
        """xt for x0 (B, k, V) at steps t (B,), or (B, k) for each position. MDLM eq. 3."""
        masked = torch.rand(x0.shape[:2], device=x0.device) < (t if t.dim() == 2 else t[:, None]) / self.T
        return x0.masked_fill(masked[..., None], 0.0)

    def loss(self, model, x0: Tensor, y=None, drop: float = 0.0) -> Tensor:
        """Scalar training loss of one-hot x0 (B, k, V) under condition y, which is dropped with probability `drop`."""
        t = draw_t(self.T, x0, y, self.shift)[1]
        xt = self.q_sample(x0, t)
        y, guess = drop_condition(y, drop), ()
        if self.self_condition and torch.rand(()) < self.self_condition:
            with peek():
                guess = (model(xt, None, y).float().softmax(-1),)
        out = model(xt, None, y, *guess).float()
        error = F.cross_entropy(out.movedim(-1, 1), x0.argmax(-1), reduction="none") * ~xt.any(-1)  # (B, k), of masked tokens
        if self.weight == "elbo":
            error = error * self.T / (t if t.dim() == 2 else t[:, None])  # MDLM eq. 10
        return mean_counted(error if isinstance(y, Chain) else error.mean(1), y)

    @peek()
    def guess(self, model, x0: Tensor, y=None) -> Tensor:
        """The denoiser's guess, in one evaluation, of x0 (B, k, V) masked at random steps: one-hot where known, probabilities where not."""
        t = draw_t(self.T, x0, y, self.shift)[1]
        xt = self.q_sample(x0, t)
        return torch.where(xt.any(-1, keepdim=True), xt, model(xt, None, y).float().softmax(-1))

    @torch.no_grad()
    def trajectory(self, model, shape, y=None, *, sampler="confident", steps=10, temperature=0.0, start=None, generator=None):
        """Yield (t, xt, x0) after every step from all masked to all known: x0 is the guess, one-hot.

        sampler: "confident" keeps at each step the tokens that the denoiser is surest of (MaskGIT section 3.2; with more steps than tokens,
        one at a time), "random" any of them (MDLM eq. 7). temperature: of the tokens' distribution; 0 takes the likeliest. start: (x0, t)
        begins from that x0 masked as at step t. generator: a CPU generator gives the same draws on any device.
        """
        if sampler not in ("confident", "random"):
            raise ValueError(f"sampler is confident or random, got {sampler!r}")
        B, k, V = shape
        device = next(model.parameters()).device
        rand = lambda *size: torch.rand(size, generator=generator, device=generator.device if generator else device).to(device)
        ts, xt, guess, left = even_steps(self.T, steps), torch.zeros(shape, device=device), (), k
        if start:
            ts, left = start_from(ts, start[1]), max(1, round(k * start[1] / self.T))
            xt = start[0].masked_fill((rand(B, k).argsort(1).argsort(1) < left)[..., None], 0.0)
        for u in ts[1:]:
            if round(k * u / self.T) >= left:  # no token would become known
                continue
            left = round(k * u / self.T)  # tokens masked at step u
            logits = model(xt, None, y, *guess).float()
            masked = ~xt.any(-1)  # (B, k)
            gumbel = -(-rand(B, k, V).clamp(min=1e-9).log()).log() if temperature else 0.0
            x0 = F.one_hot((logits + temperature * gumbel).argmax(-1), V).float()
            x0 = torch.where(masked[..., None], x0, xt)
            sure = (logits.softmax(-1) * x0).sum(-1) if sampler == "confident" else rand(B, k)
            sure = sure.masked_fill(~masked, 2.0)  # what is known stays
            xt = x0.masked_fill((sure.argsort(1).argsort(1) < left)[..., None], 0.0)
            guess = (logits.softmax(-1),) if self.self_condition else ()
            yield u, xt, x0

    sample = Diffusion.sample


# -- what the denoisers share -------------------------------------------------------------------------------------------

def drop_condition(y, p: float):
    """The condition with each sample's label and context removed with probability p. CFG Alg. 1."""
    if y is None or not p:
        return y
    if isinstance(y, Chain):
        raise ValueError("a chain has no guidance: its condition cannot be dropped")
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


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d)) v of q (B, heads, L, d) and k, v (B, heads, M, d), where mask (broadcast to (B, heads, L, M), bool) allows it."""
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    a = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # on a CPU, at these lengths, torch's fused one is slower in bf16: its backward pass three times
    a = a if mask is None else a.masked_fill(~mask, -1e9)
    return a.softmax(-1).to(v.dtype) @ v


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of h (B, L, D), scaled and shifted by (B or 1, L or 1, D) each. DiT section 3.2."""
    if scale.numel() == h.shape[-1]:  # one for all: they are the norm's own weights, in one pass over h
        return F.layer_norm(h, h.shape[-1:], (1 + scale.flatten()).to(h.dtype), shift.flatten().to(h.dtype))
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Transformer block: self-attention and MLP, each scaled, shifted and gated by the step embedding (adaLN-zero, DiT section 3.2)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.ada = zero(nn.Linear(D, 6 * D))

    def forward(self, h: Tensor, emb: Tensor, mask, group=slice(None), past=None, wanted=None):
        """h (B, L, D) and the keys and values (B, heads, p + L, D/heads) that it saw; emb (B, G, D) of which position i takes group[i], or G = 1.

        mask: who sees whom, broadcast to (B, heads, L, p + L). past: keys and values (B, heads, p, D/heads) of p positions before.
        wanted: only so many of the positions, the first, come back; None: all.
        """
        B, L, D = h.shape
        shift1, scale1, *rest = self.ada(emb)[:, group].chunk(6, dim=-1)  # each (B, 1 or L, D)
        gate1, shift2, scale2, gate2 = (part[:, :wanted] for part in rest)
        x = modulate(h, scale1, shift1)
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = mask if mask is None else mask[:, :, :wanted]
        x = attention(q[:, :, :wanted], k, v, mask).transpose(1, 2).flatten(2)
        h = h[:, :wanted] + gate1 * self.out(x)
        x = modulate(h, scale2, shift2)
        return h + gate2 * self.mlp(x), (k, v)


class Transformer(nn.Module):
    """Transformer denoiser of images (B, C, H, W) cut into patches, or, with patch = 0, of vectors (B, k, d).

    d_in: C or d. D: width, divisible by 4 * heads. patch: side of a patch; H and W must be divisible by it (ValueError otherwise).
    classes: number of labels, 0 for none. d_context: width of the context vectors of y, 0 for none; they join the sequence, and
    those whose mask is False count for nothing. places: number of learned positions of vectors; 0: sinusoids, so that any
    size or length is accepted. self_condition: a guess of x0, shaped like xt, is a fourth argument; without one it is 0. t may be None,
    where xt itself says how far it is (see `Masked`).
    """

    def __init__(self, d_in: int, D: int = 256, depth: int = 6, heads: int = 4, patch: int = 0, classes: int = 0, d_context: int = 0, self_condition: bool = False, places: int = 0):
        super().__init__()
        if D % (4 * heads):
            raise ValueError(f"width D must be divisible by 4 * heads = {4 * heads}, got {D}")
        self.patch = self.divisor = patch
        d_token = d_in * max(patch, 1) ** 2
        self.embed, self.self_condition = StepEmbedding(D, classes), self_condition
        self.inp = nn.Linear(d_token * (1 + self_condition), D)
        self.context = nn.Linear(d_context, D) if d_context else None
        self.places = nn.Embedding(places, D) if places else None
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(depth))
        self.ada, self.head = zero(nn.Linear(D, 2 * D)), zero(nn.Linear(D, d_token))

    def forward(self, xt: Tensor, t: Tensor, y=None, x0=None) -> Tensor:
        p, D = self.patch, self.inp.out_features
        chain = y if isinstance(y, Chain) else None
        labels, context, mask = y if isinstance(y, tuple) else (None if chain else y, None, None)
        x = torch.cat([xt, torch.zeros_like(xt) if x0 is None else x0], dim=1 if p else -1) if self.self_condition else xt
        if p:
            B, C, H, W = xt.shape
            if H % p or W % p:
                raise ValueError(f"image sides must be divisible by the patch {p}, got {(H, W)}")
            x = x.view(B, -1, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // p**2, -1)  # (B, k, d)
            row, col = torch.meshgrid(*(torch.arange(n // p, device=x.device) for n in (H, W)), indexing="ij")
            position = torch.cat([sinusoid(row.flatten(), D // 2), sinusoid(col.flatten(), D // 2)], dim=-1)  # (k, D)
        else:
            position = self.place(chain.position[: x.shape[1]] if chain else torch.arange(x.shape[1], device=x.device))
        h, k, group, past = self.inp(x) + position, x.shape[1], slice(None), [None] * len(self.blocks)  # (B, k, D)
        if t is None:
            emb = self.clean(xt.device)
        else:
            emb = F.silu(self.embed(t if chain else t[:, None], labels if labels is None else labels[:, None]))  # (B, 1 or n, D)
        if chain:
            h = torch.cat([h, self.context(chain.context) + self.place(chain.position[k:])], dim=1)
            if t is not None:
                emb = torch.cat([emb, self.clean(xt.device).expand(len(t), -1, -1)], dim=1)
                group = F.pad(chain.block, (0, h.shape[1] - k), value=emb.shape[1] - 1)  # (k + c,)
            mask, past = chain.see[:, None], chain.past or past
        elif context is not None:
            h = torch.cat([h, self.context(context) + self.place(torch.arange(context.shape[1], device=x.device))], dim=1)
            mask = F.pad(mask, (k, 0), value=True)[:, None, None]  # (B, 1, 1, k + L): every position may look at these
        seen = []
        for block, kv in zip(self.blocks, past):
            h, kv = block(h, emb, mask, group, kv, k if block is self.blocks[-1] else None)  # the last one's context is read by no one
            seen.append(kv)
        if chain and chain.keep and chain.context.shape[1]:
            chain.move(seen)
        shift, scale = self.ada(emb)[:, group if t is None or not chain else chain.block].chunk(2, dim=-1)
        out = self.head(modulate(h, scale, shift))  # (B, k, d)
        if p:
            out = out.view(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return out

    def place(self, position: Tensor) -> Tensor:
        """The embedding (L, D) of positions (L,)."""
        return self.places(position) if self.places else sinusoid(position, self.inp.out_features)

    def clean(self, device) -> Tensor:
        """The embedding (1, 1, D) of step 0, at which a context stands."""
        return F.silu(self.embed(torch.zeros(1, 1, dtype=torch.long, device=device), None))

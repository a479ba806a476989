"""StefaLand: a masked autoencoder of the land surface, in one file.

A site is its static attributes (terrain, soil, geology, vegetation, climate), its location and its
daily weather. Groups of variables that could stand in for one another are hidden together, and the
network reconstructs them (Kraabel et al., arXiv 2509.17942; "A.n" below are its sections).

    embed -> encoder -> project        = encode(), what downstream heads read beside embed()
          -> LSTM -> readouts          = decode(), what pretraining scores

Axes: B sites in a batch, T days, C dynamic variables, S static attributes, D width. NaN = missing.
"""

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Everything that fixes the network's shape and its masking; stored with every checkpoint."""
    dynamic_names: tuple = ()      # C daily variables, in the order of the last axis of `forcing`
    static_names: tuple = ()       # S attributes, in the order of the last axis of `static`
    dynamic_groups: tuple = ()     # group of each daily variable; empty: every variable by itself
    static_groups: tuple = ()      # likewise; the group NEVER_HIDDEN is always shown
    d_model: int = 64              # width D
    n_heads: int = 2               # of width 32: on a CPU faster than narrower heads
    n_layers: int = 2
    d_ff: int = 128                # hidden width of the feed-forward blocks
    d_hidden: int = 64             # hidden width of each variable's own two-layer map
    dropout: float = 0.1           # on residual branches and decoder, not on attention
    max_days: int = 365            # longest window (one more position: the static token)
    degree: int = 6                # highest degree of the spherical harmonics
    windows: int = 3               # hidden windows per sample, each with its own draw of groups
    window_days: tuple = (30, 90)  # their length is uniform in this range (A.2)
    p_dynamic: float = 0.5         # chance that a window hides a given dynamic group
    p_always: float = 0.1          # chance that a dynamic group is hidden over the whole sample
    p_static: float = 0.3          # chance that a static group is hidden
    p_location: float = 0.6        # chance that the location is hidden


PRESETS = {"small": {}, "paper": dict(d_model=256, n_heads=4, n_layers=4, d_ff=512)}
NEVER_HIDDEN = "context"


# What is hidden of a batch: bool (B, T, C), (B, S) and (B,), True = hidden; False alone = nothing.
Masks = namedtuple("Masks", "dynamic static location", defaults=(False, False, False))


class StefaLand(nn.Module):
    """The masked autoencoder. forward() scores hidden entries; read() serves downstream heads."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        d, n_dynamic, n_static = c.d_model, len(c.dynamic_names), len(c.static_names)
        self.dynamic_embedding = VariableEmbedding(n_dynamic, d, c.d_hidden)
        self.static_embedding = VariableEmbedding(n_static, d, c.d_hidden)
        self.location = LocationEncoding(c.degree, d)
        self.season = nn.Linear(2, d, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(c.max_days + 1, d))
        self.dropout = Dropout(c.dropout)
        self.encoder = nn.Sequential(*[EncoderLayer(c) for _ in range(c.n_layers)])
        self.project = nn.Linear(d, d)
        self.decoder = nn.LSTM(d, d // 2, batch_first=True, bidirectional=True)
        self.dynamic_projection = VariableProjection(n_dynamic, d, c.d_hidden)
        self.static_projection = VariableProjection(n_static, d, c.d_hidden)

    def embed(self, forcing, static, latlon=None, day_of_year=None, hidden=Masks()):
        """T day tokens and, last, the static token with the location: (B, T+1, D) (A.1, A.3)."""
        (_, T, C), (_, S), c = forcing.shape, static.shape, self.config
        if (C, S) != (len(c.dynamic_names), len(c.static_names)) or T > c.max_days:
            raise ValueError(f"{T} days of {C} and {S} variables, not at most {c.max_days} of "
                             f"{c.dynamic_names}, {c.static_names}")
        days = self.dynamic_embedding(forcing, hidden.dynamic)                  # (B, T, D)
        if day_of_year is not None:
            angle = day_of_year * (2 * math.pi / 365.25)                        # (B, T)
            days = days + self.season(torch.stack([angle.sin(), angle.cos()], -1))
        if latlon is None:
            latlon = static.new_full((len(static), 2), math.nan)
        site = self.static_embedding(static, hidden.static)                     # (B, D)
        site = site + self.location(latlon, hidden.location)
        tokens = torch.cat([days, site[:, None].to(days.dtype)], 1)             # (B, T+1, D)
        # under autocast all stays in bfloat16, residual path and norms too: half the memory traffic
        return self.dropout(tokens + self.position[:tokens.shape[1]].to(days.dtype))

    def encode(self, forcing, static, latlon=None, day_of_year=None, hidden=Masks()):
        """Embedding of each day and, last, of the site: (B, T, C), (B, S) -> (B, T+1, D) (A.4).
        Inputs are standardised, NaN = missing; latlon (B, 2) in degrees, day_of_year (B, T) from 1;
        None = not given. ValueError on a wrong number of variables or too long a window."""
        return self.infer(self.embed(forcing, static, latlon, day_of_year, hidden))

    def infer(self, x):
        """The encoder's layers, where tokens learn from each other: (B, T+1, D) -> (B, T+1, D)."""
        return self.project(self.dropout(self.encoder(x)))

    def read(self, *inputs):
        """E, for downstream heads: the tokens before the layers and after, (B, T+1, 2 D)."""
        tokens = self.embed(*inputs)
        return torch.cat([tokens, self.infer(tokens)], -1)

    def decode(self, encoded):
        """Reconstruct all variables from the embedding: (B, T+1, D) -> (B, T, C), (B, S) (A.5)."""
        x, _ = self.decoder(encoded)                                            # (B, T+1, D)
        x = self.dropout(x)
        return self.dynamic_projection(x)[:, :-1], self.static_projection(x[:, -1:])[:, 0]

    def forward(self, forcing, static, latlon, day_of_year, hidden):
        """Squared error summed over entries that are hidden *and observed*, and their number.
        Two tensors (2,): dynamic and static. masked_loss() makes the objective of them."""
        guesses = self.decode(self.encode(forcing, static, latlon, day_of_year, hidden))
        errors, counts = zip(*map(squared_error, guesses, (forcing, static), hidden[:2]))
        return torch.stack(errors), torch.stack(counts)

    def draw_masks(self, B, T, generator=None):
        """Hide whole groups (CVGM, A.2): inside random windows, or over the whole sample."""
        c, device = self.config, self.position.device
        uniform = partial(torch.rand, generator=generator, device=device)       # in [0, 1)
        low, high = min(c.window_days[0], T), min(c.window_days[1], T)
        length = low + (uniform(B, c.windows) * (high - low + 1)).long()        # (B, windows)
        start = (uniform(B, c.windows) * (T - length + 1)).long()               # (B, windows)
        day = torch.arange(T, device=device)[:, None]                           # (T, 1)
        inside = (day >= start[:, None]) & (day < (start + length)[:, None])    # (B, T, windows)
        groups = c.dynamic_groups or c.dynamic_names
        drawn = draw_groups(groups, c.p_dynamic, uniform, B, c.windows)         # (B, windows, C)
        in_a_window = (inside[..., None] & drawn[:, None]).any(2)               # (B, T, C)
        always = draw_groups(groups, c.p_always, uniform, B, 1)                 # (B, 1, C)
        static = draw_groups(c.static_groups or c.static_names, c.p_static, uniform, B)     # (B, S)
        return Masks(in_a_window | always, static, uniform(B) < c.p_location)


def draw_groups(groups, chance, uniform, *shape):
    """Each group falls with this chance, all its variables together: bool (*shape, V)."""
    names = list(dict.fromkeys(groups))
    fallen = uniform(*shape, len(names)) < chance                               # (*shape, groups)
    if NEVER_HIDDEN in names:
        fallen[..., names.index(NEVER_HIDDEN)] = False
    return fallen[..., [names.index(group) for group in groups]]                # (*shape, V)


def squared_error(guess, truth, hidden):
    """Sum over the entries hidden and observed, in float32 also under autocast; their number."""
    scored = hidden & ~truth.isnan()
    return ((guess.float() - truth.nan_to_num()) * scored).square().sum(), scored.sum()


def masked_loss(errors, counts):
    """The objective from forward()'s sums: dynamic mean squared error + 0.5 x static (A.5)."""
    if not counts.any():
        raise ValueError("no entry of the batch is both hidden and observed: nothing to learn from")
    dynamic, static = errors / counts.clamp(min=1)
    return dynamic + 0.5 * static


class VariableEmbedding(nn.Module):
    """One two-layer map per variable, summed (A.1): (..., V) values -> (..., D) token.
    token = sum over variables v of   w2_v gelu(x_v w1_v + b1_v) + b2_v   where v is seen,
                                      mask_vector_v                       where it is hidden."""

    def __init__(self, n_variables, d_model, d_hidden):
        super().__init__()
        fan_in = max(n_variables, 1) * d_hidden
        self.w1 = nn.Parameter(torch.randn(n_variables, d_hidden))
        self.b1 = nn.Parameter(torch.randn(n_variables, d_hidden))
        self.w2 = nn.Parameter(fan_in ** -0.5 * torch.randn(d_model, n_variables * d_hidden))
        self.b2 = nn.Parameter(torch.zeros(n_variables, d_model))
        self.mask_vector = nn.Parameter(0.02 * torch.randn(n_variables, d_model))

    def forward(self, x, hide=False):
        """Entries that are NaN or in `hide` become the variable's learned mask vector."""
        hidden = x.isnan() | hide                                               # (..., V)
        h = F.gelu(x.masked_fill(hidden, 0)[..., None] * self.w1 + self.b1)     # (..., V, hidden)
        h = h.masked_fill(hidden[..., None], 0).flatten(-2)     # of all variables, side by side
        token = F.linear(h, self.w2, self.b2.sum(0))                            # (..., D)
        return token + hidden.to(x.dtype) @ (self.mask_vector - self.b2)


class VariableProjection(nn.Module):
    """One two-layer map per variable, back to its value (A.5): (..., D) -> (..., V)."""

    def __init__(self, n_variables, d_model, d_hidden):
        super().__init__()
        self.w1 = nn.Parameter(d_model ** -0.5 * torch.randn(n_variables * d_hidden, d_model))
        self.b1 = nn.Parameter(torch.zeros(n_variables * d_hidden))
        self.w2 = nn.Parameter(d_hidden ** -0.5 * torch.randn(n_variables, d_hidden))
        self.b2 = nn.Parameter(torch.zeros(n_variables))

    def forward(self, x):
        h = F.gelu(F.linear(x, self.w1, self.b1))                               # (..., V hidden)
        return F.linear(h, torch.block_diag(*self.w2[:, None]), self.b2)        # (..., V)


class LocationEncoding(nn.Module):
    """Where on the sphere: spherical harmonics -> small MLP, (B, 2) degrees -> (B, D)."""

    def __init__(self, degree, d_model):
        super().__init__()
        self.degree = degree
        self.nowhere = nn.Parameter(0.02 * torch.randn(d_model))
        self.mlp = nn.Sequential(nn.Linear((degree + 1) ** 2, d_model), nn.GELU(),
                                 nn.Linear(d_model, d_model))

    def forward(self, latlon, hide=False):
        """Coordinates that are NaN or in `hide` become a learned "no location" vector."""
        unknown = latlon.isnan().any(-1) | hide                                 # (B,)
        basis = spherical_harmonics(latlon.nan_to_num(), self.degree) * math.sqrt(4 * math.pi)
        return torch.where(unknown[:, None], self.nowhere, self.mlp(basis.to(latlon.dtype)))


def spherical_harmonics(latlon, degree):
    """Real orthonormal spherical harmonics of degrees 0..degree: (B, 2) -> (B, (degree+1)^2).
    In double precision, by the recurrence in degree, which is stable for normalised Legendre
    functions (Holmes and Featherstone 2002, doi 10.1007/s00190-002-0216-2)."""
    lat, lon = latlon.double().deg2rad().unbind(-1)
    basis = [None] * (degree + 1) ** 2      # degree n: sines at n^2 + n - m, cosines at n^2 + n + m
    first = torch.full_like(lat, (4 * math.pi) ** -0.5)     # Legendre function of degree m, order m
    for m in range(degree + 1):
        below, legendre = 0, first                          # of degrees n - 1 and n
        for n in range(m, degree + 1):
            basis[n * n + n - m] = math.sqrt(2) * legendre * (m * lon).sin()    # unless m = 0
            basis[n * n + n + m] = math.sqrt(2 if m else 1) * legendre * (m * lon).cos()
            a = math.sqrt((4 * (n + 1) ** 2 - 1) / ((n + 1) ** 2 - m * m))
            b = math.sqrt((n * n - m * m) / (4 * n * n - 1))
            below, legendre = legendre, a * (lat.sin() * legendre - b * below)
        first = math.sqrt((2 * m + 3) / (2 * m + 2)) * lat.cos() * first
    return torch.stack(basis, -1)                                               # (B, (degree+1)^2)


class EncoderLayer(nn.Module):
    """Post-norm Transformer layer (A.4): self-attention, add, norm; feed-forward, add, norm."""

    def __init__(self, config):
        super().__init__()
        d, self.heads = config.d_model, config.n_heads
        self.activation, self.dropout = F.gelu, Dropout(config.dropout)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ff1, self.ff2 = nn.Linear(d, config.d_ff), nn.Linear(config.d_ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.ff2(self.activation(self.ff1(x)))))

    def attention(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                    # (B, T, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, h, T, D/h)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:    # plain products are faster then
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v            # (B, h, T, D/h)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)                     # (B, h, T, D/h)
        return self.out(mixed.transpose(1, 2).flatten(2))                       # (B, T, D)


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU a 64-bit random number serves eight elements (p in steps of 1/256),
    which saves a tenth of a step."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        cut = round(256 * self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-2 ** 63, None)
        keep = torch.empty_like(x, requires_grad=False)     # bool to bfloat16 takes 7 x as long
        torch.ge(words.view(torch.uint8)[:x.numel()].view_as(x), cut, out=keep)
        return x * keep.mul_(256 / (256 - cut))

"""StefaLand: a masked autoencoder of the land surface, in one file.

A site is its static attributes (terrain, soil, geology, vegetation, climate), its location and its
daily weather. Groups of variables that could stand in for one another are hidden together, and the
network reconstructs them (Kraabel et al., arXiv 2509.17942; "A.n" below are its sections).

    embed -> encoder -> project        = encode(), what the downstream heads read
          -> LSTM -> readouts          = decode(), what pretraining scores

Axes: B sites in a batch, T days, C dynamic variables, S static attributes, D width. NaN = missing.
"""

import math
import re
from dataclasses import dataclass
from functools import partial

import numpy as np
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
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 128                # hidden width of the feed-forward blocks
    d_hidden: int = 64             # hidden width of each variable's own two-layer map
    dropout: float = 0.1           # on residual branches and decoder, not on attention
    max_days: int = 365            # longest window (one more position: the static token)
    degree: int = 6                # highest degree of the spherical harmonics; -1: no location
    season: bool = True            # add (sin, cos) of the day of year to every day's token
    windows: int = 3               # hidden windows per sample, each with its own draw of groups
    window_days: tuple = (30, 90)  # their length is uniform in this range (A.2)
    p_dynamic: float = 0.5         # chance that a window hides a given dynamic group
    p_always: float = 0.1          # chance that a dynamic group is hidden over the whole sample
    p_static: float = 0.3          # chance that a static group is hidden
    p_location: float = 0.6        # chance that the location is hidden
    # the authors' release where the paper's text differs: tokens times sqrt(D), no season, ReLU,
    # LayerNorm after the encoder and after the LSTM, which reads forward only
    release: bool = False


PRESETS = {"small": dict(d_model=64, n_heads=4, n_layers=2, d_ff=128),
           "paper": dict(d_model=256, n_heads=4, n_layers=4, d_ff=512)}
NEVER_HIDDEN = "context"


class StefaLand(nn.Module):
    """The masked autoencoder. forward() scores hidden entries; encode() serves downstream heads."""

    def __init__(self, config):
        super().__init__()
        self.config, c, d = config, config, config.d_model
        self.dynamic_names, self.static_names = tuple(c.dynamic_names), tuple(c.static_names)
        n_dynamic, n_static = len(self.dynamic_names), len(self.static_names)
        self.dynamic_embedding = VariableEmbedding(n_dynamic, d, c.d_hidden)
        self.static_embedding = VariableEmbedding(n_static, d, c.d_hidden)
        self.location = LocationEncoding(c.degree, d) if c.degree >= 0 else None
        self.season = nn.Linear(2, d, bias=False) if c.season and not c.release else None
        self.position = nn.Parameter(0.02 * torch.randn(c.max_days + 1, d))
        self.dropout = Dropout(c.dropout)
        self.encoder = nn.ModuleList([EncoderLayer(c) for _ in range(c.n_layers)])
        self.encoder_norm = nn.LayerNorm(d) if c.release else nn.Identity()
        self.project = Linear(d, d)
        self.decoder = nn.LSTM(d, d if c.release else d // 2, batch_first=True,
                               bidirectional=not c.release)
        self.decoder_norm = nn.LayerNorm(d) if c.release else nn.Identity()
        self.dynamic_projection = VariableProjection(n_dynamic, d, c.d_hidden)
        self.static_projection = VariableProjection(n_static, d, c.d_hidden)

    def embed(self, forcing, static, latlon=None, day_of_year=None, hidden=None):
        """T day tokens and, last, the static token with the location: (B, T+1, D) (A.1, A.3)."""
        self.check(forcing, static)
        hide_dynamic, hide_static, hide_location = hidden or (None, None, None)
        days = self.dynamic_embedding(forcing, hide_dynamic)                    # (B, T, D)
        site = self.static_embedding(static, hide_static)                       # (B, D)
        if self.season is not None and day_of_year is not None:
            angle = day_of_year * (2 * math.pi / 365.25)                        # (B, T)
            days = days + self.season(torch.stack([angle.sin(), angle.cos()], -1))
        if self.location is not None:
            latlon = static.new_full((len(static), 2), math.nan) if latlon is None else latlon
            site = site + self.location(latlon, hide_location)
        tokens = torch.cat([days, site[:, None].to(days.dtype)], 1)             # (B, T+1, D)
        # under autocast all stays in bfloat16, residual path and norms too: half the memory traffic
        return self.dropout(tokens + self.position[:tokens.shape[1]].to(days.dtype))

    def encode(self, forcing, static, latlon=None, day_of_year=None, hidden=None):
        """Embedding of each day and, last, of the site: (B, T, C), (B, S) -> (B, T+1, D) (A.4).

        Inputs are standardised, NaN = missing; latlon (B, 2) in degrees, day_of_year (B, T) from 1;
        None = not given. ValueError on a wrong number of variables or too long a window.
        """
        x = self.embed(forcing, static, latlon, day_of_year, hidden)
        if self.config.release:
            x = x * math.sqrt(x.shape[-1])
        for layer in self.encoder:
            x = layer(x)
        return self.project(self.dropout(self.encoder_norm(x)))                 # (B, T+1, D)

    def decode(self, encoded):
        """Reconstruct all variables from the embedding: (B, T+1, D) -> (B, T, C), (B, S) (A.5)."""
        x, _ = self.decoder(encoded)                                            # (B, T+1, D)
        x = self.dropout(self.decoder_norm(x))
        return self.dynamic_projection(x)[:, :-1], self.static_projection(x[:, -1:])[:, 0]

    def forward(self, forcing, static, latlon=None, day_of_year=None, hidden=None):
        """Squared error summed over entries that are hidden *and observed*, and their number.

        Two tensors (2,): dynamic and static. masked_loss() makes the objective of them.
        """
        hidden = hidden or self.draw_masks(*forcing.shape[:2])
        outputs = self.decode(self.encode(forcing, static, latlon, day_of_year, hidden))
        errors, counts = [], []
        for output, truth, hide in zip(outputs, (forcing, static), hidden):
            scored = hide & ~truth.isnan()
            errors.append(((output.float() - truth.nan_to_num()) * scored).square().sum())
            counts.append(scored.sum())
        return torch.stack(errors), torch.stack(counts)

    def draw_masks(self, B, T, generator=None):
        """Hide whole groups (CVGM, A.2): bool (B, T, C) dynamic, (B, S) static, (B,) location."""
        c, device = self.config, self.position.device
        uniform = partial(torch.rand, generator=generator, device=device)

        def draw(groups, chance, *shape):                   # variables of a group fall together
            names = [*dict.fromkeys(groups)]
            chances = [0.0 if name == NEVER_HIDDEN else chance for name in names]
            drawn = uniform(*shape, len(names)) < torch.tensor(chances, device=device)
            return drawn[..., [names.index(group) for group in groups]]         # (*shape, V)

        low, high = (min(days, T) for days in c.window_days)
        length = low + (uniform(B, c.windows) * (high - low + 1)).long()        # (B, windows)
        start = (uniform(B, c.windows) * (T - length + 1)).long()
        day = torch.arange(T, device=device)[:, None]
        inside = (day >= start[:, None]) & (day < (start + length)[:, None])    # (B, T, windows)
        dynamic, static = c.dynamic_groups or c.dynamic_names, c.static_groups or c.static_names
        drawn = draw(dynamic, c.p_dynamic, B, c.windows)                        # (B, windows, C)
        always = draw(dynamic, c.p_always, B, 1)                                # (B, 1, C)
        hide_dynamic = (inside.float() @ drawn.float() > 0) | always            # (B, T, C)
        return hide_dynamic, draw(static, c.p_static, B), uniform(B) < c.p_location

    @classmethod
    def from_release(cls, state, heads):
        """The authors' MFFormer_dec_LSTM from its state dict; encode() then equals theirs.

        Every key is used, one of them approximately: they index the static mask *values* by row of
        the batch, we embed their mean. ValueError lists keys left over or missing.
        """
        theirs = {}                                         # our name -> {their key: value}
        for key, value in state.items():
            name = key
            for pattern, ours in RELEASE.items():
                name = re.sub(pattern, ours, name)
            theirs.setdefault(name, {})[key] = torch.as_tensor(value)
        values = {name: torch.cat([*parts.values()], dim=int(name.endswith("embedding.w2")))
                  for name, parts in theirs.items()}
        names = [tuple(key.split(".")[2] for key in theirs[kind + "_embedding.w1"])
                 for kind in ("dynamic", "static")]
        positions, d = values["position"].shape
        model = cls(Config(
            *names, d_model=d, d_ff=len(values["encoder.0.ff1.bias"]), n_heads=heads,
            n_layers=sum(name.endswith("qkv.bias") for name in values), max_days=positions - 1,
            degree=-1, release=True))
        own = model.state_dict()                            # the tensors themselves, by name
        missing = sorted(own.keys() - values.keys())
        left_over = [key for name in theirs.keys() - own.keys() for key in theirs[name]]
        if missing or left_over:
            raise ValueError(f"release state: missing {missing}, not understood {left_over}")
        mean = values.pop("static_embedding.mask_vector").mean(0)               # (S,)
        for name, value in values.items():
            own[name].copy_(value.reshape(own[name].shape))
        # the tokens of the means: each attribute by itself, the others hidden by zeros
        embedding, others = model.static_embedding, ~torch.eye(len(mean), dtype=torch.bool)
        embedding.mask_vector.data.zero_()
        embedding.mask_vector.data = embedding(mean.expand(others.shape), others).detach()
        return model

    def check(self, forcing, static):
        """ValueError on inputs the network has no place for."""
        c, (B, T, C), (sites, S) = self.config, forcing.shape, static.shape
        for wrong, complaint in (
                (C != len(self.dynamic_names), f"{C} dynamic variables, not {self.dynamic_names}"),
                (S != len(self.static_names), f"{S} static variables, not {self.static_names}"),
                (T > c.max_days, f"a window of {T} days, positions end at {c.max_days}"),
                (B != sites, f"forcing of {B} sites, static attributes of {sites}"),
                (forcing.isnan().all() and static.isnan().all(), "every value is missing (NaN)")):
            if wrong:
                raise ValueError(complaint)


RELEASE = {  # part of a parameter's name in the authors' release (regular expression) -> ours
    r"embeddings(\d)\.[^.]+\.(w|b)\w+": r"\2\1",           # of one variable; ours of all, joined
    "numerical_": "", "time_series": "dynamic", "masked_values": "mask_vector",
    "positional_encoding.position_embedding": "position", "enc_2_dec_embedding": "project",
    "transformer_encoder.layers.": "", "self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out",
    "linear": "ff"}


class VariableEmbedding(nn.Module):
    """One two-layer map per variable, summed (A.1): (..., V) values -> (..., D) token."""

    def __init__(self, n_variables, d_model, d_hidden):
        super().__init__()
        fan_in = max(n_variables, 1) * d_hidden
        self.w1 = nn.Parameter(torch.randn(n_variables, d_hidden))
        self.b1 = nn.Parameter(torch.randn(n_variables, d_hidden))
        self.w2 = nn.Parameter(fan_in ** -0.5 * torch.randn(d_model, n_variables * d_hidden))
        self.b2 = nn.Parameter(torch.zeros(n_variables, d_model))
        self.mask_vector = nn.Parameter(0.02 * torch.randn(n_variables, d_model))

    def forward(self, x, hide=None):
        """Entries that are NaN or in `hide` become the variable's learned mask vector."""
        seen = ~x.isnan() if hide is None else ~(x.isnan() | hide)              # (..., V)
        seen = seen.to(x.dtype)
        h = F.gelu(x.nan_to_num()[..., None] * self.w1 + self.b1)               # (..., V, hidden)
        h = (h * seen[..., None]).flatten(-2)                                   # (..., V hidden)
        # side by side, zeroed where hidden, one product: the sum of V separate second layers
        return linear(h, self.w2, self.mask_vector.sum(0)) + seen @ (self.b2 - self.mask_vector)


class VariableProjection(nn.Module):
    """One two-layer map per variable, back to its value (A.5): (..., D) -> (..., V)."""

    def __init__(self, n_variables, d_model, d_hidden):
        super().__init__()
        self.w1 = nn.Parameter(d_model ** -0.5 * torch.randn(n_variables * d_hidden, d_model))
        self.b1 = nn.Parameter(torch.zeros(n_variables * d_hidden))
        self.w2 = nn.Parameter(d_hidden ** -0.5 * torch.randn(n_variables, d_hidden))
        self.b2 = nn.Parameter(torch.zeros(n_variables))

    def forward(self, x):
        h = F.gelu(linear(x, self.w1, self.b1))                                 # (..., V hidden)
        return linear(h, torch.block_diag(*self.w2[:, None]), self.b2)          # (..., V)


class LocationEncoding(nn.Module):
    """Where on the sphere: spherical harmonics -> small MLP, (B, 2) degrees -> (B, D)."""

    def __init__(self, degree, d_model):
        super().__init__()
        self.degree, self.nowhere = degree, nn.Parameter(0.02 * torch.randn(d_model))
        self.mlp = nn.Sequential(nn.Linear((degree + 1) ** 2, d_model), nn.GELU(),
                                 nn.Linear(d_model, d_model))

    def forward(self, latlon, hide=None):
        """Coordinates that are NaN or in `hide` become a learned "no location" vector."""
        unknown = latlon.isnan().any(-1)                                        # (B,)
        unknown = unknown if hide is None else unknown | hide
        basis = spherical_harmonics(latlon.nan_to_num(), self.degree) * math.sqrt(4 * math.pi)
        return torch.where(unknown[:, None], self.nowhere, self.mlp(basis.to(latlon.dtype)))


def spherical_harmonics(latlon, degree):
    """Real orthonormal spherical harmonics of degrees 0..degree: (B, 2) -> (B, (degree+1)^2).

    In double precision, by the recurrence in degree, which is stable for normalised Legendre
    functions (Holmes and Featherstone 2002, doi 10.1007/s00190-002-0216-2).
    """
    lat, lon = latlon.double().deg2rad().unbind(-1)
    basis = [None] * (degree + 1) ** 2      # degree n: sines at n^2 + n - m, cosines at n^2 + n + m
    first = torch.full_like(lat, (4 * math.pi) ** -0.5)     # Legendre function of degree m, order m
    for m in range(degree + 1):
        below, legendre = 0, first                          # of degrees n - 1 and n
        for n in range(m, degree + 1):
            basis[n * n + n - m] = math.sqrt(2) * legendre * (m * lon).sin()
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
        d, self.heads, self.dropout = config.d_model, config.n_heads, Dropout(config.dropout)
        self.activation = F.relu if config.release else F.gelu
        self.qkv, self.out = Linear(d, 3 * d), Linear(d, d)
        self.ff1, self.ff2 = Linear(d, config.d_ff), Linear(config.d_ff, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.ff2(self.activation(self.ff1(x)))))

    def attention(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                    # (B, T, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, h, T, D/h)
        if q.device.type == "cpu" and q.shape[-1] >= 32:    # plain products are faster there
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)                     # (B, h, T, D/h)
        return self.out(mixed.transpose(1, 2).flatten(2))                       # (B, T, D)


class Linear(nn.Linear):
    """nn.Linear by way of linear() below."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias):
    """F.linear; (B, T, in) on the CPU as a 1x1 convolution, whose kernels are up to 1.9x faster."""
    if x.device.type != "cpu" or x.dim() != 3:
        return F.linear(x, weight, bias)
    x = x.transpose(1, 2).unsqueeze(2)                                          # (B, in, 1, T)
    return F.conv2d(x, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)   # (B, T, out)


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU a 64-bit random number serves eight elements (p in steps of 1/256)."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        cut = round(256 * self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-2 ** 63, None)
        keep = (words.view(torch.uint8)[:x.numel()] >= cut).view_as(x)
        return x * keep.to(x.dtype).mul_(256 / (256 - cut))


def masked_loss(errors, counts):
    """The objective from forward()'s sums: dynamic mean squared error + 0.5 x static (A.5)."""
    if not counts.any():
        raise ValueError("no entry of the batch is both hidden and observed: nothing to learn from")
    dynamic, static = errors / counts.clamp(min=1)
    return dynamic + 0.5 * static


class DynamicWorld(nn.Module):
    """Land cover from Sentinel-2 (Brown et al. 2022, doi 10.1038/s41597-022-01307-4)."""

    def __init__(self, in_channels=9, out_channels=9):
        super().__init__()
        self.stem = unit(in_channels, 64, 3)
        self.side = nn.Sequential(unit(64, 48, 1), unit(48, 48, 3, groups=48))
        self.blocks = nn.ModuleList([Block(64, 96), Block(96, 144), Block(192, 144)])
        self.output = nn.Conv2d(144, out_channels, 1)

    def forward(self, x):
        """(B, 9, H, W) as from data.normalize_s2 -> logits of data.LAND_COVER, as large."""
        H, W = x.shape[-2:]
        half = F.interpolate(self.stem(x), (H // 2, W // 2), mode="bilinear", antialias=True)
        x = torch.cat([self.blocks[1](self.blocks[0](half)), self.side(half)], 1)   # (B, 192, ..)
        x = F.interpolate(self.blocks[2](x), (H, W), mode="bilinear")           # (B, 144, H, W)
        return self.output(F.normalize(x, dim=1))

    @classmethod
    def from_release(cls, path):
        """Google's released network from its folder with variables/…, else ValueError."""
        model = cls().eval()
        layers = [model.stem]                               # in the order of the file
        for block in model.blocks:
            side = [*model.side] if block is model.blocks[1] else []
            (conv, norm, _), (shortcut, shortcut_norm, _) = block.path[5], block.shortcut
            pair = [conv, shortcut, norm, shortcut_norm]
            layers += [block.path[:5], *side[:1], *pair, *side[1:]]
        tensors = nn.Sequential(*layers, model.output).state_dict().values()
        tensors = [tensor for tensor in tensors if tensor.dim()]    # without batch norm's counters
        sizes = [tensor.numel() for tensor in tensors]
        file = f"{path}/variables/variables.data-00000-of-00001"
        values = torch.from_numpy(np.fromfile(file, "<f4", sum(sizes)))         # more follows
        if len(values) != sum(sizes):
            raise ValueError(f"{file}: {len(values)} values, expected {sum(sizes)}")
        for tensor, part in zip(tensors, values.split(sizes)):
            if tensor.dim() == 4:                           # kernels are stored kh, kw, in, out
                tensor = tensor.permute(2, 3, 1, 0)
            tensor.copy_(part.view(tensor.shape))
        return model


class Block(nn.Module):
    """Residual block: [1x1 unit, depthwise 3x3 unit] three times, plus a 1x1 unit on the input."""

    def __init__(self, channels, width):
        super().__init__()
        self.path = nn.Sequential(
            unit(channels, width, 1), unit(width, width, 3, groups=width),
            unit(width, width, 1), unit(width, width, 3, groups=width),
            unit(width, width, 1), unit(width, width, 3, groups=width))
        self.shortcut = unit(channels, width, 1)

    def forward(self, x):
        return self.path(x) + self.shortcut(x)


def unit(channels, width, size, groups=1):
    """Convolution -> batch norm -> Mish, height and width kept; depthwise with groups = width."""
    conv = nn.Conv2d(channels, width, size, padding=size // 2, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(width, eps=1e-3), nn.Mish())


class UNet(nn.Module):
    """U-Net, or U-Net++ (nested; arXiv 1807.10165): (B, in, H, W) -> (B, out, H, W).

    Node i, j = conv(cat(nodes i, 0 .. j-1, node i+1, j-1 twice as large)); U-Net has only those
    with j = 0, on the way down, and with i + j = depth - 1, on the way up.
    """

    def __init__(self, in_channels, out_channels, nested=False, width=32, depth=4):
        super().__init__()
        c, self.depth, self.nodes = [width * 2 ** i for i in range(depth)], depth, nn.ModuleDict()
        for i, j in [(i, j) for j in range(depth) for i in range(depth - j)
                     if nested or j == 0 or i + j == depth - 1]:
            if j == 0:
                channels = c[i - 1] if i else in_channels
            else:
                channels = (j if nested else 1) * c[i] + c[i + 1]
            self.nodes[f"{i} {j}"] = nn.Sequential(
                nn.Conv2d(channels, c[i], 3, padding=1), nn.GroupNorm(8, c[i]), nn.GELU(),
                nn.Conv2d(c[i], c[i], 3, padding=1), nn.GroupNorm(8, c[i]), nn.GELU())
        self.output = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        """ValueError unless height and width are multiples of 2^(depth - 1)."""
        stride, done, (H, W) = 2 ** (self.depth - 1), {}, x.shape[-2:]
        if H % stride or W % stride:
            raise ValueError(f"an image of {H} x {W}, not multiples of {stride}")
        for key, node in self.nodes.items():                # j by j, from the finest i down
            i, j = map(int, key.split())
            if j:
                below = F.interpolate(done[i + 1, j - 1], scale_factor=2, mode="bilinear")
                x = torch.cat([done[i, k] for k in range(j) if (i, k) in done] + [below], 1)
            elif i:
                x = F.max_pool2d(done[i - 1, 0], 2)
            done[i, j] = node(x)
        return self.output(done[0, self.depth - 1])

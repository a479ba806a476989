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
from pathlib import Path

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
    # in these the authors' release differs from the paper's text (StefaLand.from_release)
    activation: str = "gelu"
    scale_tokens: bool = False     # tokens times sqrt(D) before the encoder
    extra_norms: bool = False      # LayerNorm after the encoder and after the LSTM
    bidirectional: bool = True     # the decoder's LSTM reads both ways


PRESETS = {"small": dict(d_model=64, n_heads=4, n_layers=2, d_ff=128),
           "paper": dict(d_model=256, n_heads=4, n_layers=4, d_ff=512)}
NEVER_HIDDEN = "context"
RELEASE = {  # parameter of the authors' release (regular expression) -> ours
    r"time_series_(embedding|projection)\.embeddings(\d)\.[^.]+\.(w|b)\w+": r"dynamic_\1.\3\2",
    r"static_(embedding|projection)\.numerical_embeddings(\d)\.[^.]+\.(w|b)\w+": r"static_\1.\3\2",
    r"time_series_embedding\.masked_values": "dynamic_embedding.mask_vector",
    r"static_embedding\.masked_values": "static_embedding.mask_vector",
    r"positional_encoding\.position_embedding": "position",
    r"encoder\..*layers\.(\d+)\.self_attn\.in_proj_(\w+)": r"encoder.\1.qkv.\2",
    r"encoder\..*layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"encoder.\1.out.\2",
    r"encoder\..*layers\.(\d+)\.(linear|norm)(\d)\.(\w+)": r"encoder.\1.\2\3.\4",
    r"enc_2_dec_embedding\.(\w+)": r"project.\1",
    r"(encoder_norm|decoder|decoder_norm)\.(\w+)": r"\1.\2",
}


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
        self.season = nn.Linear(2, d, bias=False) if c.season else None
        self.position = nn.Parameter(0.02 * torch.randn(c.max_days + 1, d))
        self.dropout = Dropout(c.dropout)
        self.encoder = nn.ModuleList([EncoderLayer(c) for _ in range(c.n_layers)])
        self.encoder_norm = nn.LayerNorm(d) if c.extra_norms else nn.Identity()
        self.project = Linear(d, d)
        self.decoder = nn.LSTM(d, d // (1 + c.bidirectional), batch_first=True,
                               bidirectional=c.bidirectional)
        self.decoder_norm = nn.LayerNorm(d) if c.extra_norms else nn.Identity()
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
        tokens = torch.cat([days, site[:, None]], 1)                            # (B, T+1, D)
        return self.dropout(tokens + self.position[:tokens.shape[1]])

    def encode(self, forcing, static, latlon=None, day_of_year=None, hidden=None):
        """Embedding of each day and, last, of the site: (B, T, C), (B, S) -> (B, T+1, D) (A.4).

        Inputs are standardised, NaN = missing; latlon (B, 2) in degrees, day_of_year (B, T) from 1;
        None = not given. ValueError on a wrong number of variables or too long a window.
        """
        x = self.embed(forcing, static, latlon, day_of_year, hidden)
        if self.config.scale_tokens:
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

        def one_hot(groups):                                # (groups, variables), context left out
            order = [*dict.fromkeys(groups)]
            return torch.tensor([[g == row != NEVER_HIDDEN for g in groups] for row in order],
                                dtype=torch.float, device=device).view(len(order), len(groups))

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, device=device)

        low, high = (min(days, T) for days in c.window_days)
        length = low + (uniform(B, c.windows) * (high - low + 1)).long()        # (B, windows)
        start = (uniform(B, c.windows) * (T - length + 1)).long()
        day = torch.arange(T, device=device)[:, None]
        inside = (day >= start[:, None]) & (day < (start + length)[:, None])    # (B, T, windows)
        dynamic = one_hot(c.dynamic_groups or c.dynamic_names)
        static = one_hot(c.static_groups or c.static_names)
        drawn = uniform(B, c.windows, len(dynamic)) < c.p_dynamic           # (B, windows, groups)
        always = uniform(B, 1, len(dynamic)) < c.p_always                   # (B, 1, groups)
        hide_dynamic = (inside.float() @ drawn.float() + always) @ dynamic > 0  # (B, T, C)
        hide_static = (uniform(B, len(static)) < c.p_static).float() @ static > 0
        return hide_dynamic, hide_static, uniform(B) < c.p_location

    @classmethod
    def from_release(cls, state, heads):
        """The authors' MFFormer_dec_LSTM from its state dict; encode() then equals theirs.

        Every key is used, one of them approximately: they index the static mask *values* by row of
        the batch, we embed their mean. ValueError lists keys left over or missing.
        """
        theirs = {}                                         # our name -> {their key: value}
        for key, value in state.items():
            ours = [re.sub(pattern, name, key) for pattern, name in RELEASE.items()
                    if re.fullmatch(pattern, key)] or ["not understood"]
            theirs.setdefault(ours[0].replace("linear", "ff"), {})[key] = torch.as_tensor(value)
        left_over = [*theirs.pop("not understood", ())]
        values = {name: torch.cat([*parts.values()], dim=int(name.endswith("embedding.w2")))
                  for name, parts in theirs.items()}
        names = [tuple(key.split(".")[-2] for key in theirs[kind + "_embedding.w1"])
                 for kind in ("dynamic", "static")]
        positions, d = values["position"].shape
        model = cls(Config(
            *names, d_model=d, d_ff=len(values["encoder.0.ff1.bias"]), n_heads=heads,
            n_layers=sum(name.endswith("qkv.bias") for name in values), max_days=positions - 1,
            degree=-1, season=False, activation="relu", scale_tokens=True, extra_norms=True,
            bidirectional=False))
        own = model.state_dict()
        missing = sorted(own.keys() - values.keys())
        if missing or left_over:
            raise ValueError(f"release state: missing {missing}, not understood {left_over}")
        mean = values.pop("static_embedding.mask_vector").mean(0)               # (S,)
        own.update({name: value.reshape(own[name].shape) for name, value in values.items()})
        model.load_state_dict(own)
        e = model.static_embedding
        h = F.gelu(mean[:, None] * e.w1 + e.b1)                                 # (S, hidden)
        e.mask_vector.data = torch.einsum("sh,dsh->sd", h, e.w2.unflatten(1, h.shape)) + e.b2
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
        return h @ torch.block_diag(*self.w2[:, None]).T + self.b2              # (..., V)


class LocationEncoding(nn.Module):
    """Where on the sphere: spherical harmonics -> small MLP, (B, 2) degrees -> (B, D).

    NaN coordinates, and those in `hide`, become a learned "no location" vector.
    """

    def __init__(self, degree, d_model):
        super().__init__()
        self.degree, self.nowhere = degree, nn.Parameter(0.02 * torch.randn(d_model))
        self.mlp = nn.Sequential(nn.Linear((degree + 1) ** 2, d_model), nn.GELU(),
                                 nn.Linear(d_model, d_model))

    def forward(self, latlon, hide=None):
        unknown = latlon.isnan().any(-1)
        unknown = unknown if hide is None else unknown | hide
        basis = spherical_harmonics(latlon.nan_to_num(), self.degree) * math.sqrt(4 * math.pi)
        return torch.where(unknown[:, None], self.nowhere, self.mlp(basis.to(latlon.dtype)))


def spherical_harmonics(latlon, degree):
    """Real orthonormal spherical harmonics of degrees 0..degree: (B, 2) -> (B, (degree+1)^2).

    The normalised Legendre functions come from the recurrence in degree that is stable (Holmes and
    Featherstone 2002, doi 10.1007/s00190-002-0216-2), in double precision.
    """
    lat, lon = latlon.double().deg2rad().unbind(-1)
    z, r = lat.sin(), lat.cos()
    legendre = {(0, 0): torch.full_like(z, (4 * math.pi) ** -0.5)}
    for m in range(degree + 1):
        if m > 0:
            legendre[m, m] = math.sqrt((2 * m + 1) / (2 * m)) * r * legendre[m - 1, m - 1]
        for n in range(m + 1, degree + 1):
            a = math.sqrt((4 * n * n - 1) / (n * n - m * m))
            b = math.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1))
            legendre[n, m] = a * (z * legendre[n - 1, m] - b * legendre.get((n - 2, m), 0))
    basis = []
    for n in range(degree + 1):
        basis += [math.sqrt(2) * legendre[n, m] * (m * lon).sin() for m in range(n, 0, -1)]
        basis += [legendre[n, 0]]
        basis += [math.sqrt(2) * legendre[n, m] * (m * lon).cos() for m in range(1, n + 1)]
    return torch.stack(basis, -1)                                               # (B, (degree+1)^2)


class EncoderLayer(nn.Module):
    """Post-norm Transformer layer (A.4): self-attention, add, norm; feed-forward, add, norm."""

    def __init__(self, config):
        super().__init__()
        d, self.heads, self.dropout = config.d_model, config.n_heads, Dropout(config.dropout)
        self.activation = {"gelu": F.gelu, "relu": F.relu}[config.activation]
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
    """Land cover of Sentinel-2 (doi 10.1038/s41597-022-01307-4): (B, 9, H, W) -> logits, as large.

    Input as from data.normalize_s2; classes as in data.LAND_COVER. from_release: Google's weights.
    """

    def __init__(self, in_channels=9, out_channels=9):
        super().__init__()
        self.stem = unit(in_channels, 64, 3)
        self.side = nn.Sequential(unit(64, 48, 1), unit(48, 48, 3, depthwise=True))
        self.blocks = nn.ModuleList([Block(64, 96), Block(96, 144), Block(192, 144)])
        self.output = nn.Conv2d(144, out_channels, 1)

    def forward(self, x):
        H, W = x.shape[-2:]
        half = F.interpolate(self.stem(x), (H // 2, W // 2), mode="bilinear", antialias=True)
        x = torch.cat([self.blocks[1](self.blocks[0](half)), self.side(half)], 1)
        x = F.interpolate(self.blocks[2](x), (H, W), mode="bilinear")           # (B, 144, H, W)
        return self.output(F.normalize(x, dim=1))

    @classmethod
    def from_release(cls, path):
        """The released network from its folder, which holds variables/variables.data-…, float32.

        Layers are stored in the order below; kernels (kh, kw, in, out), depthwise (kh, kw, C, 1).
        """
        model = cls().eval()
        first, second, third = model.blocks
        layers = [
            *model.stem, *first.units(5), *first.last_pair(), *second.units(5), *model.side[0],
            *second.last_pair(), *model.side[1], *third.units(5), *third.last_pair(), model.output]
        values = np.fromfile(Path(path, "variables/variables.data-00000-of-00001"), "<f4")
        for layer in layers:
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(layer, name, None)
                if tensor is not None:
                    part, values = np.split(values, [tensor.numel()])
                    if tensor.dim() == 4:
                        out, into, *size = tensor.shape
                        order = (2, 3, 0, 1) if into == 1 else (3, 2, 0, 1)
                        shape = (*size, out, into) if into == 1 else (*size, into, out)
                        part = part.reshape(shape).transpose(order)
                    tensor.data.copy_(torch.from_numpy(part.copy()))
        return model


class Block(nn.Module):
    """Residual block: [1x1 unit, depthwise 3x3 unit] three times, plus a 1x1 unit on the input."""

    def __init__(self, channels, width):
        super().__init__()
        self.path = nn.Sequential(*(part for i in range(3) for part in (
            unit(width if i else channels, width, 1), unit(width, width, 3, depthwise=True))))
        self.shortcut = unit(channels, width, 1)

    def forward(self, x):
        return self.path(x) + self.shortcut(x)

    def units(self, n):
        """The layers of the first n units of the path."""
        return [layer for part in self.path[:n] for layer in part]

    def last_pair(self):
        """The layers of its last unit and of the shortcut, interleaved as the release has them."""
        return [layer for pair in zip(self.path[5], self.shortcut) for layer in pair]


def unit(channels, width, size, depthwise=False):
    """Convolution -> batch norm -> Mish, height and width kept."""
    groups = channels if depthwise else 1
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
        for j in range(depth):
            for i in range(depth - j):
                skips = j if nested else 1
                channels = skips * c[i] + c[i + 1] if j else c[i - 1] if i else in_channels
                if j == 0 or nested or i + j == depth - 1:
                    self.nodes[f"{i} {j}"] = nn.Sequential(*(
                        part for n in (channels, c[i]) for part in (
                            nn.Conv2d(n, c[i], 3, padding=1), nn.GroupNorm(8, c[i]), nn.GELU())))
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

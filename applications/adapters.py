"""Other adapters than the plain residual one: what is done to x = E + r before the head reads it.

    python train.py && python -m applications.adapters                      the synthetic world
    python -m applications.adapters --data caravan:DIR --model resconn,resconn-gated --fold all

Most add a small network of x to x: x + adapter(x). resconn-all has none, but its residual path
reads the attributes beside the weather; so does resconn-tenth, in which E begins at a tenth.
resconn-narrow lets eight numbers of the site through, resconn-noise disturbs them; resconn-authors
is the adapter of the authors' code. Their head is an LSTM: for tasks with a daily series.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn

import finetune
from applications import common


class AdaptedHead(nn.Module):
    """An adapter before the LSTM: (L, B, width) -> (L, B)."""

    def __init__(self, adapter, width, dropout, shapes):
        super().__init__()
        self.adapter = adapter(width)
        self.head = finetune.LSTMHead(width, dropout, shapes)

    def forward(self, x, extra):
        return self.head(x + self.adapter(x), extra)                            # (L, B)


def feedforward(d):
    return nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))


def bottleneck(d):
    return nn.Sequential(nn.Linear(d, d // 8), nn.GELU(), nn.Linear(d // 8, d))


def gated(d):
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GLU())


class Experts(nn.Module):
    """Mixture of linear experts, softly gated: (L, B, d) -> (L, B, d)."""

    def __init__(self, d, n=4):
        super().__init__()
        self.gate, self.experts = nn.Linear(d, n), nn.Linear(d, n * d)

    def forward(self, x):
        weight = self.gate(x).softmax(-1)                                       # (L, B, n)
        answers = self.experts(x).unflatten(-1, (-1, x.shape[-1]))              # (L, B, n, d)
        return (answers * weight[..., None]).sum(-2)                            # (L, B, d)


ADAPTERS = {"feedforward": feedforward, "bottleneck": bottleneck, "gated": gated,
            "experts": Experts}
for name, adapter in ADAPTERS.items():
    finetune.VARIANTS[f"resconn-{name}"] = finetune.Variant(
        head=partial(AdaptedHead, adapter), needs=finetune.LSTMHead)


class TenthPredictor(finetune.Predictor):
    """At first nearly the LSTM on weather and attributes: E begins at a tenth of its size."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        nn.init.constant_(self.gain, 0.1)


class NarrowPredictor(finetune.Predictor):
    """The token of the site has to pass through eight numbers."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        for k in range(1, len(self.norms), 2):
            d, = self.norms[k].normalized_shape
            self.norms[k] = nn.Sequential(self.norms[k], nn.Linear(d, 8), nn.Linear(8, d))


class Noise(nn.Module):
    """Adds normal noise of half a deviation to the (1, B, D) token of a site, in training."""

    def forward(self, x):
        return x + 0.5 * torch.randn_like(x) if self.training else x


class NoisyPredictor(finetune.Predictor):
    """A site is never twice the same, so it cannot be known by its token alone."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        for k in range(1, len(self.norms), 2):
            self.norms[k] = nn.Sequential(self.norms[k], Noise())


class AuthorsPredictor(finetune.Predictor):
    """The dual residual adapter and residual LSTM of the authors' code (StefaLandRelease): weather
    and attributes join E, which begins at a tenth, before the LSTM, at its input, at its output."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        width, n_weather = settings["width"], len(settings["forcing_names"])
        n_static = 2 * len(settings["static_names"])
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.weather = nn.Sequential(nn.Linear(n_weather, width), nn.ReLU(), nn.Dropout(0.1))
        self.attributes = nn.Sequential(nn.Linear(n_static, width), nn.ReLU(), nn.Dropout(0.1))
        self.joint = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.ReLU(), nn.Dropout(0.2),
                                   nn.Linear(2 * width, width))
        self.joint_norm, self.sum_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.enter = nn.Linear(width + n_weather + n_static, width)
        self.leave = nn.Linear(width + n_weather + n_static, width)

    def forward(self, e, forcing, static, extra):
        """As Predictor.forward: (B, L+1, D), (B, L, C), (B, S) -> (B, L)."""
        x = forcing.transpose(0, 1).nan_to_num()                                # (L, B, C)
        s = finetune.fill_and_flag(static).expand(len(x), -1, -1)               # (L, B, 2 S)
        e = e.transpose(0, 1).chunk(self.levels, -1)[-1]                        # (L+1, B, D)
        e = self.scale * self.expand(self.norms[0](e[:-1] + e[-1:]))            # (L, B, width)
        u, v = self.weather(x), self.attributes(s)
        z = self.joint_norm(e + self.joint(torch.cat([e, u, v], -1)))
        z = self.sum_norm(z + u + v)
        h, _ = self.head.lstm(self.enter(torch.cat([z, x, s], -1)))
        h = h + self.leave(torch.cat([h, x, s], -1))                            # (L, B, width)
        with torch.autocast(h.device.type, enabled=False):
            return self.head.output(h.float())[..., 0].T                        # (B, L)


ALL = ("forcing", "static")
finetune.VARIANTS |= {
    "resconn-all": finetune.Variant(inputs=ALL),
    "resconn-tenth": finetune.Variant(inputs=ALL, network=TenthPredictor),
    "resconn-narrow": finetune.Variant(network=NarrowPredictor),
    "resconn-noise": finetune.Variant(network=NoisyPredictor),
    "resconn-authors": finetune.Variant(inputs=(), network=AuthorsPredictor,
                                        needs=finetune.LSTMHead)}


@dataclass
class Options(finetune.Options):
    model: str = finetune.option(
        "model", ",".join(["resconn", *(name for name in finetune.VARIANTS
                                        if name.startswith("resconn-"))]),
        "of finetune.VARIANTS, joined by commas")


if __name__ == "__main__":
    common.main("streamflow", __doc__, Options)

"""Other adapters than the plain residual one: what is done to x = E + r before the LSTM reads it.

    python train.py && python -m applications.adapters                      the synthetic world
    python -m applications.adapters --data caravan:DIR --model resconn,resconn-gated

Most add a small network of x to x: x + adapter(x). resconn-narrow lets eight numbers of the site
through. resconn-authors is the adapter of the authors' code.
"""

from functools import partial

import torch
import torch.nn as nn

import data
from finetune import VARIANTS, Predictor, Variant, fill_and_flag, main


class Adapted(Predictor):
    """One of ADAPTERS, which the variant is named after, before the LSTM."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        self.adapter = ADAPTERS[settings["variant"]](settings["width"])

    def head(self, x):
        return super().head(x + self.adapter(x))                                # (L, B, K)


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


class Narrow(Predictor):
    """The token of the site, before the layers and after, has to pass through eight numbers."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        d = self.encoder.config.d_model
        for k in (1, 3):
            self.norms[k] = nn.Sequential(self.norms[k], nn.Linear(d, 8), nn.Linear(8, d))


class Authors(Predictor):
    """The dual residual adapter and residual LSTM of the authors' code (StefaLandRelease): weather
    and attributes join E, which begins at a tenth, before the LSTM, at its input, at its output."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        d = settings["width"]
        C, S = len(settings["forcing_names"]), len(settings["static_names"])
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.weather = nn.Sequential(nn.Linear(C, d), nn.ReLU(), nn.Dropout(0.1))
        self.attributes = nn.Sequential(nn.Linear(2 * S, d), nn.ReLU(), nn.Dropout(0.1))
        self.joint = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.ReLU(), nn.Dropout(0.2),
                                   nn.Linear(2 * d, d))
        self.joint_norm, self.sum_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.enter, self.leave = nn.Linear(d + C + 2 * S, d), nn.Linear(d + C + 2 * S, d)

    def forward(self, e, forcing, static):
        """As Predictor.forward; of E only what comes after the layers."""
        x = forcing.transpose(0, 1).nan_to_num()                                # (L, B, C)
        s = fill_and_flag(static).expand(len(x), -1, -1)                        # (L, B, 2 S)
        e = e.transpose(0, 1).chunk(2, -1)[1]                                   # (L+1, B, D)
        e = self.scale * self.expand(self.norms[0](e[:-1] + e[-1:]))            # (L, B, width)
        u, v = self.weather(x), self.attributes(s)                              # (L, B, width) each
        z = self.joint_norm(e + self.joint(torch.cat([e, u, v], -1)))
        z = self.sum_norm(z + u + v)
        h, _ = self.lstm(self.enter(torch.cat([z, x, s], -1)))
        h = h + self.leave(torch.cat([h, x, s], -1))                            # (L, B, width)
        with torch.autocast(h.device.type, enabled=False):
            return self.output(h.float()).transpose(0, 1)                       # (B, L, K)


ADAPTERS = {"resconn-feedforward": feedforward, "resconn-bottleneck": bottleneck,
            "resconn-gated": gated, "resconn-experts": Experts}
VARIANTS |= {name: Variant(Adapted) for name in ADAPTERS}
VARIANTS |= {"resconn-narrow": Variant(Narrow), "resconn-authors": Variant(Authors, inputs=())}
MODELS = ",".join(name for name in VARIANTS if name.startswith("resconn"))

if __name__ == "__main__":
    data.command(partial(main, models=MODELS, description=__doc__))

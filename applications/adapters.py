"""Other adapters than the plain residual one: what is done to x = E + r before the head reads it.

    python train.py && python -m applications.adapters                      the synthetic world
    python -m applications.adapters --data caravan:DIR --model resconn,resconn-gated --fold all

Each adds a small network of x to x: x + adapter(x). resconn-all has none, but its residual path
reads the attributes beside the weather. Their head is an LSTM: for tasks with a daily series.
"""

from dataclasses import dataclass
from functools import partial

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
finetune.VARIANTS["resconn-all"] = finetune.Variant(inputs=("forcing", "static"))


@dataclass
class Options(finetune.Options):
    model: str = finetune.option(
        "model", "resconn,resconn-feedforward,resconn-bottleneck,resconn-gated,resconn-experts,"
                 "resconn-all", "of finetune.VARIANTS, joined by commas")


if __name__ == "__main__":
    common.main("streamflow", __doc__, Options)

"""What does pretraining give, apart from the variables? Controls beside resconn and lstm.

    python train.py && python -m applications.controls --seeds 3            the synthetic world
    python -m applications.controls --data caravan:DIR --fold all --checkpoint out/pub{fold}/…

raw: in place of E all that the encoder reads, as it is: weather, attributes, place, season.
untrained: E of an encoder with the random weights that pretraining begins with.
shallow, deep: E from before the encoder's layers only, or only from after them.
noresconn: E without the residual path; linear: each day's E by itself.
lstm-hiding: lstm that in training had groups of attributes hidden, as the encoder had.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

import data
import finetune
from applications import common
from model import draw_groups, spherical_harmonics


class Inputs(nn.Module):
    """In place of the encoder: what it reads, side by side, missing values flagged."""
    levels = 1

    def __init__(self, config):
        super().__init__()
        n_day, n_static = 2 * len(config.dynamic_names) + 2, 2 * len(config.static_names)
        self.config = replace(config, d_model=n_day + n_static + (config.degree + 1) ** 2)

    def read(self, forcing, static, latlon, day_of_year):
        """As StefaLand.read: days fill the first columns, and the site, last, the others."""
        angle = day_of_year[..., None] * (2 * math.pi / 365.25)                 # (B, T, 1)
        days = torch.cat([finetune.fill_and_flag(forcing), angle.sin(), angle.cos()], -1)
        place = spherical_harmonics(latlon.nan_to_num(), self.config.degree).to(static.dtype)
        site = torch.cat([finetune.fill_and_flag(static), place], -1)[:, None]
        days = nn.functional.pad(days, (0, site.shape[-1]))                     # (B, T, D)
        site = nn.functional.pad(site, (self.config.d_model - site.shape[-1], 0))
        return torch.cat([days, site], 1)                                       # (B, T+1, D)


class HidingPredictor(finetune.Predictor):
    """In training each group of attributes of a window is hidden with the chance of 0.3."""

    def forward(self, e, forcing, static, extra):
        if self.training:
            groups = data.groups(self.settings["static_names"])
            hidden = draw_groups(groups, 0.3, torch.rand, len(static))          # (B, S)
            static = static.masked_fill(hidden.to(static.device), math.nan)
        return super().forward(e, forcing, static, extra)


def fixed_gains(*gains):
    """A predictor whose shares of E's parts are given: days, site before the layers, and after."""
    class FixedPredictor(finetune.Predictor):
        def __init__(self, settings, encoder=None):
            super().__init__(settings, encoder)
            self.gain = nn.Parameter(torch.tensor(gains), requires_grad=False)
    return FixedPredictor


finetune.VARIANTS["shallow"] = finetune.Variant(network=fixed_gains(1.0, 1.0, 0.0, 0.0))
finetune.VARIANTS["deep"] = finetune.Variant(network=fixed_gains(0.0, 0.0, 1.0, 1.0))
finetune.VARIANTS["lstm-hiding"] = replace(finetune.VARIANTS["lstm"], network=HidingPredictor)
finetune.VARIANTS["raw"] = finetune.Variant("untrained", encoder=Inputs)
finetune.VARIANTS["untrained"] = finetune.Variant("untrained")


@dataclass
class Options(finetune.Options):
    model: str = finetune.option(
        "model", "resconn,shallow,deep,raw,untrained,noresconn,linear,lstm,lstm-hiding",
        "of finetune.VARIANTS, joined by commas")


if __name__ == "__main__":
    common.main("streamflow", __doc__, Options)

"""What does pretraining give, apart from the variables? Controls beside resconn and lstm.

    python train.py && python -m applications.controls --seeds 3            the synthetic world
    python -m applications.controls --data caravan:DIR --fold all --checkpoint out/pub{fold}/…

raw: in place of E all that the encoder reads, as it is: weather, attributes, place, season.
untrained: E of an encoder with the random weights that pretraining begins with.
shallow, deep: E from before the encoder's layers only, or only from after them.
noresconn: E without the residual path; linear: noresconn, but each day by itself, no LSTM.
scratch: the encoder learns from random weights, with the rest; direct: from the pretrained ones,
without the residual path. Both are slow, and only run if --model names them.
resconn-weather: the residual path is not told the attributes.
resconn-shown: no attributes are hidden in training; lstm-hiding: some are, as from resconn.
"""

from functools import partial

import torch
import torch.nn as nn

from data import command
from finetune import VARIANTS, Predictor, Variant, fill_and_flag, main
from model import Config, spherical_harmonics


class Inputs(nn.Module):
    """In place of the encoder: what it reads, side by side, missing values flagged."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        c.d_model = 2 * len(c.dynamic_names + c.static_names) + 2 + (c.degree + 1) ** 2

    def read(self, forcing, static, latlon, day_of_year):
        """As StefaLand.read: (B, T+1, 2 D). Days fill the first columns, the site, last, the
        others of D; there are no layers, and the D after them are zeros."""
        angle, D = day_of_year[..., None] * (2 * torch.pi / 365.25), self.config.d_model
        days = torch.cat([fill_and_flag(forcing), angle.sin(), angle.cos()], -1)
        place = spherical_harmonics(latlon.nan_to_num(), self.config.degree)
        site = torch.cat([fill_and_flag(static), place], -1)[:, None]
        days = nn.functional.pad(days, (0, 2 * D - days.shape[-1]))             # (B, T, 2 D)
        site = nn.functional.pad(site, (D - site.shape[-1], D))                 # (B, 1, 2 D)
        return torch.cat([days, site], 1)


class Raw(Predictor):
    """The encoder's inputs in place of E."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, Inputs(Config(**settings["config"])))


class Untrained(Predictor):
    """E of an encoder of the same shape that never learned anything."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, None)


class OneLevel(Predictor):
    """E from before the encoder's layers, or from after them, at shares that are not learned."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        self.gain = nn.Parameter(torch.tensor(GAINS[settings["variant"]]), requires_grad=False)


class Linear(Predictor):
    """A line in place of the LSTM, which stands idle."""

    def head(self, x):
        return self.output(x)                                                   # (L, B, K)


class Hiding(Predictor):
    """Attributes are hidden in training though there is no E, or not although there is."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        self.hide = 0.0 if self.encoder else Config.p_static


# shares of day and site before the layers, of day and site after them
GAINS = {"shallow": (1.0, 1.0, 0.0, 0.0), "deep": (0.0, 0.0, 1.0, 1.0)}
VARIANTS |= {"noresconn": Variant(inputs=()), "scratch": Variant(embedding="random"),
             "direct": Variant(embedding="tuned", inputs=()), "linear": Variant(Linear, inputs=()),
             "raw": Variant(Raw), "untrained": Variant(Untrained), "shallow": Variant(OneLevel),
             "deep": Variant(OneLevel), "resconn-weather": Variant(inputs=("forcing",)),
             "resconn-shown": Variant(Hiding), "lstm-hiding": Variant(Hiding, embedding="")}
MODELS = "resconn,resconn-weather,shallow,deep,raw,untrained,noresconn,linear,lstm,lstm-hiding"

if __name__ == "__main__":
    command(partial(main, models=MODELS, description=__doc__))

"""Streamflow by a bucket model whose parameters the network tells: a physical head.

    python train.py && python -m applications.hybrid                beside resconn and lstm
    python -m applications.hybrid --data caravan:DIR --lr 5e-3 --draw 0 --fold all

HBV (Bergström 1976) written in PyTorch and trained through time, as in Feng et al. (2022, doi
10.1029/2022WR032404). The head reads what the LSTM of resconn or lstm reads, and tells from it the
parameters of parallel buckets, whose mean flow is routed to the gauge. No water is lost or made:
what falls evaporates, is stored, or leaves; for flow that the gauge shows and the weather does not
hold, as from undercatch or springs, there is no parameter.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

import data
import finetune
from applications import common
from model import Dropout

COMPONENTS = 8                                              # K, parallel buckets of a basin
ROUTED = 15                                                 # days over which routing spreads flow


class Range(NamedTuple):
    """Bounds of a parameter; where they span magnitudes it is even in the logarithm."""
    low: float
    high: float
    log: bool = False


PARAMETERS = {                                              # bounds near those of Feng et al.
    "threshold": Range(-2.5, 2.5),                          # °C: colder, it snows and freezes
    "degree_day": Range(0.5, 10, True),                     # mm/d of melt for each °C above
    "refreezing": Range(0, 0.1),                            # of water in snow, a share of that
    "retention": Range(0, 0.2),                             # water that snow holds, a share of it
    "capacity": Range(50, 1000, True),                      # mm, of the soil
    "beta": Range(1, 6, True),                              # recharge = inflow * wetness^beta
    "limit": Range(0.2, 1),                                 # of wetness; drier, evaporation is less
    "shape": Range(0.3, 5, True),                           # by (wetness / limit)^shape
    "percolation": Range(0, 10),                            # mm/d, upper to lower groundwater
    "overflow": Range(0, 100),                              # mm in the upper; above, k0 drains too
    "k0": Range(0.05, 0.9, True),                           # 1/d
    "k1": Range(0.01, 0.5, True),                           # 1/d, of the upper
    "k2": Range(0.001, 0.2, True),                          # 1/d, of the lower
}
DAILY = ("beta", "shape", "k0")                             # may differ from day to day
STORES = {                                                  # where a window begins
    "snow": Range(0, 1), "water": Range(0, 1),              # mm, and mm of water in it
    "soil": Range(0, 1),                                    # of its capacity
    "upper": Range(0, 20), "lower": Range(0, 100)}          # mm of groundwater
ROUTING = {"a": Range(0.3, 3, True), "b": Range(0.5, 6.5, True)}    # of the gamma function; b in d


def hbv(precipitation, temperature, pet, parameters, stores):
    """Flow before routing and evaporation, (L, B, K), and the stores after the last day.

    Weather (L, B, 1) in mm/d and °C; PARAMETERS {name: (L, B, K) or (1, B, K)}; the STORES in mm,
    (B, K) each, before the first day.
    """
    p, (snow, water, soil, upper, lower) = parameters, stores
    warmth = temperature - p["threshold"]                                       # (L, B, K)
    rain = torch.where(warmth > 0, precipitation, 0)
    melt = p["degree_day"] * warmth.relu()
    freeze = p["refreezing"] * p["degree_day"] * (-warmth).relu()
    by_day = [rain, precipitation - rain, melt, freeze, pet, p["limit"] * p["capacity"]]
    by_day += [p[name] for name in ("retention", "capacity", "beta", "shape", "percolation",
                                    "overflow", "k0", "k1", "k2")]
    flow, evaporation = [], []
    # minimum(x, store) costs more to differentiate than the relu(store - x) that it leaves
    for (rain, snowfall, melt, freeze, pet, limit, retention, capacity, beta, shape, percolation,
         overflow, k0, k1, k2) in zip(*(x.expand(warmth.shape).unbind() for x in by_day)):
        snow = snow + snowfall
        frozen, liquid = (snow - melt).relu(), (water - freeze).relu()
        snow, water = frozen + water - liquid, liquid + snow - frozen
        outflow = (water - retention * snow).relu()
        water = water - outflow

        inflow = rain + outflow
        recharge = inflow * power(soil / capacity, beta)
        soil = soil + inflow - recharge
        excess = (soil - capacity).relu()
        soil = soil - excess
        left = (soil - pet * power((soil / limit).clamp(max=1), shape)).relu()
        evaporation.append(soil - left)
        soil = left

        upper = upper + recharge + excess
        left = (upper - percolation).relu()
        lower = lower + upper - left
        q0 = k0 * (left - overflow).relu()
        q1 = k1 * (left - q0)
        q2 = k2 * lower
        upper, lower = left - q0 - q1, lower - q2
        flow.append(q0 + q1 + q2)
    return torch.stack(flow), torch.stack(evaporation), (snow, water, soil, upper, lower)


def power(share, exponent):
    """share^exponent; of an empty store, too, with a gradient, and cheaper to differentiate."""
    return ((share + 1e-5).log() * exponent).exp()


def route(flow, a, b):
    """Flow (L, B) delayed by a gamma unit hydrograph of shape a and scale b, days, (B,) each."""
    t = torch.arange(ROUTED, dtype=flow.dtype, device=flow.device) + 0.5
    share = ((a[:, None] - 1) * t.log() - t / b[:, None]).softmax(1)            # (B, days)
    past = nn.functional.pad(flow, (0, 0, ROUTED - 1, 0)).unfold(0, ROUTED, 1)  # (L, B, days)
    return (past * share.flip(1)).sum(-1)                                       # (L, B)


def within(ranges, x):
    """Any numbers (..., len(ranges)) -> {name: value within its bounds (...)}."""
    values = {}
    for (name, (low, high, log)), share in zip(ranges.items(), x.sigmoid().unbind(-1)):
        values[name] = low * (high / low) ** share if log else low + (high - low) * share
    return values


def weather(forcing, names):
    """Precipitation, temperature and PET, (B, L, 3), of a window's forcing (B, L, C), no NaN.

    Temperature is the mean of the extremes if need be. A missing day is the mean of the window's
    others, a window without any 0. ValueError if the sites lack a variable.
    """
    series = dict(zip(names, np.moveaxis(forcing, -1, 0)))                      # (B, L) each
    if "temperature" not in series and {"tmax", "tmin"} <= series.keys():
        series["temperature"] = (series["tmax"] + series["tmin"]) / 2
    result = []
    for name in ("precipitation", "temperature", "pet"):
        data.check(name in series, f"the sites have no {name}, which hbv needs, but {names}")
        x = torch.from_numpy(series[name])
        mean = x.nanmean(1, keepdim=True)                                       # (B, 1)
        result.append(torch.where(x.isnan(), mean, x).nan_to_num())
    return torch.stack(result, -1)                                              # (B, L, 3)


class HBVHead(nn.Module):
    """LSTM -> parameters -> HBV -> square root of flow in mm/d: (L, B, width) -> (L, B)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        self.dropout, self.lstm = Dropout(dropout), nn.LSTM(width, width)
        self.fixed = {n: r for n, r in (PARAMETERS | STORES).items() if n not in DAILY}
        self.daily = {n: PARAMETERS[n] for n in DAILY}
        self.of_basin = nn.Linear(width, COMPONENTS * len(self.fixed))
        self.of_day = nn.Linear(width, COMPONENTS * len(self.daily))
        self.routing = nn.Linear(width, len(ROUTING))

    def forward(self, x, extra):
        x, _ = self.lstm(self.dropout(x))                                       # (L, B, width)
        with torch.autocast(x.device.type, enabled=False):
            x = self.dropout(x.float())
            mean = x.mean(0, keepdim=True)                                      # (1, B, width)
            p = within(self.fixed, self.of_basin(mean).unflatten(-1, (COMPONENTS, -1)))
            p |= within(self.daily, self.of_day(x).unflatten(-1, (COMPONENTS, -1)))
            p["soil"] = p["soil"] * p["capacity"]
            stores = [p[name][0] for name in STORES]                            # (B, K) each
            precipitation, temperature, pet = extra[-1].transpose(0, 1).split(1, -1)
            flow, *_ = hbv(precipitation, temperature, pet, p, stores)          # (L, B, K)
            flow = route(flow.mean(-1), **within(ROUTING, self.routing(mean[0])))   # (L, B)
            return (flow + 1e-4).sqrt()                     # of zero the slope would be infinite


for name in ("resconn", "lstm"):
    finetune.VARIANTS[f"{name}-hbv"] = replace(
        finetune.VARIANTS[name], head=HBVHead, weather=weather, standardised=False,
        transform=finetune.square_root, inverse=finetune.square, needs=finetune.LSTMHead)


@dataclass
class Options(finetune.Options):
    model: str = finetune.option("model", "resconn,lstm,resconn-hbv,lstm-hbv",
                                 "of finetune.VARIANTS, joined by commas")


if __name__ == "__main__":
    common.main("streamflow", __doc__, Options)

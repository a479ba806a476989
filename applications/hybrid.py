"""Streamflow by a bucket model whose parameters the network tells: a physical head.

    python train.py && python -m applications.hybrid                beside resconn and lstm
    python -m applications.hybrid --data caravan:DIR --lr 5e-3

HBV (Bergström 1976) written in PyTorch and trained through time, as in Feng et al. (2022, doi
10.1029/2022WR032404). The LSTM reads what that of resconn or lstm reads, and tells from it the
parameters of parallel buckets, whose mean flow is routed to the gauge. No water is lost or made:
what falls evaporates, is stored, or leaves; for flow that the gauge shows and the weather does not
hold, as from undercatch or springs, there is no parameter.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn

import data
from finetune import VARIANTS, Predictor, main

COMPONENTS = 8                                              # K, parallel buckets of a basin
ROUTED = 15                                                 # days over which routing spreads flow

# Bounds, near those of Feng et al., of what is the same over a window; of what may differ from day
# to day; of where a window begins (mm of snow, of water in it, share of the soil's capacity, mm of
# upper and lower groundwater); and of the gamma function of routing (b in days).
FIXED = {
    "threshold": (-2.5, 2.5),                               # °C: colder, it snows and freezes
    "degree_day": (0.5, 10),                                # mm/d of melt for each °C above
    "refreezing": (0, 0.1),                                 # of water in snow, a share of that
    "retention": (0, 0.2),                                  # water that snow holds, a share of it
    "capacity": (50, 1000),                                 # mm, of the soil
    "limit": (0.2, 1),                                      # of wetness; drier, evaporation is less
    "percolation": (0, 10),                                 # mm/d, upper to lower groundwater
    "overflow": (0, 100),                                   # mm in the upper; above, k0 drains too
    "k1": (0.01, 0.5),                                      # 1/d, of the upper
    "k2": (0.001, 0.2)}                                     # 1/d, of the lower
DAILY = {
    "beta": (1, 6),                                         # recharge = inflow * wetness^beta
    "shape": (0.3, 5),                                      # evaporation: (wetness / limit)^shape
    "k0": (0.05, 0.9)}                                      # 1/d
STORES = {"snow": (0, 1), "water": (0, 1), "soil": (0, 1), "upper": (0, 20), "lower": (0, 100)}
ROUTING = {"a": (0.3, 3), "b": (0.5, 6.5)}


class HBV(Predictor):
    """LSTM -> parameters -> HBV -> square root of flow and flow, standardised as the gauge's."""

    def __init__(self, settings, encoder=None):
        super().__init__(settings, encoder)
        data.check(settings["target"] == "streamflow", "hbv tells no other --target but streamflow")
        del self.output                                     # the buckets take its place
        width = settings["width"]
        self.of_basin = nn.Linear(width, COMPONENTS * len(FIXED | STORES))
        self.of_day = nn.Linear(width, COMPONENTS * len(DAILY))
        self.routing = nn.Linear(width, len(ROUTING))

    def forward(self, e, forcing, static):
        """As Predictor.forward: E or None, standardised inputs -> (B, L, 2)."""
        self.weather = in_units(forcing, self.settings)                         # 3 x (L, B, 1)
        return super().forward(e, forcing, static)

    def head(self, x):
        """(L, B, width) -> (L, B, 2)."""
        x, _ = self.lstm(self.dropout(x))                                       # (L, B, width)
        with torch.autocast(x.device.type, enabled=False):
            flow = self.flow(self.dropout(x.float()), self.weather)             # (L, B)
        views = torch.stack([(flow + 1e-4).sqrt(), flow], -1)       # the root is steep near zero
        centre, spread = map(views.new_tensor, (self.settings["centre"], self.settings["spread"]))
        return (views - centre) / spread

    def flow(self, x, weather):
        """What the LSTM says (L, B, width), weather 3 x (L, B, 1) -> mm/d at the gauge (L, B)."""
        mean = x.mean(0, keepdim=True)                                          # (1, B, width)
        p = within(FIXED | STORES, self.of_basin(mean).unflatten(-1, (COMPONENTS, -1)))
        p |= within(DAILY, self.of_day(x).unflatten(-1, (COMPONENTS, -1)))
        p["soil"] = p["soil"] * p["capacity"]
        stores = [p.pop(name)[0] for name in STORES]                            # (B, K) each
        flow, *_ = hbv(*weather, p, stores)                                     # (L, B, K)
        return route(flow.mean(-1), **within(ROUTING, self.routing(mean[0])))


def in_units(forcing, settings):
    """Precipitation, temperature and PET in mm/d and °C, (L, B, 1) each, of the standardised
    forcing (B, L, C).

    A missing day is the mean of the window's others, a window without any 0. Temperature is the
    mean of the extremes if need be. ValueError if the sites lack a variable.
    """
    log, mean, std = settings["scaling"]["forcing"].to(forcing)                 # (C,) each
    x = forcing * std + mean
    x = torch.where(log > 0, x.expm1(), x)
    x = torch.where(x.isnan(), x.nanmean(1, keepdim=True), x).nan_to_num().transpose(0, 1)
    series = dict(zip(settings["forcing_names"], x.split(1, -1)))               # (L, B, 1) each
    if "temperature" not in series and {"tmax", "tmin"} <= series.keys():
        series["temperature"] = (series["tmax"] + series["tmin"]) / 2
    for name in ("precipitation", "temperature", "pet"):
        data.check(name in series, f"the sites have no {name}, which hbv needs, but {[*series]}")
    return series["precipitation"], series["temperature"], series["pet"]


def hbv(precipitation, temperature, pet, parameters, stores):
    """Flow before routing and evaporation, (L, B, K), and the stores after the last day.

    Weather (L, B, 1) in mm/d and °C; parameters {name: (L, B, K) or (1, B, K)} of FIXED and DAILY;
    the STORES in mm, (B, K) each, before the first day.
    """
    p, (snow, water, soil, upper, lower) = parameters, stores
    warmth = temperature - p["threshold"]                                       # (L, B, K)
    rain = torch.where(warmth > 0, precipitation, 0)
    by_day = p | {"rain": rain, "snowfall": precipitation - rain, "pet": pet,
                  "melt": p["degree_day"] * warmth.relu(),
                  "freeze": p["refreezing"] * p["degree_day"] * (-warmth).relu(),
                  "enough": p["limit"] * p["capacity"]}     # mm of soil water to evaporate pet
    flow, evaporation = [], []
    # minimum(x, store) costs more to differentiate than the relu(store - x) that it leaves
    for values in zip(*[x.expand(warmth.shape).unbind() for x in by_day.values()]):     # (B, K)
        day = SimpleNamespace(**dict(zip(by_day, values)))
        snow = snow + day.snowfall
        frozen, liquid = (snow - day.melt).relu(), (water - day.freeze).relu()
        snow, water = frozen + water - liquid, liquid + snow - frozen
        outflow = (water - day.retention * snow).relu()
        water = water - outflow

        inflow = day.rain + outflow
        recharge = inflow * power(soil / day.capacity, day.beta)
        soil = soil + inflow - recharge
        excess = (soil - day.capacity).relu()
        soil = soil - excess
        left = (soil - day.pet * power((soil / day.enough).clamp(max=1), day.shape)).relu()
        evaporation.append(soil - left)
        soil = left

        upper = upper + recharge + excess
        left = (upper - day.percolation).relu()
        lower = lower + upper - left
        q0 = day.k0 * (left - day.overflow).relu()
        q1 = day.k1 * (left - q0)
        q2 = day.k2 * lower
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
    """Any numbers (..., len(ranges)) -> {name: value within its bounds (...)}.

    Where the bounds are more than a factor of five apart it is even in the logarithm.
    """
    values = {}
    for (name, (low, high)), share in zip(ranges.items(), x.sigmoid().unbind(-1)):
        log = 0 < 5 * low < high
        values[name] = low * (high / low) ** share if log else low + (high - low) * share
    return values


VARIANTS |= {f"{name}-hbv": VARIANTS[name]._replace(network=HBV) for name in ("resconn", "lstm")}

if __name__ == "__main__":
    data.command(partial(main, models="resconn,lstm,resconn-hbv,lstm-hbv", description=__doc__))

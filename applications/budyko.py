"""Streamflow as a share of what climate alone would leave: for basins drier than the training's.

    python train.py && python -m applications.budyko --seeds 3 --draw 0     beside resconn and lstm
    python -m applications.budyko --data caravan:DIR --holdout none --seeds 3

The long-term mean is what transfers least between places. A basin's mean precipitation P and PET E
are known without a gauge, and leave q = P - P E / sqrt(P^2 + E^2) (Turc 1954, Mezentsev 1955, n =
2). Learned is the square root of flow / q, in the variants resconn-budyko and lstm-budyko; members
of an ensemble that are scaled in both ways err differently.
"""

from dataclasses import dataclass, replace

import numpy as np

import data
import finetune
from applications import common


def climate(sites):
    """Mean precipitation and PET of the record, mm/d: (2, N)."""
    for name in ("precipitation", "pet"):
        data.check(name in sites.dynamic_names, f"the sites have no {name}: no climatic mean")
    means = [np.nanmean(forcing, 0) if not np.isnan(forcing).all() else forcing[0]
             for forcing in sites.forcing]
    means = dict(zip(sites.dynamic_names, np.array(means).T))                   # (N,) each
    return np.array([means["precipitation"], means["pet"]])


def climatic_mean(sites):
    """What evaporation leaves of the mean precipitation, mm/d, (N, 1); at least 0.01."""
    p, e = climate(sites)
    return np.maximum(p - p * e / np.sqrt(p ** 2 + e ** 2 + 1e-9), 0.01)[:, None]


def root_of_share(y, sites):
    return np.sqrt(np.maximum(y, 0) / climatic_mean(sites))


def flow(y, sites):
    return np.maximum(y, 0) ** 2 * climatic_mean(sites)


for name in ("resconn", "lstm"):
    finetune.VARIANTS[f"{name}-budyko"] = replace(
        finetune.VARIANTS[name], transform=root_of_share, inverse=flow)


@dataclass
class Options(finetune.Options):
    model: str = finetune.option("model", "resconn,lstm,resconn-budyko,lstm-budyko",
                                 "of finetune.VARIANTS, joined by commas")


if __name__ == "__main__":
    common.main("streamflow", __doc__, Options)

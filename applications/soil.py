"""Clay, silt and sand of the topsoil (%) at places that were never sampled.

    python -m applications.soil train && python -m applications.soil        the synthetic world
    python -m applications.soil --task sand --data wosis:DIR,csv:DIR --holdout pur --fold all
    python -m applications.soil train --data gauges:DIR --seq-len 1 --steps 6000 --batch-size 64

wosis:DIR is a WoSIS snapshot (doi 10.5194/essd-12-299-2020), gauges:DIR the attribute tables of
Caravan alone: also of gauges that have no series. The third command pretrains on those; an encoder
of single days suits sites without weather. csv:DIR may be nothing but a sites.csv. All of the soil
is hidden from the models, and an encoder pretrained by `train` here does not know of it either.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import data
import finetune
from applications import common

TEXTURE = ("clay", "silt", "sand")


def read_wosis(folder):
    """Profiles with their texture of 0 to 30 cm, the mean of its layers weighted by thickness.

    Left out: those without texture there, or whose clay, silt and sand do not add up to 100 ± 5 %.
    """
    columns = [f"{part}_value_avg" for part in TEXTURE]
    layers = data.Table(common.one_file(folder, "*_physical.tsv"),
                        ["profile_id", "upper_depth", "lower_depth", *columns], "\t")
    top, bottom = layers.numbers("upper_depth"), layers.numbers("lower_depth")
    thickness = np.maximum(np.minimum(bottom, 30) - np.maximum(top, 0), 0)      # (layers,) cm
    texture = np.stack([layers.numbers(column) for column in columns])          # (3, layers)
    thickness[np.isnan(texture).any(0)] = 0
    profiles, member = np.unique(layers.columns["profile_id"], return_inverse=True)
    total = np.maximum(np.bincount(member, thickness), 1e-9)                    # (profiles,)
    means = [np.bincount(member, part * thickness) / total for part in np.nan_to_num(texture)]
    texture_of = dict(zip(profiles, np.stack(means, 1)))                        # (3,) each

    path = common.one_file(folder, "*_profiles.tsv")
    table, left_out = data.Table(path, ["profile_id", "latitude", "longitude"], "\t"), 0
    lat, lon = table.numbers("latitude"), table.numbers("longitude")
    for i, profile in enumerate(table.columns["profile_id"]):
        parts = texture_of.get(profile, np.zeros(3))
        if abs(sum(parts) - 100) <= 5:
            yield data.Record(profile, path, (lat[i], lon[i]), dict(zip(TEXTURE, parts)), {})
        else:
            left_out += 1
    print(f"{path}: {left_out} of {len(lat)} profiles left out: no texture of 0 to 30 cm, or its "
          f"parts do not add up to 100 %")


def read_gauges(folder):
    """Every gauge of Caravan's attribute tables, once, with or without a series.

    Left out: those known by at most half of the attributes that the best known one has.
    """
    tables = sorted(folder.glob("attributes/*/attributes_*.csv"))
    attributes = data.read_attributes(tables, "caravan")
    most = max([len(known) for known in attributes.values()], default=0)
    known_well = [site for site in sorted(attributes) if len(attributes[site]) > most / 2]
    seen = set()
    for site in known_well:
        if data.gauge(site) not in seen:
            seen.add(data.gauge(site))
            static = dict(attributes[site])
            place = data.place(static.pop("gauge_lat", np.nan), static.pop("gauge_lon", np.nan))
            yield data.Record(site, folder / "attributes", place, static, {})
    print(f"{folder}: {len(attributes)} gauges, of which {len(attributes) - len(known_well)} left "
          f"out, known by half of the attributes at most, and {len(known_well) - len(seen)} twice")


@dataclass
class Options(finetune.Options):
    hide: float = finetune.option("training", 0.0, "share of attribute groups hidden at training "
                                  "sites, others at every step, as in pretraining")


COPIES = 8                              # of the training sites, one complete


def fit_with_hidden_groups(model, o, samples, validation, learned, rng):
    """finetune.fit, each batch from one of several copies of the sites that miss other groups.

    No attribute can then be relied on everywhere: the networks' answer to the random choice of
    attributes at each split of a random forest (doi 10.1023/A:1010933404324).
    """
    sites, chance = samples.sites, getattr(o, "hide", 0)    # Options may be alphaearth.py's
    if chance:
        copies = [samples.outputs]
        for _ in range(COPIES - 1):
            static = data.hide_groups(sites.static, sites.static_names, chance, rng)
            hidden = replace(sites, static=static)
            copy = finetune.Samples(model, hidden, samples.chosen, samples.days)
            copies.append(copy.outputs)
        samples.outputs = lambda i: copies[rng.integers(COPIES)](i)
    return finetune.fit(model, o, samples, validation, learned, rng)


data.READERS |= {"wosis": read_wosis, "gauges": read_gauges}
for part in TEXTURE:
    finetune.TASKS[part] = finetune.Task(
        part, "%", models="resconn,mlp,glm", baseline="mlp", inputs=("static",),
        head=common.MLPHead, fit=fit_with_hidden_groups, scoring="value",
        prepare=partial(common.attribute_as_target, part))

if __name__ == "__main__":
    common.main("clay", __doc__, Options, without="soil")

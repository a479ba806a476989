"""Reader of every gauge of Caravan's attribute tables, with or without a series: places without
weather for pretraining and for values per site.

    python train.py --data gauges:DIR --steps 6000 --batch-size 64

DIR has Caravan's layout (Kratzert et al. 2023, doi 10.1038/s41597-023-01975-w).
"""

import numpy as np

import data


def read(folder):
    """A Record for each gauge, once where two sources hold it, that is known by more than half of
    the attributes of the best known one."""
    attributes = data.read_attributes(sorted(folder.glob("attributes/*/attributes_*.csv")))
    most = max([len(known) for known in attributes.values()], default=0)
    well = [site for site in sorted(attributes) if len(attributes[site]) > most / 2]
    first = {data.gauge(site): site for site in reversed(well)}
    little, twice = sorted(attributes.keys() - well), sorted({*well} - {*first.values()})
    data.tell(f"{folder}: gauges left out, at most half of the attributes known", little)
    data.tell(f"{folder}: gauges left out, of another source too", twice)
    for site in sorted(first.values()):
        static, no_dates = attributes[site], np.array([], "datetime64[D]")
        place = static.pop("lat", np.nan), static.pop("lon", np.nan)
        yield data.Record(site, folder / "attributes", place, static, no_dates, {})

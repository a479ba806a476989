"""Daily soil moisture (m3/m3) at stations that were never trained on.

    python train.py && python -m applications.soil_moisture                 the synthetic world
    python -m applications.soil_moisture --data ismn:DIR --fold all
    python -m applications.soil_moisture train --data ismn:DIR              pretraining on them

DIR is an archive of the ISMN (doi 10.5194/hess-25-5749-2021) in its "header + values" format, with
the weather of each station beside it: <station>.csv, a date and columns named as in data.DYNAMIC.
csv:DIR of data.py works, too: a column soil_moisture. Head and baseline are streamflow's.
"""

import numpy as np

import data
import finetune
from applications import common

HEADER = ["campaign", "network", "station", "lat", "lon", "elevation", "from", "to", "sensor"]
VALUES = ["date", "time", "value", "flag", "origin"]


def read_ismn(folder):
    """The shallowest sensor of every station: daily means of the values flagged good (G)."""
    stations = {}                                           # station: its sensors by depth
    for path in sorted(folder.rglob("*_sm_*.stm")):
        head = data.Table(path, delimiter=None, header=HEADER, lines=slice(0, 1))
        name = head.columns["network"][0], head.columns["station"][0]
        stations.setdefault(name, []).append((head.numbers("from")[0], path, head))
    for (network, station), sensors in stations.items():
        _, path, head = min(sensors)
        weather = sorted(folder.rglob(f"{station}.csv"))
        if not weather:
            print(f"{path}: skipped, there is no {station}.csv with its weather")
            continue
        table = data.Table(path, delimiter=None, header=VALUES, lines=slice(1, None))
        value = table.numbers("value")
        good = (np.array(table.columns["flag"]) == "G") & ~np.isnan(value)
        if not good.any():
            print(f"{path}: skipped, no value is flagged good")
            continue
        days, day = np.unique(table.dates()[good], return_inverse=True)
        lat, lon = head.numbers("lat")[0], head.numbers("lon")[0]
        series = data.read_series(data.Table(weather[0], ["date"]), lat)
        series["soil_moisture"] = days, np.bincount(day, value[good]) / np.bincount(day)
        static = {"elevation": head.numbers("elevation")[0]}
        yield data.Record(f"{network}_{station}", path, (lat, lon), static, series)


data.READERS["ismn"] = read_ismn
finetune.TASKS["soil_moisture"] = finetune.Task("soil_moisture", "m3/m3")

if __name__ == "__main__":
    common.main("soil_moisture", __doc__)

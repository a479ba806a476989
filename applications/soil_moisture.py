"""Daily soil moisture (m3/m3) at stations that were never trained on.

    python train.py && python -m applications.soil_moisture                 the synthetic world
    python -m applications.soil_moisture --data ismn:DIR --fold all
    python -m applications.soil_moisture train --data ismn:DIR              pretraining on them

DIR is an archive of the ISMN (doi 10.5194/hess-25-5749-2021) in its "header + values" format, with
the weather of each station beside it: a date and columns named as in data.DYNAMIC, in a csv named
as the station, in the files or in its folder. The static variables that come with an archive are
read. csv:DIR of data.py works, too: a column soil_moisture. Head and baseline are streamflow's.
"""

from dataclasses import replace

import numpy as np

import data
import finetune
from applications import common

HEADER = ["campaign", "network", "station", "lat", "lon", "elevation", "from", "to", "sensor"]
VALUES = ["date", "time", "value", "flag", "origin"]
SURFACE = 0.3                                               # m; deeper is not the surface
STATIC = {"clay fraction": "clay", "silt fraction": "silt", "sand fraction": "sand",
          "organic carbon": "organic_carbon_percent"}       # their quantity -> our attribute, %


def read_ismn(folder):
    """The shallowest sensor of every station, of several the one with the longest record: daily
    means of the values flagged good (G)."""
    stations = {}                                           # station: its sensors
    for path in sorted(folder.rglob("*_sm_*.stm")):
        head = data.Table(path, delimiter=None, header=HEADER, lines=slice(0, 1))
        name = head.columns["network"][0], head.columns["station"][0]
        stations.setdefault(name, []).append((head.numbers("from")[0], path, head))
    statics = {name: read_static(sensors[0][1].parent) for name, sensors in stations.items()}
    covers = {name for static in statics.values() for name in static if "landcover" in name}
    for (network, station), sensors in stations.items():
        depth = min(depth for depth, _, _ in sensors)
        records = [(*good_days(path), path, head) for at, path, head in sensors if at == depth]
        days, moisture, path, head = max(records, key=lambda record: len(record[0]))
        names = {station, path.parent.name}
        weather = [file for name in sorted(names) for file in sorted(folder.rglob(f"{name}.csv"))]
        complaint = "" if weather else f"no weather: neither of {sorted(names)} with .csv is there"
        complaint = complaint if len(days) else "no value of its uppermost sensor is flagged good"
        if complaint:
            print(f"{network} {station}: skipped, {complaint}")
            continue
        if depth > SURFACE:
            print(f"{network} {station}: its uppermost sensor is {depth} m deep, not the surface")
        lat, lon = head.numbers("lat")[0], head.numbers("lon")[0]
        series = data.read_series(data.Table(weather[0], ["date"]), lat)
        series["soil_moisture"] = days, moisture
        static = {"elevation": head.numbers("elevation")[0]} | statics[network, station]
        if covers & static.keys():                          # one column a class
            static = dict.fromkeys(covers, 0.0) | static
        yield data.Record(f"{network}_{station}", path, (lat, lon), static, series)


def good_days(path):
    """A sensor's days with good values, and their means."""
    table = data.Table(path, delimiter=None, header=VALUES, lines=slice(1, None))
    value = table.numbers("value")
    good = (np.array(table.columns["flag"]) == "G") & ~np.isnan(value)
    days, day = np.unique(table.dates()[good], return_inverse=True)
    return days, np.bincount(day, value[good], len(days)) / np.bincount(day, minlength=len(days))


def read_static(folder):
    """{attribute: value} of a station's *_static_variables.csv: the layer that begins at the
    surface, and landcover_CLASS = 1; {} where there is none."""
    static = {}
    for path in sorted(folder.glob("*_static_variables.csv")):
        table = data.Table(path, ["quantity_name", "depth_from[m]", "value"], ";")
        rows = zip(table.columns["quantity_name"], table.columns["value"],
                   table.numbers("depth_from[m]"))
        for quantity, text, depth in rows:
            if quantity == "land cover classification":     # several years, the last one counts
                static = {name: x for name, x in static.items() if "landcover" not in name}
                static[f"landcover_{text}"] = 1.0
            elif depth == 0 and quantity in STATIC:
                value = data.number(text)
                table.refuse(quantity, [text], [not 0 <= value <= 100])
                static[STATIC[quantity]] = value
    return static


data.READERS["ismn"] = read_ismn
finetune.TASKS["soil_moisture"] = finetune.Task(
    "soil_moisture", "m3/m3", shown=("rmse", "ubrmse", "corr", "nse"))

if __name__ == "__main__":
    common.main("soil_moisture", __doc__)

"""Reader of the International Soil Moisture Network: daily soil moisture (m3/m3) at stations.

    python finetune.py --target soil_moisture --data ismn:DIR

DIR is an archive (Dorigo et al. 2021, doi 10.5194/hess-25-5749-2021) in its "header + values"
format, with the weather of each station: a csv named as the station or as its folder, beside its
files or elsewhere in DIR, with a date and columns named as in data.DYNAMIC. The static variables
that come with an archive are read. A file that cannot be read costs its station, not the archive.
"""

from collections import defaultdict
from datetime import date

import numpy as np

import data

STATIC = {"clay fraction": "clay", "silt fraction": "silt", "sand fraction": "sand",
          "organic carbon": "organic_carbon_percent"}       # their quantity -> our attribute, %


def read(folder):
    """A Record for each station: daily means of its uppermost sensor, on the days of weather."""
    stations, records = defaultdict(list), []
    for path in sorted(folder.rglob("*_sm_*.stm")):
        stations[path.parent / path.name.partition("_sm_")[0]].append(path)
    tables = sorted(folder.rglob("*.csv"))
    for name, paths in stations.items():
        try:
            records.append(read_station(name, paths, tables))
        except ValueError as error:
            print(f"{name}: left out: {error}")
    data.tell(f"{folder}: without static variables", [r.id for r in records if len(r.static) == 1])
    covers = {name for record in records for name in record.static if "landcover" in name}
    for record in records:                                  # one column a class
        others = dict.fromkeys(covers, 0.0) if covers & record.static.keys() else {}
        yield record._replace(static=others | record.static)


def read_station(name, paths, tables):
    """The Record of a station, whose files' names begin with `name`; ValueError if one is odd."""
    depth = {path: float(path.name.partition("_sm_")[2].partition("_")[0]) for path in paths}
    top = [path for path in paths if depth[path] == min(depth.values())]
    fields = top[0].read_text("utf-8-sig", "replace").partition("\n")[0].split()
    numbers = [data.number(text) for text in fields[3:8]]   # lat, lon, elevation, depth from, to
    data.check(len(fields) > 8 and None not in numbers, f"{top[0]}, line 1: no header: {fields}")
    moisture = max([read_values(path) for path in top], key=len)            # the longest record
    data.check(moisture, "no value of its uppermost sensor is flagged good")
    if numbers[3] > 0.3:
        print(f"{name}: its uppermost sensor is {numbers[3]} m deep, not the surface")
    weather = [file for file in tables if file.stem in (fields[2], name.parent.name)]
    data.check(weather, f"no weather, {fields[2]}.csv")
    table = min(weather, key=lambda file: file.parent != name.parent)       # one beside, if any
    series = data.read_table(table, "date")
    dates = series.pop("date")
    series["soil_moisture"] = np.array([moisture.get(day, np.nan) for day in dates.tolist()])
    static = {"elevation": numbers[2]} | read_static(name)
    return data.Record("_".join(fields[1:3]), table, tuple(numbers[:2]), static, dates, series)


def read_values(path):
    """{date: mean of the values flagged good (G)} of a sensor; the fields after the flag vary."""
    values = defaultdict(list)
    # the header passes: its fourth field is a latitude
    for line, text in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        try:
            day, _, value, flag = text.split()[:4] or 4 * [""]              # some lines are empty
            if flag == "G" and float(value) > -998:
                values[date.fromisoformat(day.replace("/", "-"))].append(float(value))
        except ValueError:
            raise ValueError(f"{path}, line {line}: no date, time, value, flag: '{text}'") from None
    return {day: np.mean(of_day) for day, of_day in values.items()}


def read_static(name):
    """{attribute: value}: shares (%) of the layer at the surface, and landcover_CLASS = 1.

    Columns are known by their place, since some files have no header line.
    """
    static, cover = {}, ""
    path = name.with_name(f"{name.name}_static_variables.csv")
    lines = path.read_text("utf-8-sig", "replace").splitlines() if path.is_file() else []
    for quantity, _, depth, _, value in [x.split(";")[:5] for x in lines if x.count(";") > 3]:
        if data.number(value) != data.number(value):        # NaN or -9999
            continue
        if quantity == "land cover classification":         # of several years the last one
            cover = value
        elif quantity in STATIC and data.number(depth) == 0:
            static[STATIC[quantity]] = data.number(value)
    data.check(not any(x is None or x < 0 or x > 100 for x in static.values()),
               f"{path}: not in %: {static}")
    return static | ({f"landcover_{cover}": 1.0} if cover else {})

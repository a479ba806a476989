"""Reader of CAMELS-US, 671 basins: python train.py --data camels:DIR

DIR holds basin_mean_forcing, usgs_streamflow and camels_topo.txt and so on, in any folder. Of the
forcings the first there is of Daymet, Maurer, NLDAS; for another one give a folder without those
before it. Sources: Newman et al. 2015 (doi 10.5065/D6MW2F4D), Addor et al. 2017
(doi 10.5194/hess-21-5293-2017). camels_hydro.txt is made from the streamflow and never read.
"""

from datetime import date

import numpy as np

import data

# Their columns -> ours, factor; data.COLUMNS has those that Caravan names alike. Their slope (m/km)
# is of a coarser terrain, a third of Caravan's at 482 common gauges: 0.0573 degrees times 3.1.
COLUMNS = data.COLUMNS | {
    "max_water_content": ("water_capacity", 1), "carbonate_rocks_frac": ("carbonate", 100),
    "soil_depth_pelletier": ("soil_depth", 1), "geol_permeability": ("permeability", 1),
    "geol_porostiy": ("rock_porosity", 1), "high_prec_freq": ("high_p_days", 1),
    "low_prec_freq": ("low_p_days", 1), "slope_mean": ("slope", 0.178), "area_gages2": ("area", 1),
    "frac_forest": ("forest", 100), "elev_mean": ("elevation", 1), "clay_frac": ("clay", 1),
    "silt_frac": ("silt", 1), "sand_frac": ("sand", 1)}
DAILY = {"year": ("year", 1), "mnth": ("month", 1), "day": ("day", 1), "dayl(s)": ("daylight", 1),
         "prcp(mm/day)": ("precipitation", 1), "srad(w/m2)": ("shortwave", 1),
         "tmax(c)": ("tmax", 1), "tmin(c)": ("tmin", 1), "vp(pa)": ("vapour", 1)}


def read(folder):
    """A Record for each basin with a forcing file; streamflow in mm/d, on the days of weather."""
    paths = sorted(folder.glob("basin_mean_forcing/**/*_forcing_leap.txt"))
    # in alphabetical order: cida, which is Daymet, maurer, nldas
    kind = min([path.name.split("_")[-3] for path in paths], default="cida")
    paths = [path for path in paths if f"_{kind}_" in path.name]
    print(f"{folder}: {len(paths)} basins, forcing {kind}")
    tables = [path for path in sorted(folder.rglob("camels_*.txt")) if path.stem != "camels_hydro"]
    attributes = data.read_attributes(tables, delimiter=";", columns=COLUMNS)
    data.compare_ids(folder, attributes, [path.name[:8] for path in paths])
    flows = {path.name[:8]: path for path in folder.glob("usgs_streamflow/**/*_streamflow_qc.txt")}
    for path in paths:
        dates, series = read_weather(path)
        basin, head = path.name[:8], path.read_text("utf-8-sig", "replace").split(maxsplit=3)[:3]
        lat, elevation, area = [data.number(text) for text in head]
        data.check(None not in (lat, elevation, area) and 0 < area < 1e13, f"{path}, lines 1 to 3: "
                   f"expected latitude, elevation in m, area in m2, found {', '.join(head)}")
        if basin in flows:                                  # ft3/s -> mm/d
            flow = read_flow(flows[basin], 0.028316846592 * 86400 * 1000 / area)
            series["streamflow"] = np.array([flow.get(day, np.nan) for day in dates.tolist()])
        static = {"elevation": elevation, "area": area / 1e6} | attributes.get(basin, {})
        place = static.pop("lat", lat), static.pop("lon", np.nan)
        yield data.Record(basin, path, place, static, dates, series)


def read_weather(path):
    """Dates (T,), {variable: (T,)}; radiation is the day's mean, humidity of vapour pressure."""
    series = data.read_table(path, "day", None, 3, DAILY)
    data.check(len(series) == len(DAILY), f"{path}, line 4: expected {', '.join(DAILY)}")
    months = 12 * (series.pop("year") - 1970) + series.pop("month") - 1
    days = months.astype("datetime64[M]").astype("datetime64[D]") + series.pop("day").astype(int)
    series["shortwave"] = series["shortwave"] * series.pop("daylight") / 86400
    data.check((np.diff(days).astype(int) > 0).all(), f"{path}: its days are not in order")
    saturation = data.saturation_pressure((series["tmax"] + series["tmin"]) / 2)
    series["humidity"] = np.clip(100 * series.pop("vapour") / saturation, 0, 100)
    return days - 1, series


def read_flow(path, factor):
    """{date: discharge times the factor}, each once; -999 is missing."""
    flow = {}
    for line, text in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        try:
            _, year, month, day, value, _ = text.split()
            when = date(int(year), int(month), int(day))
            data.check(when not in flow, "a day twice")
            flow[when] = float(value) * factor if float(value) > -998 else np.nan
        except ValueError:
            raise ValueError(f"{path}, line {line}: expected id, year, month, day, ft3/s and flag, "
                             f"found '{text}'") from None
    return flow

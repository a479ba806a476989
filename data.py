"""Sites: what the models see of the land surface, from a synthetic world or from real archives.

    load("synthetic")                    load("camels:DIR,caravan:DIR")          load("csv:DIR")

Every source becomes the same container, with one set of names and units; NaN = missing.
Axes: N sites, T days, C dynamic variables, S static attributes.
"""

import csv
import functools
import hashlib
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np


@dataclass
class Sites:
    """N sites with everything known of them; float32, NaN = missing."""
    ids: np.ndarray        # (N,) str, unique
    latlon: np.ndarray     # (N, 2) degrees
    static: np.ndarray     # (N, S)
    forcing: np.ndarray    # (N, T, C) daily
    target: np.ndarray     # (N, T) daily, or (N,)
    dates: np.ndarray      # (T,) datetime64[D], every day from the first to the last
    static_names: tuple
    dynamic_names: tuple
    extra: dict = field(default_factory=dict)   # what only an application knows, (N, ...) each


class Variable(NamedTuple):
    """A row of the tables below; a column may carry a factor to our unit: "slp_dg_sav*0.1"."""
    group: str
    unit: str
    caravan: str
    camels: str


def parse_table(text):
    rows = [line.split() for line in text.strip().splitlines()]
    return {row[0]: Variable(*row[1:]) for row in rows}


# name, group (hidden together; "context" never), unit, column of Caravan and of CAMELS-US; run-off,
# discharge and what else HydroATLAS derives from gauges are no inputs. At 482 common gauges the two
# archives agree but for these (see results/README.md): slope, of a coarser terrain in CAMELS, is a
# third of Caravan's and multiplied by 3.1; karst and carbonate rocks are two variables; soil is of
# two surveys that correlate by 0.6 to 0.7, and PET of two formulas (0.7): one variable, with noise.
STATIC = parse_table("""
elevation           terrain     m        ele_mt_sav             elev_mean
elevation_max       terrain     m        ele_mt_smx             -
elevation_min       terrain     m        ele_mt_smn             -
slope               terrain     deg      slp_dg_sav*0.1         slope_mean*0.178
groundwater_depth   terrain     m        gwt_cm_sav*0.01        -
soil_depth          terrain     m        -                      soil_depth_pelletier
clay                soil        %        cly_pc_sav             clay_frac
silt                soil        %        slt_pc_sav             silt_frac
sand                soil        %        snd_pc_sav             sand_frac
organic_carbon      soil        t/ha     soc_th_sav             -
soil_water          soil        %        swc_pc_syr             -
soil_porosity       soil        -        -                      soil_porosity
water_capacity      soil        m        -                      max_water_content
karst               geology     %        kar_pc_sse             -
carbonate           geology     %        -                      carbonate_rocks_frac*100
permeability        geology     log10m2  -                      geol_permeability
rock_porosity       geology     -        -                      geol_porostiy
forest              vegetation  %        for_pc_sse             frac_forest*100
cropland            vegetation  %        crp_pc_sse             -
pasture             vegetation  %        pst_pc_sse             -
inundation          vegetation  %        inu_pc_smx             -
ndvi                vegetation  -        -                      -
p_mean              climate     mm/d     p_mean                 p_mean
p_seasonality       climate     -        -                      p_seasonality
high_p_days         climate     d/yr     high_prec_freq*365.25  high_prec_freq
low_p_days          climate     d/yr     low_prec_freq*365.25   low_prec_freq
temperature_mean    climate     degC     tmp_dc_syr*0.1         -
temperature_min     climate     degC     tmp_dc_smn*0.1         -
temperature_max     climate     degC     tmp_dc_smx*0.1         -
pet_mean            climate     mm/d     pet_mm_syr*0.002738    pet_mean
aet_mean            climate     mm/d     aet_mm_syr*0.002738    -
wetness             climate     -        ari_ix_sav*0.01        -
snow_fraction       climate     -        frac_snow              frac_snow
snow_cover          climate     %        snw_pc_syr             -
area                context     km2      area                   area_gages2
lakes               context     %        lka_pc_sse*0.1         -
urban               context     %        urb_pc_sse             -
population_density  context     1/km2    ppd_pk_sav             -
""")
DYNAMIC = parse_table("""
precipitation       precipitation  mm/d  total_precipitation_sum  prcp(mm/day)
temperature         temperature    degC  temperature_2m_mean      -
tmax                temperature    degC  temperature_2m_max       tmax(c)
tmin                temperature    degC  temperature_2m_min       tmin(c)
pet                 temperature    mm/d  -                        -
shortwave           radiation      W/m2  -                        srad(w/m2)
net_shortwave       radiation      W/m2  surface_net_solar_radiation_mean  -
humidity            humidity       %     -                        -
""")
LIMITS = {"%": (0, 100), "degC": (-90, 60), "mm/d": (0, 2000), "W/m2": (-50, 1500)}  # by unit
SERIES = {"streamflow": "streamflow", "vp(pa)": "vapour", "dayl(s)": "daylight",
          "dewpoint_temperature_2m_mean": "dewpoint"}
for own_name, row in DYNAMIC.items():       # column of a daily table, in lower case -> our name
    SERIES |= {own_name: own_name, row.caravan: own_name, row.camels: own_name}


def groups(names):
    """The group of each variable. One of an unknown name is a group by itself, or with those of
    the same prefix: rock_granite, rock_marl and so on, one column a class, are the group "rock"."""
    table, result = STATIC | DYNAMIC, []
    prefixes = [name.partition("_")[0] for name in names if name not in table]
    for name in names:
        prefix = name.partition("_")[0]
        alone = prefixes.count(prefix) < 2
        result.append(table[name].group if name in table else name if alone else prefix)
    return tuple(result)


def load(spec="synthetic", target="streamflow", seed=0, cache="out/cache", quick=False):
    """"synthetic", or one or several real sources ("caravan:DIR,camels:DIR"), as one `Sites`.

    target: the name of a daily series, or of an entry of `extra`. Archives are parsed once and
    kept under `cache` (None: not). ValueError, FileNotFoundError name what cannot be read.
    """
    if spec == "synthetic":
        sites = synthetic_world(seed, n_sites=60, years=3) if quick else synthetic_world(seed)
    else:
        sites = load_archives(spec, target, cache)
    if target in sites.extra:
        sites = replace(sites, target=sites.extra[target])
    elif spec == "synthetic" and target != "streamflow":    # an application's prepare may make it
        sites = replace(sites, target=np.full(len(sites.ids), np.nan, np.float32))
    weather = f"{sites.dates[0]} to {sites.dates[-1]}, daily {', '.join(sites.dynamic_names)}"
    if all(np.isnan(series).all() for series in sites.forcing):
        weather = "no weather"
    print(f"{spec}: {len(sites.ids)} sites; {weather}; {len(sites.static_names)} attributes, "
          f"{np.isnan(sites.static).sum()} of {sites.static.size} values missing")
    return sites


def synthetic_world(seed=0, n_sites=700, years=6):
    """A world with StefaLand's premise: attributes, weather and targets follow from hidden latents.

    Latents are smooth fields of place plus local noise. Attributes are noisy views of them, a third
    of their groups missing; flow (mm/d) comes from a bucket that the latents shape. `extra` has the
    latents and the bucket's soil moisture (m3/m3). Same seed, same bytes.
    """
    rng, N = np.random.default_rng(seed), n_sites

    def noise(size):
        return size * rng.standard_normal((N, 1))

    def share(x):                           # the logistic function
        return 0.5 + 0.5 * np.tanh(x / 2)

    def field(scale=2.0, local=0.3):        # a latent, (N, 1)
        waves = xyz @ (scale * rng.standard_normal((3, 64))) + rng.uniform(0, 2 * np.pi, 64)
        smooth = np.cos(waves).sum(1, keepdims=True)
        return (smooth - smooth.mean()) / smooth.std() + noise(local)

    # places on land-like parts of the sphere, and what they are like; all of it (N, 1)
    xyz = rng.standard_normal((20 * N, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    land = (np.sin(4 * xyz).sum(1) > 0.7) & (abs(xyz[:, 2] - 0.06) < 0.88)      # 55 S to 70 N
    xyz = xyz[land][:N]
    lat, lon = np.rad2deg(np.arcsin(xyz[:, 2:])), np.rad2deg(np.arctan2(xyz[:, 1:2], xyz[:, :1]))
    relief, wet, inland = 0.9 * field(3, 0.5), 0.9 * field(), share(1.5 * field())
    rock, lime, warmth = field(), field(), 26 - 32 * xyz[:, 2:] ** 2
    elevation = 350 * np.exp(0.9 * relief)                                      # m
    t_mean = warmth - 0.004 * elevation + noise(0.7)                            # degC
    weathered = share((t_mean - 12) / 6) * np.tanh(wet)
    parts = np.exp([1.1 * weathered + 0.5 * lime - 0.5 * rock - 0.6, 0.6 * inland - 0.2,
                    0.8 * rock - 0.5 * weathered])
    clay, silt, sand = 100 * parts / parts.sum(0)                               # %
    depth = 1.2 * np.exp(0.5 * weathered - 0.45 * relief + noise(0.2))          # m
    growth = np.tanh(np.maximum(0.9 + wet, 0)) * share((t_mean - 5) / 6)
    forest = 100 * share(6 * (growth - 0.55) + 0.8 * np.log(depth) + noise(0.4))    # %
    capacity = depth * (40 + 1.6 * clay + 1.8 * silt)                           # mm of water
    recession = np.clip(10 ** (0.45 * rock + 0.2 * lime - 1.8), 0.002, 0.3)     # 1/d

    # daily weather: a wet/dry chain and red noise; and the bucket, mm: snow, soil, groundwater
    dates = np.arange("1995-01-01", f"{1995 + years}-01-01", dtype="datetime64[D]")
    rains, anomaly, snow, soil, ground, days = 0, 0, 0 * lat, 0.5 * capacity, 20 + 0 * lat, []
    for doy in day_of_year(dates):
        summer = np.cos(2 * np.pi * (doy - 197) / 365.25) * np.sign(lat)
        p_wet = 0.3 + 0.12 * np.tanh(wet)
        rains = rng.random((N, 1)) < p_wet * (1 + 0.3 * summer) + 0.35 * (rains - p_wet)
        rain = rains * np.exp(0.75 + 0.5 * wet) / p_wet * rng.gamma(0.8, 1.25, (N, 1))
        anomaly = 0.75 * anomaly + noise(0.66)
        amplitude = 1 + (16 + 14 * inland) * np.abs(lat) / 60
        t = t_mean + amplitude * summer + (1.5 + 2.5 * inland) * anomaly
        swing = (7 + 8 * inland - 3 * growth) * (1.1 - 0.45 * rains)
        tmax, tmin = t + swing / 2, t - swing / 2
        pet = potential_evaporation(lat, doy, t, tmax, tmin)
        clear = 0.7 - 0.3 * rains - 0.1 * growth + noise(0.05)
        sun = extraterrestrial_radiation(lat, doy) * 11.574 * clear             # W/m2
        humidity = np.clip(55 + 20 * growth + 15 * rains - 0.8 * swing + noise(4), 8, 100)
        snowfall, fill = rain * (t < 0.5), soil / capacity
        melt = np.minimum(snow, 3 * np.maximum(t - 0.5, 0))
        snow, water = snow + snowfall - melt, rain - snowfall + melt
        quick = np.maximum(water * fill ** (1.2 + 0.04 * sand), soil + water - capacity)
        drain, base = (0.004 + 0.0004 * sand) * soil * fill, recession * ground
        evaporation = pet * np.minimum(1, 2 * fill) * (0.4 + 0.004 * forest)
        soil = np.maximum(soil + water - quick - drain - evaporation, 0)
        ground = ground + drain + 0.1 * quick - base
        flow, moisture = 0.9 * quick + base, 0.002 * clay + 0.001 * soil / depth
        days.append((rain, tmax, tmin, pet, sun, humidity, flow, moisture, snowfall))
    daily = np.stack(days)[..., 0].transpose(2, 0, 1)                           # (N, T, 9)

    # what is observed: the latents through noise
    rain, _, _, pet, _, _, _, _, snowfall = daily.mean(1).T[..., None]          # (N, 1) each
    views = {
        "elevation": elevation * np.exp(noise(0.05)), "soil_depth": depth * np.exp(noise(0.4)),
        "slope": 4 * np.exp(0.7 * relief + noise(0.4)), "clay": np.clip(clay + noise(6), 0, 100),
        "silt": np.clip(silt + noise(6), 0, 100), "sand": np.clip(sand + noise(6), 0, 100),
        "organic_carbon": 60 * np.exp(0.8 * growth - 0.04 * t_mean + noise(0.4)),
        "carbonate": 100 * share(4 * (lime - 0.7) + noise(0.6)),
        "permeability": rock + noise(0.6) - 13, "ndvi": 0.1 + 0.75 * growth + noise(0.06),
        "rock_porosity": 0.03 + 0.25 * share(1.5 * rock + noise(0.6)),
        "forest": np.clip(forest + noise(6), 0, 100),
        "pasture": np.clip((100 - forest) * growth + noise(6), 0, 100),
        "p_mean": rain * np.exp(noise(0.1)), "pet_mean": pet * np.exp(noise(0.05)),
        "temperature_mean": t_mean + noise(0.5), "snow_fraction": snowfall / rain + noise(0.02),
        "area": np.exp(6 + noise(1)), "population_density": np.exp(2 + growth - relief + noise(1))}
    static = np.hstack(list(views.values()), dtype=np.float32)                  # (N, S)
    daily = daily.astype(np.float32)
    latents = np.hstack([relief, wet, inland, rock, lime, growth, depth, t_mean / 10])  # (N, 8)
    return Sites(
        ids=np.array([f"synthetic_{i:04d}" for i in range(N)]), dates=dates,
        latlon=np.hstack([lat, lon], dtype=np.float32), static_names=tuple(views),
        static=hide_groups(static, tuple(views), 1 / 3, rng),
        forcing=daily[..., :6], target=daily[..., 6],
        dynamic_names=("precipitation", "tmax", "tmin", "pet", "shortwave", "humidity"),
        extra={"soil_moisture": daily[..., 7], "latents": latents.astype(np.float32)})


def hide_groups(static, names, chance, rng):
    """(N, S) attributes with whole groups missing: each, at each site, with this chance."""
    static, group_of = static.copy(), np.array(groups(names))
    for group in sorted({*group_of.tolist()} - {"context"}):
        hidden = rng.random(len(static)) < chance                               # (N,)
        static[np.ix_(hidden, group_of == group)] = np.nan
    return static


# Real archives: a reader takes a folder and yields a Record for each site.

class Record(NamedTuple):
    """One site as an archive knows it."""
    id: str
    file: Path             # named in complaints
    latlon: tuple          # latitude and longitude, degrees; None: not known
    static: dict           # attribute -> value; neither a place nor what will be predicted
    series: dict           # daily variable, target too -> (dates, values)
    extra: dict = {}       # name -> value or array, becomes Sites.extra


def load_archives(spec, target, cache):
    """The sites of all sources; from the cache, if neither files nor readers have changed."""
    sources, files = [], [Path(__file__)]
    for part in spec.split(","):
        kind, _, folder = part.partition(":")
        check(kind in READERS, f"'{kind}': expected synthetic or NAME:DIR, NAME in {[*READERS]}")
        check(Path(folder).is_dir(), f"data {kind}: no folder '{folder}'", FileNotFoundError)
        sources.append((READERS[kind], Path(folder)))
        code = Path(READERS[kind].__code__.co_filename)
        cache = cache if code.is_file() else None           # a reader from a notebook may change
        files += [code, *sorted(Path(folder).rglob("*"))]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
              for path in files if cache]
    key = hashlib.sha256(repr([spec, target, states]).encode()).hexdigest()[:16]
    cached = Path(cache or "", key)
    if not (cache and cached.is_dir()):
        records = [record for reader, folder in sources for record in reader(folder)]
        check(records, f"{spec}: no site found")
        sites = assemble(records, target)
        if not cache:
            return sites
        write_cache(cached, sites)
    return read_cache(cached)


def assemble(records, target):
    """`Sites` on the union of the records' dates and variables; unknown attributes come last."""
    for record in records:                                  # an empty column is none
        for name, (_, values) in list(record.series.items()):
            if np.isnan(values).all():
                del record.series[name]
    known = set().union(*[record.static for record in records])
    static_names = [name for name in STATIC if name in known] + sorted(known - STATIC.keys())
    static_names = static_names or ["elevation"]            # one at least, if all missing
    series = set().union(*[record.series for record in records])
    dynamic_names = [name for name in DYNAMIC if name in series] or ["precipitation"]
    unused = sorted(series - {*dynamic_names, target})
    if unused:
        print(f"neither weather nor the target, not used: {', '.join(unused)}")
    dry = sum(not record.series.keys() & {*dynamic_names} for record in records)
    if dry:
        print(f"{dry} of {len(records)} sites have no weather")
    days = [days for record in records for days, _ in record.series.values()]
    days = days or [np.arange("1970", "1971", dtype="datetime64[D]")]   # no weather: an empty year
    dates = np.arange(min(d.min() for d in days), max(d.max() for d in days) + 1)

    ids = np.array([record.id for record in records])                           # (N,)
    names, count = np.unique(ids, return_counts=True)
    files = [str(record.file) for record in records if record.id == names[count.argmax()]]
    check(count.max() == 1, f"{files[0]}: the site {names[count.argmax()]} is there twice")
    latlon = [record.latlon or (np.nan, np.nan) for record in records]
    latlon = np.array(latlon, np.float32)                                       # (N, 2)
    latlon[:, 1] = (latlon[:, 1] + 180) % 360 - 180
    static = np.full((len(ids), len(static_names)), np.nan, np.float32)         # (N, S)
    daily = np.full((len(ids), len(dates), len(dynamic_names) + 1), np.nan, np.float32)
    for i, record in enumerate(records):
        place, (lat, lon) = f"{record.file}: site {record.id}", record.latlon or (0, 0)
        check(abs(lat) <= 90, f"{place} has the latitude {lat}")
        check(abs(lon) <= 360, f"{place} has the longitude {lon}")
        static[i] = [record.static.get(name, np.nan) for name in static_names]
        for j, name in enumerate([*dynamic_names, target]):                     # the target is last
            if name in record.series:
                days, values = record.series[name]
                day = (days - dates[0]).astype(int)
                check(np.bincount(day, minlength=1).max() <= 1, f"{place} has the same date twice")
                daily[i, day, j] = values
        check_units(place, static_names, static[i])
        check_units(place, dynamic_names, daily[i, :, :-1])
        if target == "streamflow" and target in record.series:
            mean = np.nanmean(daily[i, :, -1])
            check(mean <= 100, f"{place}: a mean streamflow of {mean:.1f} mm/d")
    extra = {}
    for name in set().union(*[record.extra for record in records]):
        lacking = [record.id for record in records if name not in record.extra]
        check(not lacking, f"{len(lacking)} sites have no {name}, among them {lacking[:1]}")
        extra[name] = np.array([record.extra[name] for record in records], np.float32)
    return Sites(ids, latlon, static, daily[..., :-1], daily[..., -1], dates,
                 tuple(static_names), tuple(dynamic_names), extra)


def check_units(place, names, values):
    """ValueError for a value, of (..., V), that is beyond what its unit can be."""
    for name, of_name in zip(names, np.moveaxis(values, -1, 0)):
        unit = (STATIC | DYNAMIC)[name].unit if name in STATIC | DYNAMIC else ""
        low, high = LIMITS.get(unit, (-np.inf, np.inf))
        bad = of_name[(of_name < low) | (of_name > high)]
        check(not bad.size, f"{place}: {name} is {bad[:1]} {unit}, it cannot be outside {low} to "
                            f"{high}")


def read_caravan(folder):
    """The gauges with a series in Caravan's layout (doi 10.1038/s41597-023-01975-w).

    Its potential evaporation is several times too high and not read: see read_series.
    """
    attributes = read_attributes(sorted(folder.glob("attributes/*/attributes_*.csv")), "caravan")
    series, strays = {}, []
    for source in sorted(folder.glob("timeseries/csv/*")):
        files = sorted(source.glob("*.csv"))
        named = [path for path in files if path.stem.startswith(source.name + "_")]
        named = named or [path for path in files if "date" in header_of(path)]
        series |= {path.stem: path for path in named}
        strays += sorted({*files} - {*named})
    print(f"{folder}: {len(series)} gauges with a series, {len(series.keys() - attributes)} of "
          f"them without attributes; {len(attributes.keys() - series)} without a series left out")
    if strays:
        print(f"{folder}: no gauges, passed over: {', '.join(path.name for path in strays)}")
    for site, path in sorted(series.items()):
        static = dict(attributes.get(site, {}))
        lat, lon = static.pop("gauge_lat", np.nan), static.pop("gauge_lon", np.nan)
        series = read_series(Table(path, ["date"]), lat)
        yield Record(site, path, place(lat, lon), static, series)


def read_camels(folder):
    """CAMELS-US (doi 10.5065/D6MW2F4D, 10.5194/hess-21-5293-2017), with the first forcing there is
    of Daymet, Maurer, NLDAS. For another one give a folder without those before it.

    camels_hydro.txt is made from the streamflow and never read. Latitude, elevation and area also
    stand in the forcing files: all that is known where there are no attribute tables.
    """
    tables = [path for path in sorted(folder.rglob("camels_*.txt")) if path.stem != "camels_hydro"]
    if not tables:
        print(f"{folder}: no camels_topo.txt and so on, only latitude, elevation and area known")
    attributes = read_attributes(tables, "camels", ";")
    flows = {path.name[:8]: path for path in folder.glob("usgs_streamflow/**/*_streamflow_qc.txt")}
    forcings = {kind: sorted(folder.glob(f"basin_mean_forcing/**/*_{kind}_forcing_leap.txt"))
                for kind in ("cida", "maurer", "nldas")}    # cida is Daymet
    there = [kind for kind in forcings if forcings[kind]] or ["cida"]
    print(f"{folder}: forcing {there[0]}, of {', '.join(there)}")
    for path in forcings[there[0]]:
        basin = path.name[:8]
        head = Table(path, [], None, ["value"], slice(0, 3)).numbers("value")
        check(len(head) == 3 and abs(head[0]) <= 90 and head[2] > 0,
              f"{path}, lines 1 to 3: latitude, elevation in m and basin area in m2 are {head}")
        lat, elevation, area = head
        static = {"elevation": elevation, "area": area / 1e6} | attributes.get(basin, {})
        columns = ["year", "mnth", "day", "dayl(s)", "srad(w/m2)"]
        table = Table(path, columns, None, lines=slice(3, None))
        series = read_series(table, lat)
        if basin in flows:
            table = Table(flows[basin], [], None, ["id", "year", "mnth", "day", "flow", "flag"])
            mm = table.numbers("flow") * (0.028316846592 * 86400 * 1000 / area)     # from ft3/s
            series["streamflow"] = table.dates(), mm
        lat, lon = static.pop("gauge_lat", np.nan), static.pop("gauge_lon", np.nan)
        yield Record(basin, path, place(lat, lon), static, series)


def read_csv(folder):
    """Basins of your own, without an archive's layout.

    sites.csv: id, lat, lon (both empty: unknown) and attributes, named as in STATIC or your own
    way. <id>.csv, for each site that has daily data: date, weather named as in DYNAMIC, in its
    units, and the target, such as streamflow in mm/d.
    """
    table = Table(folder / "sites.csv", ["id", "lat", "lon"])
    attributes = {name: table.numbers(name) for name in table.columns if name != "id"}
    for i, site in enumerate(table.columns["id"]):
        static = {name: values[i] for name, values in attributes.items()}
        lat, lon = static.pop("lat"), static.pop("lon")
        file, series = folder / f"{site}.csv", {}
        if file.is_file():
            daily = Table(file, ["date"])
            own_names = {name: name for name in daily.columns if name != "date"}
            series = read_series(daily, lat, own_names | SERIES)
        yield Record(site, file, place(lat, lon), static, series)
    lacking = [site for site in table.columns["id"] if not (folder / f"{site}.csv").is_file()]
    print(f"{folder}: {len(lacking)} of {len(table.lines)} sites have no <id>.csv {lacking[:3]}")


READERS = {"caravan": read_caravan, "camels": read_camels, "csv": read_csv}


def read_attributes(paths, archive, delimiter=","):
    """Tables joined on gauge_id -> {site: {name: value}}; archive: a column's name of STATIC.

    Of Caravan's and CAMELS' own tables only those columns are read; of any other table, too, what
    is not HydroATLAS's, under its own name.
    """
    columns = {name: getattr(variable, archive) for name, variable in STATIC.items()}
    columns |= {"gauge_lat": "gauge_lat", "gauge_lon": "gauge_lon"}
    sites = {}
    for path in paths:
        table = Table(path, ["gauge_id"], delimiter)
        ids, count = np.unique(table.columns["gauge_id"], return_counts=True)
        check(count.max() == 1, f"{path}: site {ids[count.argmax()]} twice")
        wanted = dict(columns)
        if not re.fullmatch(OFFICIAL, path.name):
            known = {"gauge_id", *[text.partition("*")[0] for text in columns.values()]}
            own = [name for name in table.columns
                   if name not in known and not re.fullmatch(HYDROATLAS, name)]
            wanted |= {name: name for name in own if table.is_numeric(name)}
            print(f"{path}: its own attributes {[*wanted.keys() & {*own}]}, "
                  f"text that is not read {sorted({*own} - wanted.keys())}")
        for name, text in wanted.items():
            column, _, factor = text.partition("*")
            if column in table.columns:
                values = table.numbers(column) * np.float32(factor or 1)
                for site, value in zip(table.columns["gauge_id"], values):
                    sites.setdefault(site, {})[name] = value
    return sites


OFFICIAL = "camels_.*|attributes_(caravan|hydroatlas|other)_.*"     # tables
HYDROATLAS = "[a-z]{3}_[a-z0-9]{2}_[a-z0-9]{3}"                         # columns


def read_series(table, lat, columns=SERIES):
    """{variable or target: (dates, values)} of a daily table; PET and humidity are derived.

    ValueError if it has no weather at all.
    """
    days = table.dates()
    series = {name: table.numbers(column) for column, name in columns.items()
              if column in table.columns}
    check(series.keys() & DYNAMIC.keys(),
          f"{table.path}: no weather among its columns {', '.join(table.columns)}")
    if {"tmax", "tmin"} <= series.keys() and not (series["tmax"] > series["tmin"]).any():
        series["temperature"] = series.pop("tmax")          # both are the daily mean, as in NLDAS
        del series["tmin"]
    tmax, tmin, t = series.get("tmax"), series.get("tmin"), series.get("temperature")
    if t is None and tmax is not None and tmin is not None:
        t = series["temperature"] = (tmax + tmin) / 2
    if t is not None and "pet" not in series:
        series["pet"] = potential_evaporation(lat, day_of_year(days), t, tmax, tmin)
    vapour, daylight = series.pop("vapour", None), series.pop("daylight", None)
    if "dewpoint" in series:
        vapour = saturation_pressure(series.pop("dewpoint"))
    if vapour is not None and t is not None:
        series["humidity"] = np.clip(100 * vapour / saturation_pressure(t), 0, 100)
    if daylight is not None and "shortwave" in series:      # mean over daylight -> over the day
        series["shortwave"] = series["shortwave"] * daylight / 86400
    return {name: (days, values) for name, values in series.items()}


class Table:
    """A text table: columns = {name in lower case: its fields}; complaints name file and line.

    delimiter None = blanks. FileNotFoundError, or ValueError for a required column that is missing
    and for a line with too few or many fields.
    """

    def __init__(self, path, required=(), delimiter=",", header=None, lines=slice(0, None)):
        self.path = path
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        rows = text.splitlines()[lines]
        if delimiter and ('"' in text or " " in text):
            rows = csv.reader(rows, delimiter=delimiter, skipinitialspace=True)
        else:                                   # nothing that only csv understands: split is faster
            rows = (row.split(delimiter) if row else [] for row in rows)
        fields, counts = [], {}                 # one flat list: many small ones would be slow
        try:
            for line, row in enumerate(rows, lines.start + 1):
                if row and header is None:
                    header = [name.strip().lower() for name in row]
                elif row:
                    fields += row
                    counts[line] = len(row)
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
        check(fields, f"{path}: no rows below the header")
        check(len(set(header)) == len(header), f"{path}: a column twice in {header}")
        for line, count in counts.items():
            if count != len(header):
                raise ValueError(f"{path}, line {line}: {count} fields, expected {len(header)}")
        absent = sorted(set(required) - set(header))
        check(not absent, f"{path}: no column {', '.join(absent)} among {', '.join(header)}")
        self.lines = list(counts)
        self.columns = {name: tuple(fields[i::len(header)]) for i, name in enumerate(header)}

    def is_numeric(self, name):
        """Whether each field of a column is a number or missing."""
        return not any(np.isinf(number(text)) for text in self.columns[name])

    def numbers(self, name):
        """(n,) float32; empty, NA, NULL and -999 = NaN."""
        # a daily column repeats its texts: each is read once
        values = np.array([*map(functools.cache(number), self.columns[name])])
        self.refuse(name, self.columns[name], abs(values) > 3.4e38)
        return np.where(values < -998, np.nan, values).astype(np.float32)

    def dates(self):
        """(n,) datetime64[D], from date (2000-01-31 or 2000/01/31) or from year, mnth, day."""
        names = ["date"] if "date" in self.columns else ["year", "mnth", "day"]
        fields, days = parse_dates(*[self.columns[name] for name in names])
        self.refuse("date", fields, np.isnat(days))
        return days

    def refuse(self, name, fields, bad):
        """ValueError for the first field that is bad."""
        for row in np.flatnonzero(bad):
            raise ValueError(f"{self.path}, line {self.lines[row]}: {name} is '{fields[row]}'")


def header_of(path):
    """The names in the first line of a csv, in lower case."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline().lower().replace('"', "").replace(" ", "").strip().split(",")


def number(text):
    """A field of a table -> float; NaN where it is missing, infinite if it is no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan if text in ("NA", "NULL") else np.inf


@functools.lru_cache(8)                     # many gauges of an archive have the same dates
def parse_dates(*columns):
    """Texts of dates, or of years, months and days -> the dates: (n,) texts and datetime64[D]."""
    fields = columns[0]
    if len(columns) == 3:
        fields = [f"{year}-{month:0>2}-{day:0>2}" for year, month, day in zip(*columns)]
    return fields, np.array([DAYS.get(text.replace("/", "-")) for text in fields], "datetime64[D]")


# every date that a table may hold, by its text
DAYS = {str(day): day for day in np.arange("1800-01-01", "2200-01-01", dtype="datetime64[D]")}


def saturation_pressure(temperature):
    """Of water vapour, degC -> Pa (FAO-56 eq. 11)."""
    return 610.8 * np.exp(17.27 * temperature / (temperature + 237.3))


def extraterrestrial_radiation(lat, doy):
    """Radiation at the top of the atmosphere in MJ/m2/d, lat in degrees (FAO-56 eq. 21)."""
    phi, angle = np.deg2rad(lat), 2 * np.pi * doy / 365
    tilt = 0.409 * np.sin(angle - 1.39)
    sunset = np.arccos(np.clip(-np.tan(phi) * np.tan(tilt), -1, 1))
    height = sunset * np.sin(phi) * np.sin(tilt) + np.cos(phi) * np.cos(tilt) * np.sin(sunset)
    return 37.6 * (1 + 0.033 * np.cos(angle)) * height


def potential_evaporation(lat, doy, temperature, tmax=None, tmin=None):
    """PET in mm/d from degC: Hargreaves where tmax and tmin exist, else Oudin et al. 2005."""
    if tmax is None or tmin is None:
        share = np.maximum(temperature + 5, 0) / 100
    else:
        share = 0.0023 * np.maximum(temperature + 17.8, 0) * np.sqrt(np.maximum(tmax - tmin, 0))
    return (extraterrestrial_radiation(lat, doy) / 2.45 * share).astype(np.float32)


def folds(sites, kind, k, seed=0):
    """Fold of each site, (N,) int in 0..k-1; a gauge that two archives hold has one fold.

    "pub", ungauged basins: a hash of seed and gauge, whatever other sites there are. "pur",
    ungauged regions: contiguous, of similar size. "none": fold -1, nothing is held out.
    """
    if kind == "none":
        return np.full(len(sites.ids), -1)
    gauges = [gauge(site) for site in sites.ids]
    if kind == "pub":
        digests = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in gauges]
        return np.array([int(digest, 16) % k for digest in digests])
    check(kind == "pur", f"hold-out '{kind}': expected pub, pur or none")
    lost = sites.ids[np.isnan(sites.latlon).any(1)]
    check(not len(lost), f"{len(lost)} sites have no coordinates, so no region: {lost[:3]}")
    place = dict(sorted(zip(gauges, sites.latlon.tolist())))            # each gauge once
    region = dict(zip(place, regions(on_sphere(list(place.values())), k, seed)))
    return np.array([region[name] for name in gauges])


def regions(xyz, k, seed):
    """k-means of unit vectors (N, 3), with an offset per region that balances their sizes: (N,)."""
    centres = xyz[np.random.default_rng(seed).choice(len(xyz), k, replace=False)]
    offset = np.zeros(k)
    for step in range(300):
        distance = ((xyz[:, None] - centres) ** 2).sum(-1)                      # (N, k)
        region = (distance + offset).argmin(1)                                  # (N,)
        sizes = np.bincount(region, minlength=k)                                # (k,)
        if step < 100:                      # first the regions, then their sizes
            sums = np.stack([xyz[region == j].sum(0) for j in range(k)])        # (k, 3)
            centres = sums / np.maximum(sizes, 1)[:, None]
        else:
            pressure = 0.1 * 0.98 ** (step - 100) * (sizes * k / len(xyz) - 1)
            offset += distance.min(1).mean() * pressure
    return region


def on_sphere(latlon):
    """Degrees (N, 2) -> unit vectors (N, 3)."""
    lat, lon = np.deg2rad(np.asarray(latlon, float)).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def gauge(site):
    """One name for a gauge that several archives hold: hysets_01022500, camels_… -> 01022500."""
    return site.removeprefix("camels_").removeprefix("hysets_")


def place(lat, lon):
    """Both as a Record wants them: None if neither is known."""
    return None if np.isnan(lat) and np.isnan(lon) else (lat, lon)


def day_of_year(dates):
    """(T,) dates -> 1..366."""
    return (dates - dates.astype("datetime64[Y]")).astype(int) + 1


def write_cache(folder, sites):
    """One array a file; the folder appears whole, or not at all."""
    arrays = vars(sites) | {f"extra-{name}": values for name, values in sites.extra.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        new = Path(temporary, folder.name)
        new.mkdir()
        for name in arrays.keys() - {"extra"}:
            np.save(new / name, arrays[name])
        if not folder.is_dir():                             # another process may have been faster
            new.rename(folder)


def read_cache(folder):
    """`Sites` whose arrays stay on disk until they are used; ValueError if they are damaged."""
    try:
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        for name in ("static_names", "dynamic_names"):
            arrays[name] = tuple(arrays[name].tolist())
        extra = {name[6:]: arrays.pop(name) for name in list(arrays) if name.startswith("extra-")}
        return Sites(**arrays, extra=extra)
    except Exception as error:
        raise ValueError(f"{folder} is damaged, delete it: {error}") from None


def write_atomically(path, write):
    """Call write(file) on a temporary file, then rename it to `path`: never half an output."""
    temporary = path.with_name(f".{path.name}.new")         # a killed one is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, what was there is kept: {error}") from None


def command(main):
    """main() for the command line: bad input is one line on stderr; --debug shows the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check(fine, complaint, error=ValueError):
    """Raise error(complaint) unless all is fine."""
    if not fine:
        raise error(complaint)

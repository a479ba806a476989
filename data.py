"""Sites: what the models see of the land surface, from a synthetic world or from real archives.

    load("synthetic")                    load("caravan:DIR,csv:DIR")             load("camels:DIR")

Every source becomes the same container, with one set of names and units; NaN = missing.
Axes: N sites, T days, C dynamic variables, S static attributes.
"""

import csv
import importlib
import re
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np


@dataclass
class Sites:
    """N sites with everything known of them; float32, NaN = missing."""
    ids: np.ndarray        # (N,) str, unique
    latlon: np.ndarray     # (N, 2) degrees
    static: np.ndarray     # (N, S)
    forcing: np.ndarray    # (N, T, C) daily
    target: np.ndarray     # (N, T) daily
    dates: np.ndarray      # (T,) datetime64[D], every day from the first to the last
    static_names: tuple
    dynamic_names: tuple
    extra: dict = field(default_factory=dict)   # what only the synthetic world knows, (N, ...) each

    @property
    def digest(self):
        """16 hexadecimal digits that differ wherever ids, places, values, days or names do."""
        content = blake2b(digest_size=8)
        for part in [*vars(self).values()][:-1]:            # all but the extra
            content.update(np.ascontiguousarray(part).view(np.uint8))
        return content.hexdigest()


# Each paragraph: kind and group, then of each variable its name, its unit and Caravan's column with
# its factor to our unit. A group is hidden together, "context" never. What HydroATLAS makes from
# gauges, such as run-off, is no input.
TABLE = """
static terrain   elevation m ele_mt_sav, elevation_max m ele_mt_smx, elevation_min m ele_mt_smn,
  slope deg slp_dg_sav*0.1, groundwater_depth m gwt_cm_sav*0.01, soil_depth m -;
static soil   clay % cly_pc_sav, silt % slt_pc_sav, sand % snd_pc_sav,
  organic_carbon t/ha soc_th_sav, soil_water % swc_pc_syr, soil_porosity - -, water_capacity m -;
static geology   karst % kar_pc_sse, carbonate % -, permeability log10m2 -, rock_porosity - -;
static vegetation   forest % for_pc_sse, cropland % crp_pc_sse, pasture % pst_pc_sse,
  inundation % inu_pc_smx, ndvi - -;
static climate   p_mean mm/d p_mean, p_seasonality - -, high_p_days d/yr high_prec_freq*365.25,
  low_p_days d/yr low_prec_freq*365.25, temperature_mean degC tmp_dc_syr*0.1,
  temperature_min degC tmp_dc_smn*0.1, temperature_max degC tmp_dc_smx*0.1,
  pet_mean mm/d pet_mm_syr*0.002738, aet_mean mm/d aet_mm_syr*0.002738, wetness - ari_ix_sav*0.01,
  snow_fraction - frac_snow, snow_cover % snw_pc_syr;
static context   area km2 area, lakes % lka_pc_sse*0.1, urban % urb_pc_sse,
  population_density 1/km2 ppd_pk_sav;
daily precipitation   precipitation mm/d total_precipitation_sum;
daily temperature   temperature degC temperature_2m_mean, tmax degC temperature_2m_max,
  tmin degC temperature_2m_min, pet mm/d -;
daily radiation   shortwave W/m2 -, net_shortwave W/m2 surface_net_solar_radiation_mean;
daily humidity   humidity % -;
other -   id - gauge_id, date - -, lat degN gauge_lat, lon degE gauge_lon, soil_moisture m3/m3 -,
  streamflow mm/d streamflow, dewpoint degC dewpoint_temperature_2m_mean"""
LIMITS = {"static mm/d": (0, 100), "mm/d": (0, 2000), "degC": (-90, 60), "W/m2": (-50, 1500),
          "%": (0, 100), "m": (-500, 9000), "deg": (0, 90), "d/yr": (0, 366), "km2": (0, 1e7),
          "1/km2": (0, 1e6), "t/ha": (0, 1e4), "m3/m3": (0, 1), "-": (-50, 1000),
          "degN": (-90, 90), "degE": (-360, 360)}           # by unit
Variable = namedtuple("Variable", "kind group unit")
VARIABLES, COLUMNS = {}, {}                                 # COLUMNS: theirs -> ours, factor
for paragraph in TABLE.split(";"):
    kind_of, group_of, *words = paragraph.replace(",", " ").split()
    for own_name, unit_of, column in zip(words[::3], words[1::3], words[2::3]):
        theirs, _, factor_of = column.partition("*")
        VARIABLES[own_name] = Variable(kind_of, group_of, unit_of)
        COLUMNS |= {own_name: (own_name, 1), theirs: (own_name, np.float32(factor_of or 1))}
del COLUMNS["-"]                                            # where Caravan has none
DYNAMIC = [name for name, row in VARIABLES.items() if row.kind == "daily"]


def groups(names):
    """The group of each variable. One of an unknown name is a group by itself, or with those of
    the same prefix: rock_granite, rock_marl and so on, one column a class, are the group "rock"."""
    known = {name: row.group for name, row in VARIABLES.items() if row.kind in ("static", "daily")}
    prefix = {name: name.partition("_")[0] for name in names if name not in known}
    count = Counter(prefix.values())
    classes = {name: text for name, text in prefix.items() if count[text] > 1}
    return tuple([known.get(name, classes.get(name, name)) for name in names])


def load(spec="synthetic", target="streamflow", cache="out/cache", quick=False):
    """"synthetic", or one or several real sources ("caravan:DIR,camels:DIR"), as one `Sites`.
    A source is a reader, of READERS or applications/NAME.py, and its folder. Parsed archives are
    kept under `cache` (None: not). ValueError, FileNotFoundError name what cannot be read."""
    if spec != "synthetic":
        sites = load_archives(spec, target, cache)
    else:
        sites = synthetic_world(n_sites=60, years=3) if quick else synthetic_world()
        check(target in ("streamflow", "soil_moisture"), f"the synthetic world has no {target}")
        sites = replace(sites, target=sites.extra[target])
    describe(spec, sites, target)
    return sites


def describe(spec, sites, target):
    """Print a row a variable, which shows wrong units and gaps; ValueError beyond its limits."""
    print(f"{spec}: {len(sites.ids)} sites, {sites.dates[0]} to {sites.dates[-1]}")
    print(f"  {'':<22}{'unit':>8}{'mean':>10}{'lowest':>10}{'highest':>10}  missing  sites")
    table = dict(zip(("lat", "lon"), sites.latlon.T[..., None]))                # (N, 1) each
    table |= dict(zip(sites.dynamic_names, np.moveaxis(sites.forcing, -1, 0)))  # (N, T) each
    table |= {target: sites.target} | dict(zip(sites.static_names, sites.static.T[..., None]))
    for name, x in table.items():
        known, (kind, _, unit) = np.isfinite(x), VARIABLES.get(name, ("", "", ""))
        some = x[known] if known.any() else np.full(1, np.nan)
        print(f"  {name:<22}{unit:>8}{some.mean(dtype=float):>10.4g}{some.min():>10.4g}"
              f"{some.max():>10.4g}{1 - known.mean():>9.0%}{known.any(1).sum():>7}")
        low, high = LIMITS.get(f"{kind} {unit}") or LIMITS.get(unit, (-np.inf, np.inf))
        for i, day in np.argwhere((x < low) | (x > high)):
            raise ValueError(f"{spec}: site {sites.ids[i]}: {name} {x[i, day]:g} is not {low:g} to "
                             f"{high:g} {unit}; if it means missing, write an empty field")
    if target == "streamflow" and "precipitation" in table:
        rain, flow = np.ma.masked_invalid([table["precipitation"], table[target]])      # (N, T)
        ratios = (flow + 0 * rain).sum(1) / (rain + 0 * flow).sum(1)    # of days that have both
        ratio = float(np.ma.filled(np.ma.median(ratios), np.nan))
        doubt = ": are both in mm/d?" if ratio < 0.01 or ratio > 2 else ""
        print(f"  streamflow / precipitation at the median site: {ratio:.3g}{doubt}")
    for what, x in (("attributes", sites.static), ("weather", sites.forcing),
                    ("place", sites.latlon.sum(1)), (target, sites.target)):
        tell(f"  without {what}", sites.ids[np.isnan(x).reshape(len(x), -1).all(1)])


def tell(text, names):
    """Print "text: 12 (a, b, c …)" for twelve names; nothing if there are none."""
    if len(names):
        print(f"{text}: {len(names)} ({', '.join(map(str, names[:3]))}{' …' * (len(names) > 3)})")


def synthetic_world(seed=0, n_sites=700, years=6):
    """A world with StefaLand's premise: attributes, weather and targets follow from hidden latents,
    smooth fields of place plus local noise. Attributes are noisy views of them, a third of their
    groups missing; flow (mm/d) and soil moisture come from a bucket. Same seed, same bytes."""
    rng, N = np.random.default_rng(seed), n_sites

    def noise(size):
        return size * rng.standard_normal((N, 1))

    def logistic(x):
        return 0.5 + 0.5 * np.tanh(x / 2)

    def latent(scale=2.0, local=0.3):       # (N, 1)
        waves = xyz @ (scale * rng.standard_normal((3, 64))) + rng.uniform(0, 2 * np.pi, 64)
        smooth = np.cos(waves).sum(1, keepdims=True)
        return (smooth - smooth.mean()) / smooth.std() + noise(local)

    # places on land-like parts of the sphere, and what they are like; all of it (N, 1)
    xyz = rng.standard_normal((20 * N, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    land = (np.sin(4 * xyz).sum(1) > 0.7) & (abs(xyz[:, 2] - 0.06) < 0.88)      # 55 S to 70 N
    xyz = xyz[land][:N]
    lat, lon = np.rad2deg(np.arcsin(xyz[:, 2:])), np.rad2deg(np.arctan2(xyz[:, 1:2], xyz[:, :1]))
    relief, wet, inland = 0.9 * latent(3, 0.5), 0.9 * latent(), logistic(1.5 * latent())
    rock, lime, warmth = latent(), latent(), 26 - 32 * xyz[:, 2:] ** 2
    elevation = 350 * np.exp(0.9 * relief)                                      # m
    t_mean = warmth - 0.004 * elevation + noise(0.7)                            # degC
    weathered = logistic((t_mean - 12) / 6) * np.tanh(wet)
    parts = np.exp([1.1 * weathered + 0.5 * lime - 0.5 * rock - 0.6, 0.6 * inland - 0.2,
                    0.8 * rock - 0.5 * weathered])
    clay, silt, sand = 100 * parts / parts.sum(0)                               # %
    depth = 1.2 * np.exp(0.5 * weathered - 0.45 * relief + noise(0.2))          # m
    growth = np.tanh(np.maximum(0.9 + wet, 0)) * logistic((t_mean - 5) / 6)
    forest = 100 * logistic(6 * (growth - 0.55) + 0.8 * np.log(depth) + noise(0.4))    # %
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
        "carbonate": 100 * logistic(4 * (lime - 0.7) + noise(0.6)),
        "permeability": rock + noise(0.6) - 13, "ndvi": 0.1 + 0.75 * growth + noise(0.06),
        "rock_porosity": 0.03 + 0.25 * logistic(1.5 * rock + noise(0.6)),
        "forest": np.clip(forest + noise(6), 0, 100),
        "pasture": np.clip((100 - forest) * growth + noise(6), 0, 100),
        "p_mean": rain * np.exp(noise(0.1)), "pet_mean": pet * np.exp(noise(0.05)),
        "temperature_mean": t_mean + noise(0.5), "snow_fraction": snowfall / rain + noise(0.02),
        "area": np.exp(6 + noise(1)), "population_density": np.exp(2 + growth - relief + noise(1))}
    static, group_of = np.hstack([*views.values()], dtype=np.float32), np.array(groups(views))
    for group in sorted({*group_of.tolist()} - {"context"}):                    # a third is missing
        static[np.ix_(rng.random(N) < 1 / 3, group_of == group)] = np.nan       # (N, S)
    daily = daily.astype(np.float32)
    return Sites(
        np.array([f"synthetic_{i:04d}" for i in range(N)]), np.hstack([lat, lon], dtype=np.float32),
        static, daily[..., :6], daily[..., 6], dates, tuple(views),
        ("precipitation", "tmax", "tmin", "pet", "shortwave", "humidity"),
        {"streamflow": daily[..., 6], "soil_moisture": daily[..., 7], "latents": np.float32(
            np.hstack([relief, wet, inland, rock, lime, growth, depth, t_mean / 10]))})     # (N, 8)


# Real archives: a reader takes a folder and yields a Record for each site.

# A site as an archive knows it: id; file to name in complaints; latitude and longitude, NaN: not
# known; attributes {name: value}; dates (T,) datetime64[D], each once; {daily variable: (T,)}.
Record = namedtuple("Record", "id file latlon static dates series")


def load_archives(spec, target, cache):
    """The sites of all sources; from the cache, if neither files nor readers have changed."""
    readers = Path(__file__).parent / "applications"
    sources, files = [], [Path(__file__), *sorted(readers.glob("*.py"))]
    for kind, _, folder in [part.partition(":") for part in spec.split(",")]:
        check(kind in READERS or (readers / f"{kind}.py").is_file(), f"data '{kind}:{folder}': "
              f"neither csv nor caravan, nor is there an applications/{kind}.py that reads it")
        check(folder and Path(folder).is_dir(), f"data '{kind}:{folder}': no such folder")
        read = READERS.get(kind) or importlib.import_module(f"applications.{kind}").read
        sources.append((read, Path(folder)))
        files += sorted(filter(Path.exists, Path(folder).rglob("*")))   # no dangling links
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = sha256(repr([spec, target, states]).encode()).hexdigest()[:16]
    if cache and Path(cache, key).is_dir():
        return read_cache(Path(cache, key))
    records = [complete(record) for read, folder in sources for record in read(folder)]
    check(records, f"{spec}: no site found")
    sites = assemble(records, target)
    return write_cache(Path(cache, key), sites) if cache else sites


def complete(record):
    """The record without empty series, and with what follows from the others."""
    series = {name: x for name, x in record.series.items() if not np.isnan(x).all()}
    if {"tmax", "tmin"} <= series.keys():
        tmax, tmin = series["tmax"], series["tmin"]
        check((tmin > tmax).sum() <= (tmin <= tmax).sum(), f"{record.file}: tmin is above tmax")
        series.setdefault("temperature", (tmax + tmin) / 2)
        if not (tmax > tmin).any():                         # both are the daily mean, as in NLDAS
            del series["tmax"], series["tmin"]
    t = series.get("temperature")
    if t is not None and "pet" not in series:
        series["pet"] = potential_evaporation(record.latlon[0], day_of_year(record.dates), t,
                                              series.get("tmax"), series.get("tmin"))
    if t is not None and "dewpoint" in series:
        share = saturation_pressure(series.pop("dewpoint")) / saturation_pressure(t)
        series["humidity"] = np.clip(100 * share, 0, 100)
    return record._replace(series=series)


def assemble(records, target):
    """`Sites` on the union of the records' dates and variables; unknown attributes come last."""
    ids, count = np.unique([record.id for record in records], return_counts=True)
    check(count.max() == 1, f"{records[0].file.parent}: site {ids[count.argmax()]} is there twice")
    known = set().union(*[record.static for record in records])
    tell("daily variables among the attributes, left out", sorted(known & {*DYNAMIC, target}))
    known = known - {*DYNAMIC, target} or {"elevation"}     # one at least, if all missing
    static_names = [name for name in VARIABLES if name in known] + sorted(known - {*VARIABLES})
    series = set().union(*[record.series for record in records])
    dynamic_names = [name for name in DYNAMIC if name in series - {target}] or ["precipitation"]
    tell("neither weather nor the target, left out", sorted(series - {*dynamic_names, target}))
    days = np.concatenate([record.dates for record in records])
    days = days if len(days) else np.arange("1970", "1971", dtype="datetime64[D]")
    dates = np.arange(days.min(), days.max() + 1)

    static = np.full((len(records), len(static_names)), np.nan, np.float32)     # (N, S)
    daily = np.full((len(records), len(dates), len(dynamic_names) + 1), np.nan, np.float32)
    for i, record in enumerate(records):
        static[i] = [record.static.get(name, np.nan) for name in static_names]
        day = (record.dates - dates[0]).astype(int)
        check(len({*day}) == len(day), f"{record.file}: the same date twice")
        for v, name in enumerate([*dynamic_names, target]):                     # the target is last
            daily[i, day, v] = record.series.get(name, np.nan)
    daily[(daily < 0) & (daily > -1e-6)] = 0                # rounding noise
    return Sites(np.array([record.id for record in records]),
                 np.array([record.latlon for record in records], np.float32), static,
                 daily[..., :-1], daily[..., -1], dates, tuple(static_names), tuple(dynamic_names))


def read_basins(folder):
    """Basins in Caravan's layout (doi 10.1038/s41597-023-01975-w), or your own: sites.csv: id, lat,
    lon (empty: unknown), attributes, named as in TABLE or in your own way; and <id>.csv, for sites
    with daily data: date, weather named as there, in its units, the target, as streamflow in mm/d.
    Of Caravan the gauges that have a series, without its potential evaporation, far too high."""
    own = (folder / "sites.csv").is_file()
    tables = [folder / "sites.csv"] if own else sorted(folder.glob("attributes/*/attributes_*.csv"))
    files = sorted(folder.glob("*.csv" if own else "timeseries/csv/*/*.csv"))
    files = {path.stem: path for path in files if path.name != "sites.csv"}
    check(tables, f"{folder}: no site found, neither sites.csv nor attributes/*/attributes_*.csv")
    attributes = read_attributes(tables)
    compare_ids(folder, attributes, files)
    for site in attributes if own else sorted(attributes.keys() & files.keys()):
        static = dict(attributes[site])
        place = static.pop("lat", np.nan), static.pop("lon", np.nan)
        series = read_table(files[site], "date") if site in files else {"date": NEVER}
        yield Record(site, files.get(site, tables[0]), place, static, series.pop("date"), series)


def compare_ids(folder, rows, files):
    """Tell rows without a file and files without a row; ValueError if zeros make the difference."""
    no_file, no_row = sorted({*rows} - {*files}), sorted({*files} - {*rows})
    ids, names = [{re.sub("(^|_)0+", r"\1", site) for site in some} for some in (no_file, no_row)]
    check(not ids & names, f"{folder}: ids and files differ in leading zeros: {[*ids & names][:3]}")
    tell(f"{folder}: sites without a daily table", no_file)
    tell(f"{folder}: daily tables without a row of attributes", no_row)


def read_attributes(tables, **layout):
    """Tables joined on the site's id -> {site: {name: value}}."""
    sites = defaultdict(dict)
    for path in tables:
        table = read_table(path, "id", **layout)
        ids = table.pop("id").tolist()
        site, count = Counter(ids).most_common(1)[0]
        check(count == 1, f"{path}: site {site} twice")
        for site, *values in zip(ids, *table.values()):
            # an empty field takes nothing away
            sites[site] |= {k: x for k, x in zip(table, values) if x == x or k not in sites[site]}
    return sites


READERS = {"caravan": read_basins, "csv": read_basins}      # beside read in applications/NAME.py
NEVER = np.array([], "datetime64[D]")                       # of a site without daily data
DAYS = {str(day): day for day in np.arange("1850", "2101", dtype="datetime64[D]")}
OFFICIAL = "/attributes_(caravan|hydroatlas|other)_|/timeseries/csv/"       # Caravan's own tables


def read_table(path, key, delimiter=",", skiprows=0, columns=COLUMNS):
    """A csv, or if delimiter is None a table with blanks: {our name: (n,) values}; ids are str,
    dates datetime64[D], all else float32; NaN = missing: empty, NA, NULL, -999 and below.
    Of Caravan's own tables, and if `columns` are given, only known columns are read. An unknown one
    that is text is told and not read. FileNotFoundError; ValueError names file, line and column."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        csv.field_size_limit(2 ** 31 - 1)                   # outlines of basins are long texts
        rows = csv.reader(file, delimiter=delimiter or " ", skipinitialspace=True)
        rows = [row for row in (rows if delimiter else map(str.split, file)) if row][skiprows:]
    check(rows, f"{path}: it is empty")
    header, result = [text.strip().lower() for text in rows[0]], {}
    ours = [columns.get(column, (column,))[0] for column in header]
    check(len({*ours}) == len(ours), f"{path}: a column twice, or under two names, in {header}")
    ragged = [line for line, row in enumerate(rows, skiprows + 1) if len(row) != len(header)]
    hint = " (fields separated by ';'? expected ',')" if ";" in header[0] else ""
    check(not ragged, f"{path}, line {ragged[:1]}: expected {len(header)} fields{hint}")
    official = re.search(OFFICIAL, path.as_posix())
    for column, texts in zip(header, zip(*rows[1:])):
        # of HydroATLAS' other columns some are made from gauges
        unread = official or columns is not COLUMNS or re.fullmatch("[a-z]{3}_.._.{3}", column)
        name, factor = columns.get(column, ("" if unread else column, 1))
        if (name in FIELDS and name != key) or (official and column == "pet_mean"):
            name = ""                                       # repeated ids; Caravan's own, too high
        kind, convert, expected = FIELDS.get(name, (np.float32, number, "a number"))
        values = [convert(text) for text in texts] if name else []
        if None in values:
            row = values.index(None)
            complaint = f"{path}, line {row + skiprows + 2}: {column} is '{texts[row]:.40}', "
            check(column not in columns, complaint + f"expected {expected}")
            print(complaint + "a column of text, not read")
        elif name:
            values = np.array(values, kind)
            result[name] = values if factor == 1 else values * factor
    check(len(result.get(key, ())), f"{path}: no row, or no column {key} among {header}{hint}")
    return result


def number(text):
    """A field of a table -> float, NaN where it is missing; None if it is no number."""
    try:
        value = float(text)
    except ValueError:
        return np.nan if text.strip() in ("", "NA", "NULL") else None
    if -998 < value < 3e38:
        return value
    return None if abs(value) > 3e38 else np.nan


def day(text):
    return DAYS.get(text) or DAYS.get(text.strip().replace("/", "-"))


def site_id(text):
    return text.strip() if re.fullmatch(r"[^/\\]+", text.strip()) else None


FIELDS = {"id": (str, site_id, "a name that a file can have, without / and \\"),
          "date": ("datetime64[D]", day, "2000-01-31 or 2000/01/31, from 1850 to 2100")}


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
    ungauged regions: contiguous, of one size. "none": fold -1, nothing is held out."""
    check(kind in ("pub", "pur", "none"), f"hold-out '{kind}': expected pub, pur or none")
    if kind == "none":
        return np.full(len(sites.ids), -1)
    gauges = [gauge(site) for site in sites.ids]
    if kind == "pub":
        return np.array([int(sha256(f"{seed}:{x}".encode()).hexdigest(), 16) % k for x in gauges])
    check(not np.isnan(sites.latlon).any(), "hold-out pur: sites without a place have no region")
    place = dict(sorted(zip(gauges, sites.latlon.tolist())))            # each gauge once
    region = dict(zip(place, regions(on_sphere(list(place.values())), k)))
    return np.array([region[name] for name in gauges])


def regions(xyz, k):
    """Region of each unit vector, (N, 3) -> (N,): cut across where they are widest, and again."""
    region = np.zeros(len(xyz), int)
    if k > 1:
        widest = np.linalg.svd(xyz - xyz.mean(0), full_matrices=False)[2][0]    # (3,)
        west = (xyz @ widest).argsort().argsort() < len(xyz) * (k // 2) // k    # by rank
        region[west] = regions(xyz[west], k // 2)
        region[~west] = k // 2 + regions(xyz[~west], k - k // 2)
    return region


def on_sphere(latlon):
    """Degrees (N, 2) -> unit vectors (N, 3)."""
    lat, lon = np.deg2rad(np.asarray(latlon, float)).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def gauge(site):
    """One name for a gauge that several archives hold: hysets_01022500, camels_… -> 01022500."""
    return site.removeprefix("camels_").removeprefix("hysets_")


def day_of_year(dates):
    """(T,) dates -> 1..366."""
    return (dates - dates.astype("datetime64[Y]")).astype(int) + 1


def write_cache(folder, sites):
    """The same sites, one array a file; the folder appears whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as new:
        for name in vars(sites).keys() - {"extra"}:         # empty, of an archive
            np.save(Path(new, name), getattr(sites, name))
        if not folder.is_dir():                             # another process may have been faster
            Path(new).rename(folder)
    return read_cache(folder)


def read_cache(folder):
    """`Sites` whose arrays stay on disk until they are used; ValueError if they are damaged."""
    try:
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        for name in ("static_names", "dynamic_names"):
            arrays[name] = tuple(arrays[name].tolist())
        return Sites(**arrays)
    except Exception as error:
        raise ValueError(f"{folder} is damaged, delete it: {error}") from None


def write_atomically(path, write):
    """Call write(file) on a temporary file, then rename it to `path`: never half an output."""
    temporary = path.with_name(f".{path.name}.new")         # a killed one is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:                # torch's, of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, what was there is kept: {error}") from None


def command(main):
    """main() for the command line: bad input is one line on stderr; --debug shows the traceback."""
    told = () if "--debug" in sys.argv else (ValueError, OSError, FloatingPointError)
    sys.argv = [text for text in sys.argv if text != "--debug"]
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except told as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check(fine, complaint, error=ValueError):
    """Raise error(complaint) unless all is fine."""
    if not fine:
        raise error(complaint)

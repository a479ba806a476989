"""Sites: what the models see of the land surface, from a synthetic world or from real archives.

    load("synthetic")                    load("camels:DIR,caravan:DIR")

Every source becomes the same container, with one set of names and units; NaN = missing.
Axes: N sites, T days, C dynamic variables, S static attributes.
"""

import csv
import hashlib
import os
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

# name, group (hidden together; "context" never), unit, column of Caravan and of CAMELS-US; run-off,
# discharge and what else HydroATLAS derives from gauges are no inputs
STATIC = """
elevation           terrain     m        ele_mt_sav             elev_mean
elevation_max       terrain     m        ele_mt_smx             -
elevation_min       terrain     m        ele_mt_smn             -
slope               terrain     deg      slp_dg_sav*0.1         slope_mean*0.0573
groundwater_depth   terrain     m        gwt_cm_sav*0.01        -
soil_depth          terrain     m        -                      soil_depth_pelletier
clay                soil        %        cly_pc_sav             clay_frac
silt                soil        %        slt_pc_sav             silt_frac
sand                soil        %        snd_pc_sav             sand_frac
organic_carbon      soil        t/ha     soc_th_sav             -
soil_water          soil        %        swc_pc_syr             -
soil_porosity       soil        -        -                      soil_porosity
water_capacity      soil        m        -                      max_water_content
carbonate           geology     %        kar_pc_sse             carbonate_rocks_frac*100
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
"""
DYNAMIC = """
precipitation       precipitation  mm/d  total_precipitation_sum  prcp(mm/day)
temperature         temperature    degC  temperature_2m_mean      -
tmax                temperature    degC  temperature_2m_max       tmax(C)
tmin                temperature    degC  temperature_2m_min       tmin(C)
pet                 temperature    mm/d  -                        -
shortwave           radiation      W/m2  -                        srad(W/m2)
humidity            humidity       %     -                        -
"""
STATIC, DYNAMIC = ({name: row for name, *row in map(str.split, table.strip().splitlines())}
                   for table in (STATIC, DYNAMIC))
SERIES = {column: name for name, row in DYNAMIC.items() for column in (name, *row[2:])} | {
    "streamflow": "streamflow", "dayl(s)": "daylight", "vp(Pa)": "vapour"}   # columns of tables
GROUP = {name: row[0] for name, row in (STATIC | DYNAMIC).items()}


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
    patches: np.ndarray    # (N, K, H, W) maps round each site, or (N, 0)
    vectors: np.ndarray    # (N, 64) AlphaEarth's embedding of each site, or (N, 0)


def load(spec="synthetic", target="streamflow", seed=0, cache="out/cache", static_only=False,
         quick=False):
    """"synthetic", or one or several real sources ("caravan:DIR,camels:DIR"), as one `Sites`.

    Archives are parsed once and kept under `cache` (None: not), keyed on this code and on every
    file's path, size and time. static_only: without weather, and also the sites that have none.
    """
    if spec == "synthetic" and target in ("height", "landcover"):
        return assemble(synthetic_tiles(target, seed), target)
    if spec == "synthetic":
        sites = synthetic_world(seed, *(60, 3) if quick else (700, 6), target)
        bare = dict(forcing=sites.forcing[:, :1] * np.nan, dates=sites.dates[:1])
        return replace(sites, **bare if static_only else {})
    sources, key = [part.partition(":")[::2] for part in spec.split(",")], [target, static_only]
    for kind, folder in sources:
        check(kind in READERS, f"data '{kind}': expected synthetic, or NAME:DIR with {[*READERS]}")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"data {kind}: no folder '{folder}'")
        key += [kind] + [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns)
                         for p in [Path(__file__), *sorted(Path(folder).rglob("*"))]]
    folder = Path(cache or "", hashlib.sha256(repr(key).encode()).hexdigest()[:16])
    files = {field.name: folder / f"{field.name}.npy" for field in fields(Sites)}
    if not (cache and all(path.exists() for path in files.values())):
        records = [site for kind, folder in sources for site in READERS[kind](Path(folder))]
        check(records, f"{spec}: no site found")
        if static_only:                     # each gauge once, and not those known by little
            most = max(len(known) for _, _, known, _ in records)
            once = {gauge(site[0]): site for site in reversed(records) if len(site[2]) > most / 2}
            kept = [(*site[:3], {}) for site in reversed(once.values())]
        else:
            kept = [site for site in records if site[3]] or records
        print(f"{spec}: {len(records) - len(kept)} of {len(records)} sites left out, they lack "
              + ("most attributes" if static_only else "a daily series"))
        sites = assemble(kept, target)
        for name, path in files.items() if cache else ():   # another process may do so, too
            write_atomically(path, lambda file: np.save(file, getattr(sites, name)), os.getpid())
    if cache:                               # what is not used stays on disk
        try:
            arrays = {name: np.load(path, mmap_mode="r") for name, path in files.items()}
            sites = Sites(**arrays | {k: tuple(arrays[k].tolist()) for k in arrays if "names" in k})
        except Exception as error:
            raise ValueError(f"{folder} is damaged ({error}): delete it") from None
    print(f"{spec}: {len(sites.ids)} sites, {sites.dates[0]} to {sites.dates[-1]}; daily "
          f"{', '.join(sites.dynamic_names)}; {len(sites.static_names)} attributes, "
          f"{np.isnan(sites.static).sum()} of {sites.static.size} values missing")
    return sites


def synthetic_world(seed=0, n_sites=700, years=6, target="streamflow"):
    """A world with StefaLand's premise: attributes, weather and targets follow from hidden latents.

    Latents are smooth fields of place plus local noise. Attributes are noisy views of them, a third
    of their groups missing; flow (mm/d) and soil moisture (m3/m3) come from a bucket that the
    latents shape; landslides follow slope, wetness and roots. Same seed, same bytes.
    """
    rng, N = np.random.default_rng(seed), n_sites

    def noise(size, columns=1):
        return size * rng.standard_normal((N, columns))

    def share(x):                           # the logistic function
        return 0.5 + 0.5 * np.tanh(x / 2)

    def field(scale=2.0, local=0.3):        # a latent, (N, 1)
        waves = xyz @ (scale * rng.standard_normal((3, 64))) + rng.uniform(0, 2 * np.pi, 64)
        smooth = np.cos(waves).sum(1, keepdims=True)
        return (smooth - smooth.mean()) / smooth.std() + noise(local)

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
    # daily weather, a wet/dry chain and red noise; and the bucket, mm: snow, soil, groundwater
    dates = np.arange("1995-01-01", f"{1995 + years}-01-01", dtype="datetime64[D]")
    rains, anomaly, snow, soil, ground, days = 0, 0, 0 * lat, 0.5 * capacity, 20 + 0 * lat, []
    for doy in day_of_year(dates):
        summer = np.cos(2 * np.pi * (doy - 197) / 365.25) * np.sign(lat)
        p_wet = 0.3 + 0.12 * np.tanh(wet)
        rains = rng.random((N, 1)) < p_wet * (1 + 0.3 * summer) + 0.35 * (rains - p_wet)
        rain = rains * np.exp(0.75 + 0.5 * wet) / p_wet * rng.gamma(0.8, 1.25, (N, 1))
        anomaly = 0.75 * anomaly + noise(0.66)
        t = (t_mean + (1 + (16 + 14 * inland) * np.abs(lat) / 60) * summer
             + (1.5 + 2.5 * inland) * anomaly)
        swing = (7 + 8 * inland - 3 * growth) * (1.1 - 0.45 * rains)
        tmax, tmin = t + swing / 2, t - swing / 2
        pet = potential_evaporation(lat, doy, t, tmax, tmin)
        clear = 0.7 - 0.3 * rains - 0.1 * growth + noise(0.05)
        humidity = np.clip(55 + 20 * growth + 15 * rains - 0.8 * swing + noise(4), 8, 100)
        melt, fill = np.minimum(snow, 3 * np.maximum(t - 0.5, 0)), soil / capacity
        snow, water = snow + rain * (t < 0.5) - melt, rain * (t >= 0.5) + melt
        quick = np.maximum(water * fill ** (1.2 + 0.04 * sand), soil + water - capacity)
        drain, base = (0.004 + 0.0004 * sand) * soil * fill, recession * ground
        evaporation = pet * np.minimum(1, 2 * fill) * (0.4 + 0.004 * forest)
        soil = np.maximum(soil + water - quick - drain - evaporation, 0)
        ground = ground + drain + 0.1 * quick - base
        sun = extraterrestrial_radiation(lat, doy) * 11.574 * clear             # W/m2
        days.append((rain, tmax, tmin, pet, sun, humidity, 0.9 * quick + base,
                     0.002 * clay + 0.001 * soil / depth))
    daily = np.stack(days)[..., 0].transpose(2, 0, 1)                           # (N, T, 8)
    rain, mean_pet = daily[..., 0].mean(1)[:, None], daily[..., 3].mean(1)[:, None]
    snowy = (daily[..., 0] * (daily[..., 1:3].sum(-1) < 1)).mean(1)[:, None] / rain
    views = {  # what is observed: the latents through noise
        "elevation": elevation * np.exp(noise(0.05)), "soil_depth": depth * np.exp(noise(0.4)),
        "slope": 4 * np.exp(0.7 * relief + noise(0.4)), "clay": np.clip(clay + noise(6), 0, 100),
        "silt": np.clip(silt + noise(6), 0, 100), "sand": np.clip(sand + noise(6), 0, 100),
        "organic_carbon": 60 * np.exp(0.8 * growth - 0.04 * t_mean + noise(0.4)),
        "carbonate": 100 * share(4 * (lime - 0.7) + noise(0.6)),
        "permeability": rock + noise(0.6) - 13, "ndvi": 0.1 + 0.75 * growth + noise(0.06),
        "rock_porosity": 0.03 + 0.25 * share(1.5 * rock + noise(0.6)),
        "forest": np.clip(forest + noise(6), 0, 100),
        "pasture": np.clip((100 - forest) * growth + noise(6), 0, 100),
        "p_mean": rain * np.exp(noise(0.1)), "pet_mean": mean_pet * np.exp(noise(0.05)),
        "temperature_mean": t_mean + noise(0.5), "snow_fraction": snowy + noise(0.02),
        "area": np.exp(6 + noise(1)), "population_density": np.exp(2 + growth - relief + noise(1))}
    static = np.hstack([*views.values()])                                       # (N, S)
    groups = np.array([GROUP[name] for name in views])
    for group in sorted({*groups} - {"context"}):
        static[np.ix_(rng.random(N) < 1 / 3, groups == group)] = np.nan
    # 10 m maps of the height above the site and of slope, (N, 17, 17)
    waves = np.cos(np.pi * np.arange(4)[:, None] * (np.arange(17) + 0.5) / 17)
    height = np.einsum("nij,ih,jw->nhw", rng.standard_normal((N, 4, 4)), waves, waves)
    height *= (3 * np.exp(0.5 * relief))[:, None]
    steep = np.rad2deg(np.arctan(np.hypot(*np.gradient(height, 10.0, axis=(1, 2)))))
    slides = 0.12 * (steep[:, 8, 8:9] - 14) + 1.5 * wet - 0.02 * forest + noise(0.7) > 0
    latents = np.hstack([relief, wet, inland, rock, lime, growth, depth, t_mean / 10])
    targets = dict(streamflow=daily[..., 6], soil_moisture=daily[..., 7], landslide=slides[:, 0])
    arrays = dict(latlon=np.hstack([lat, lon]), static=static, forcing=daily[..., :6],
                  target=targets[target], patches=np.stack([height, steep], 1),
                  vectors=np.tanh(latents @ rng.standard_normal((8, 64)) + noise(0.3, 64)))
    return Sites(np.array([f"synthetic_{i:04d}" for i in range(N)]), dates=dates,
                 static_names=tuple(views), dynamic_names=(
                     "precipitation", "tmax", "tmin", "pet", "shortwave", "humidity"),
                 **{name: x.astype(np.float32) for name, x in arrays.items()})


# Real archives. A reader yields sites: (id, file, {attribute: value}, {series: (dates, values)});
# a target that is one value per site, and "patch", stand among the attributes.

def assemble(records, target):
    """What the readers yield -> `Sites` on the union of dates and variables."""
    ids, files, attributes, series = zip(*records)
    twice = [f"{file}: site {i}" for file, i in zip(files, ids) if ids.count(i) > 1]
    check(not twice, f"{twice[-1:]} was already read from another file")
    known = {name for a in attributes for name, value in a.items() if np.ndim(value) == 0}
    known -= {"gauge_lat", "gauge_lon", target}
    static_names = tuple(sorted(known, key=[*STATIC, *sorted(known)].index))
    dynamic_names = tuple(n for n in DYNAMIC if any(n in s for s in series)) or ("precipitation",)
    ends = [end(days) for s in series for days, _ in s.values() for end in (np.min, np.max)]
    dates = np.arange(min(ends, default=0), max(ends, default=0) + 1, dtype="datetime64[D]")
    daily = np.full((len(ids), len(dates), len(dynamic_names) + 1), np.nan, np.float32)

    def columns(*names):                                    # (N, names)
        return np.array([[a.get(n, np.nan) for n in names] for a in attributes], np.float32)

    lat, lon = columns("gauge_lat", "gauge_lon").T
    for i, (file, site) in enumerate(zip(files, ids)):
        place = f"{file}: site {site}"
        check(not (abs(lat[i]) > 90 or abs(lon[i]) > 360),
              f"{place} has coordinates {lat[i]}, {lon[i]}")
        check(not attributes[i].get("area", 1) <= 0, f"{place} has an area of 0 or less")
        for c, name in enumerate((*dynamic_names, target)):
            days, values = series[i].get(name, (dates[:0], ()))
            check(len(np.unique(days)) == len(days), f"{place} has the same date twice")
            daily[i, (days - dates[0]).astype(int), c] = values
    one = any(target in a for a in attributes)              # value, or map, for each site
    patches = np.array([a.get("patch", ()) for a in attributes], np.float32)
    return Sites(np.array(ids), np.stack([lat, (lon + 180) % 360 - 180], 1), columns(*static_names),
                 daily[..., :-1], columns(target)[:, 0] if one else daily[..., -1], dates,
                 static_names, dynamic_names, patches, np.empty((len(ids), 0), np.float32))


def read_table(path, numbers, required=(), delimiter=",", header=None, rows=slice(0, None)):
    """A text table's columns: float32 for `numbers`, days for "date", else text.

    delimiter None = blanks; empty, NA and -999 = NaN. ValueError names the file and its line and
    value, or the required column that is missing.
    """
    check(Path(path).is_file(), f"{path} is not a file")
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()[rows]
    split = map(str.split, lines) if delimiter is None else csv.reader(
        lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        table = [(line, row) for line, row in enumerate(split, rows.start + 1) if row]
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None
    header = header or (table and [name.strip() for name in table.pop(0)[1]])
    check(table, f"{path}: no rows below the header")
    check(len({*header}) == len(header), f"{path}: a column twice in {header}")
    for line, row in table:
        check(len(row) == len(header),
              f"{path}, line {line}: {len(row)} fields, expected {len(header)}")
    columns = dict(zip(header, zip(*(row for _, row in table))))
    if {"Year", "Mnth", "Day"} <= columns.keys():
        ymd = zip(columns["Year"], columns["Mnth"], columns["Day"])
        columns["date"] = [f"{year}-{month:0>2}-{day:0>2}" for year, month, day in ymd]
    absent = {*required} - columns.keys()
    check(not absent, f"{path}: no column {', '.join(sorted(absent))} among {header}")
    for name in columns.keys() & {"date", *numbers}:
        convert, kind = (DAYS.get, "datetime64[D]") if name == "date" else (number, np.float32)
        values = [convert(field) for field in columns[name]]
        if None in values:
            i = values.index(None)
            raise ValueError(f"{path}, line {table[i][0]}: {name} is '{columns[name][i]}'")
        columns[name] = np.array(values, kind)
    return columns


def number(field):
    """A field -> float; NaN for -999, NA and empty, None for what is no float32."""
    try:
        value = float(field or "nan")
    except ValueError:
        return np.nan if field in ("NA", "NULL") else None
    if abs(value) > 3.4e38:
        return None
    return np.nan if value < -998 else value


# every date that a table may hold, as 2000-01-31 or 2000/01/31, in days since 1970
DAYS = np.arange("1800-01-01", "2200-01-01", dtype="datetime64[D]")
DAYS = {form: day for text, day in zip(DAYS.astype(str).tolist(), DAYS.astype(int).tolist())
        for form in (text, text.replace("-", "/"))}


def read_npz(path, **axes):
    """The arrays of an npz, or npy, each with an axis per letter: read_npz(path, lat="n", v="nk").

    ValueError if the file is damaged or lacks one, if sizes disagree, or for an infinite value.
    """
    try:
        arrays = np.load(path)
        arrays = dict(arrays) if hasattr(arrays, "files") else {Path(path).stem: arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    sizes = {}
    for name, letters in axes.items():
        check(name in arrays, f"{path}: no array {name} among {[*arrays]}")
        values = arrays[name]
        fits = values.ndim == len(letters) and all(
            0 < size == sizes.setdefault(axis, size) for axis, size in zip(letters, values.shape))
        check(fits, f"{path}: {name} has the shape {values.shape}, axes {letters} of {sizes}")
        check(values.dtype.kind in ("UM" if name in NPZ_TEXT else "biuf"),
              f"{path}: {name} holds {values.dtype}")
        check(values.dtype.kind != "f" or not np.isinf(values).any(), f"{path}: {name} is infinite")
    return arrays


NPZ_TEXT = ("id", "s2_names", "s2_bands", "s2_dates", "ndvi_dates")     # the other arrays: numbers


def read_attributes(paths, source, delimiter=","):
    """Tables joined on gauge_id -> {site: {name: value}}; source: column 2 or 3 of STATIC."""
    names = {name: row[source].partition("*")[::2] for name, row in STATIC.items()}
    names |= {"gauge_lat": ("gauge_lat", ""), "gauge_lon": ("gauge_lon", "")}
    columns, sites = {column for column, _ in names.values()}, {}
    for path in paths:
        table = read_table(path, columns, ["gauge_id"], delimiter)
        keys, count = np.unique(table["gauge_id"], return_counts=True)
        check((count < 2).all(), f"{path}: site {keys[count.argmax()]} twice")
        for name, (column, factor) in names.items():
            for site, value in zip(table["gauge_id"], table.get(column, ())):
                sites.setdefault(site, {})[name] = value * float(factor or 1)
    return sites


def read_series(path, lat, **layout):
    """{variable or "streamflow": (dates, values)} of a daily table; PET is derived."""
    table = read_table(path, SERIES, ["date"], **layout)
    series = {name: table[column] for column, name in SERIES.items() if column in table}
    tmax, tmin = series.get("tmax"), series.get("tmin")
    if tmax is not None and tmin is not None:
        series.setdefault("temperature", (tmax + tmin) / 2)
    vapour, daylight = series.pop("vapour", None), series.pop("daylight", None)
    if "temperature" in series:
        t, doy = series["temperature"], day_of_year(table["date"])
        series["pet"] = potential_evaporation(lat, doy, t, tmax, tmin)
        if vapour is not None:                              # saturation pressure: FAO-56 eq. 11
            humidity = vapour / (6.108 * np.exp(17.27 * t / (t + 237.3)))
            series["humidity"] = np.clip(humidity, 0, 100)
    check(("dayl(s)" in table) == ("srad(W/m2)" in table), f"{path}: dayl(s) or srad alone")
    if daylight is not None:                                # mean over daylight -> over the day
        series["shortwave"] = series["shortwave"] * daylight / 86400
    return {name: (table["date"], values) for name, values in series.items()}


def read_caravan(folder):
    """Every gauge in Caravan's layout (doi 10.1038/s41597-023-01975-w), some without a series."""
    series = {path.stem: path for path in sorted(folder.glob("timeseries/csv/*/*.csv"))}
    attributes = read_attributes(sorted(folder.glob("attributes/*/*.csv")), 2)
    for site in sorted(attributes.keys() | series):
        known, path = attributes.get(site, {}), series.get(site)
        if not known:
            print(f"{path}: a gauge without attributes, they are fed as missing")
        lat = known.get("gauge_lat", np.nan)
        yield site, path or folder, known, read_series(path, lat) if path else {}


def read_camels(folder):
    """CAMELS-US (doi 10.5065/D6MW2F4D, 10.5194/hess-21-5293-2017), Daymet if there are several.

    camels_hydro.txt is made from the streamflow and never read. Latitude, elevation and area also
    stand in the forcing files: all that is known where there are no attribute tables.
    """
    tables = [p for p in sorted(folder.rglob("camels_*.txt")) if p.stem != "camels_hydro"]
    if not tables:
        print(f"{folder}: no camels_topo.txt and so on, only latitude, elevation and area known")
    attributes = read_attributes(tables, 3, ";")
    columns = ["id", "Year", "Mnth", "Day", "streamflow", "flag"]
    flows = {p.name[:8]: p for p in folder.glob("usgs_streamflow/**/*_streamflow_qc.txt")}
    forcings = sorted(folder.glob("basin_mean_forcing/**/*_forcing_leap.txt"))
    for path in [p for p in forcings if "cida" in p.name] or forcings:
        basin = path.name[:8]
        known = read_table(path, ["m"], delimiter=None, header=["m"], rows=slice(0, 3))["m"]
        check(len(known) == 3 and not abs(known[0]) > 90 and known[2] > 0,
              f"{path}, lines 1 to 3: latitude, m and basin area in m2 are {known}")
        lat, height, area = known
        series = read_series(path, lat, delimiter=None, rows=slice(3, None))
        if basin in flows:
            flow = read_table(flows[basin], ["streamflow"], delimiter=None, header=columns)
            mm = flow["streamflow"] * (0.028316846592 * 86400 * 1000 / area)    # ft3/s -> mm/d
            series["streamflow"] = flow["date"], mm
        known = {"gauge_lat": lat, "elevation": height, "area": area / 1e6}
        yield basin, path, known | attributes.get(basin, {}), series


def read_ismn(folder):
    """ISMN, header + values (doi 10.5194/hess-25-5749-2021), m3/m3, at the shallowest sensor.

    Daily means of values flagged good; weather from <station>.csv, its columns named as in DYNAMIC.
    """
    head = ["a", "network", "station", "gauge_lat", "gauge_lon", "elevation", "top", "bottom", "b"]
    columns, stations = ["date", "time", "value", "flag", "origin"], {}
    for path in sorted(folder.rglob("*_sm_*.stm")):
        first = read_table(path, head[3:8], delimiter=None, header=head, rows=slice(0, 1))
        site = {name: value[0] for name, value in first.items()}
        stations.setdefault((site["network"], site["station"]), []).append((site, path))
    for (network, station), sensors in stations.items():
        site, path = min(sensors, key=lambda sensor: sensor[0]["top"])
        weather = sorted(folder.rglob(f"{station}.csv"))
        table = read_table(path, ["value"], delimiter=None, header=columns, rows=slice(1, None))
        good = (np.array(table["flag"]) == "G") & ~np.isnan(table["value"])
        if not weather or not good.any():
            print(f"{path}: skipped, no {station}.csv with its weather, or no value flagged good")
            continue
        days, day = np.unique(table["date"][good], return_inverse=True)
        mean = np.bincount(day, table["value"][good]) / np.bincount(day)
        series = read_series(weather[0], site["gauge_lat"]) | {"soil_moisture": (days, mean)}
        yield f"{network}_{station}", path, {name: site[name] for name in head[3:6]}, series


def read_wosis(folder):
    """WoSIS snapshot (doi 10.5194/essd-12-299-2020): texture of 0 to 30 cm, weighted by thickness.

    Profiles whose clay, silt and sand do not add up to 100 +- 5 % are left out.
    """
    profiles, physical = one_file(folder, "*_profiles.tsv"), one_file(folder, "*_physical.tsv")
    columns = ["profile_id", "upper_depth", "lower_depth",
               "clay_value_avg", "silt_value_avg", "sand_value_avg"]
    layers = read_table(physical, columns[1:], columns, "\t")
    texture = np.stack([layers[part] for part in columns[3:]])                  # (3, layers)
    thick = np.minimum(layers["lower_depth"], 30) - np.maximum(layers["upper_depth"], 0)
    thick = np.where(np.isnan(texture.sum(0)), 0, np.maximum(thick, 0))
    ids, member = np.unique(layers["profile_id"], return_inverse=True)
    *parts, total = (np.bincount(member, x) for x in (*np.nan_to_num(texture) * thick, thick))
    texture = dict(zip(ids, np.stack(parts, 1) / np.maximum(total, 1e-9)[:, None]))
    columns = ["profile_id", "latitude", "longitude"]
    table = read_table(profiles, columns[1:], columns, "\t")
    for site, *place in zip(*(table[column] for column in columns)):
        parts = texture.get(site, np.zeros(3))
        if abs(sum(parts) - 100) <= 5:
            names = ("gauge_lat", "gauge_lon", "clay", "silt", "sand")
            yield site, profiles, dict(zip(names, (*place, *parts))), {}


def read_landslide(folder, size=17):
    """Labelled points (csv) on a stack of rasters (npz), both in UTM zone 17 south.

    A site is a point: its attributes and a patch (K, size, size) of the standardised layers.
    """
    path, names = one_file(folder, "*.csv"), {
        "slope": "slope", "cplan": "plan_curvature", "cprof": "profile_curvature",
        "elev": "elevation", "log10_carea": "upslope_area"}
    points = read_table(path, ["x", "y", *names], ["x", "y", "lslpts", *names])
    raster = read_npz(one_file(folder, "*.npz"), ta="khw", xmin="", ymax="", res="")
    left, top, cell, maps = (raster[key] for key in ("xmin", "ymax", "res", "ta"))
    check(cell > 0 and not np.isnan(left + top), f"{folder}: cells of {cell} m from {left}, {top}")
    lat = (points["y"] - 1e7) / 110_578                     # degrees, right to some 100 m
    lon = -81 + (points["x"] - 5e5) / (111_276 * np.cos(np.deg2rad(lat)))
    labels = {"TRUE": 1, "1": 1, "FALSE": 0, "0": 0}
    for i, (x, y, label) in enumerate(zip(points["x"], points["y"], points["lslpts"])):
        check(not np.isnan(x + y) and label.upper() in labels,
              f"{path}, point {i + 1}: x, y and lslpts are {x}, {y}, '{label}'")
        row, column = int((top - y) // cell) - size // 2, int((x - left) // cell) - size // 2
        patch = maps[:, max(row, 0):row + size, max(column, 0):column + size]
        if patch.shape[1:] != (size, size) or np.isnan(patch).any():
            print(f"{path}, point {i + 1}: skipped, its patch leaves the raster")
            continue
        known = {name: points[column][i] for column, name in names.items()}
        known |= {"gauge_lat": lat[i], "gauge_lon": lon[i], "patch": patch}
        yield f"point_{i:04d}", path, known | {"landslide": labels[label.upper()]}, {}


def read_alphaearth(folder):
    """The points of an npz, lat and lon, and their NDVI, one of the named Sentinel-2 values s2."""
    path = one_file(folder, "*.npz")
    z = read_npz(path, lat="n", lon="n", s2="nk", s2_names="k")
    check("s2_ndvi" in z["s2_names"], f"{path}: no s2_ndvi among {z['s2_names']}")
    ndvi = z["s2"][:, z["s2_names"].tolist().index("s2_ndvi")]
    for i, (lat, lon, value) in enumerate(zip(z["lat"], z["lon"], ndvi)):
        yield f"{path.stem}_{i:04d}", path, dict(gauge_lat=lat, gauge_lon=lon, ndvi=value), {}


def join_vectors(sites, path, within=5.0):
    """`sites` with AlphaEarth's vectors (N, 64), NaN where there are none (arXiv 2507.22291).

    path: csv with columns A00 to A63, or npz with an (n, 64) array; joined by `id` if it has one,
    else the nearest `lat`, `lon` within so many km.
    """
    if Path(path).suffix == ".npz":
        table = read_npz(path)
        name = next((k for k, v in table.items() if v.shape[1:] == (64,)), "an array of 64 columns")
        axes = dict(id="n") if "id" in table else dict(lat="n", lon="n")
        vectors = read_npz(path, **{name: "nk"}, **axes)[name]
    else:
        names = [f"A{i:02d}" for i in range(64)]
        table = read_table(path, [*names, "lat", "lon"], names)
        vectors = np.stack([table[name] for name in names], 1)                  # (n, 64)
    keys = ["id"] if "id" in table else ["lat", "lon"]
    check(all(np.shape(table.get(key)) == vectors.shape[:1] for key in keys),
          f"{path}: expected {' and '.join(keys)} of {len(vectors)} vectors among {[*table]}")
    if keys == ["id"]:
        near, limit = sites.ids[:, None] == np.array(table["id"]), 0            # (N, n)
        check(near.sum(1).max() < 2, f"{path}: the id {sites.ids[near.sum(1).argmax()]} twice")
    else:
        places = np.stack([table["lat"], table["lon"]], 1)
        wrong = places[(abs(places) > (90, 360)).any(1)]
        check(not len(wrong), f"{path}: latitude and longitude {wrong[:1]} out of range")
        cosine = on_sphere(sites.latlon) @ on_sphere(places).T                  # (N, n)
        near, limit = np.nan_to_num(cosine, nan=-1), np.cos(within / 6371)
    found = np.where(near.max(1) > limit, near.argmax(1), -1)
    check((found >= 0).any(), f"{path}: has a vector for none of the sites")
    vectors = np.vstack([vectors, np.full(64, np.nan)])[found]                  # last row: none
    return replace(sites, vectors=vectors.astype(np.float32))


def on_sphere(latlon):
    """Degrees (N, 2) -> unit vectors (N, 3)."""
    lat, lon = np.deg2rad(np.asarray(latlon, float)).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


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


LAND_COVER = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub & scrub", "built",
              "bare", "snow & ice")
S2_SCALE = np.array([  # Dynamic World's offset and scale of the bands B2 B3 B4 B5 B6 B7 B8 B11 B12
    (1.7417268007636313, 2.023298706048351), (1.7261204997060209, 2.038905204308012),
    (1.6798346251414997, 2.179592821212937), (1.7734969472909623, 2.2890068333026603),
    (2.289154079164943, 2.6171674549378166), (2.382939712192371, 2.773418590375327),
    (2.3828939530384052, 2.7578332604178284), (2.1952484264967844, 2.789092484314204),
    (1.554812948247501, 2.4140534947492487)])


def normalize_s2(reflectance):
    """Sentinel-2 L1C reflectance x 10,000, bands in the last axis of 9 -> Dynamic World's input."""
    values = (np.log(0.005 * np.asarray(reflectance) + 1) - S2_SCALE[:, 0]) / S2_SCALE[:, 1]
    return (1 / (1 + np.exp(1 - 5 * values))).astype(np.float32)


def read_scenes(folder):
    """Sentinel-2 scenes of an npz by date: dates (T,), (T, H, W, 9) x 10,000, clear (T, H, W).

    Keys as of eo-learn: s2_l1c (reflectance), s2_bands, s2_dates; clm (0 = clear) of ndvi_dates.
    """
    path, axes = one_file(Path(folder), "*.npz"), dict(s2_l1c="thwb", s2_bands="b", s2_dates="t")
    if "clm" in read_npz(path):
        axes |= dict(clm="uhw", ndvi_dates="u")
    z = read_npz(path, **axes)
    bands, days = z["s2_bands"].tolist(), [DAYS.get(str(date)[:10]) for date in z["s2_dates"]]
    nine = [f"B{band:02d}" for band in (2, 3, 4, 5, 6, 7, 8, 11, 12)]
    check({*nine} <= {*bands} and None not in days,
          f"{path}: expected a date of each scene and the bands {nine}, it has {bands}")
    scenes = 10_000 * z["s2_l1c"][..., [bands.index(band) for band in nine]]    # (T, H, W, 9)
    clear = (scenes > -1).all(-1)                           # not NaN, no sentinel
    if "clm" in z:
        mask = dict(zip(z["ndvi_dates"], z["clm"]))
        clear &= np.array([mask.get(date, 0 * clear[0]) == 0 for date in z["s2_dates"]])
    order = np.argsort(days)
    return np.array(days, "datetime64[D]")[order], scenes[order], clear[order]


def read_s2(folder):
    """Blocks of the clear scenes of read_scenes, with their height (`dem`, m) and land cover.

    The classes of `lulc` that cover at least 100 pixels are renumbered from 0, others left out.
    """
    _, scenes, clear = read_scenes(folder)
    path, scenes = one_file(folder, "*.npz"), scenes[clear.all((1, 2))]         # (T, H, W, 9)
    check(len(scenes), f"{path}: no scene without clouds")
    z = read_npz(path, dem="hw", lulc="hw")
    names, count = np.unique(z["lulc"][z["lulc"] > 0], return_counts=True)
    names = names[count >= 100]
    print(f"{path}: classes {names.astype(int)}, from now on 0 to {len(names) - 1}")
    cover = np.where(np.isin(z["lulc"], names), np.searchsorted(names, z["lulc"]), np.nan)
    image = np.concatenate(normalize_s2(scenes).transpose(0, 3, 1, 2))          # (T * 9, H, W)
    return blocks(path, image, height=z["dem"], landcover=cover)


def read_tiles(folder):
    """Blocks of an image x.npy (C, H, W), int8 as AlphaEarth's, and its map y.npy (H, W).

    No data: NaN, below -998, or AlphaEarth's -128; the map may have such pixels, the image not.
    """
    x = read_npz(one_file(folder, "x.npy"), x="chw")["x"]
    y = read_npz(one_file(folder, "y.npy"), y="hw")["y"]
    if x.dtype == np.int8:
        x = np.where(x == -128, np.nan, np.sign(x) * (x / 127.5) ** 2)
    x, y = (np.where(values < -998, np.nan, values) for values in (x, y))
    return blocks(folder, x, height=y, landcover=y)


def blocks(path, image, size=20, margin=10, **maps):
    """Cut an image (C, H, W) and its maps (H, W) into blocks, each of which is a site.

    Its patch shows a margin round the block too; there, and without data, the maps are NaN.
    """
    check(not np.isnan(image).any(), f"{path}: the image has pixels without data (NaN)")
    H, W = image.shape[1:]
    pad = [(margin, margin + -length % size) for length in (H, W)]
    image = np.pad(image, ((0, 0), *pad), mode="edge")
    frame = np.pad(np.zeros((size, size), np.float32), margin, constant_values=np.nan)
    for name, y in maps.items():
        check(y.shape == (H, W), f"{path}: an image of {H} x {W} and a map of {y.shape}")
        check(not np.isnan(y).all(), f"{path}: no pixel of the map {name} is known")
        maps[name] = np.pad(y.astype(np.float32), pad, constant_values=np.nan)
    for i, j in np.ndindex(-(-H // size), -(-W // size)):
        at = tuple(slice(k * size, (k + 1) * size + 2 * margin) for k in (i, j))
        known = {name: y[at] + frame for name, y in maps.items()}
        known |= {"patch": image[(..., *at)], "gauge_lat": -0.002 * i, "gauge_lon": 0.002 * j}
        yield f"block_{i:02d}_{j:02d}", path, known, {}


READERS = {"caravan": read_caravan, "camels": read_camels, "ismn": read_ismn,
           "wosis": read_wosis, "landslide": read_landslide, "alphaearth": read_alphaearth,
           "s2": read_s2, "tiles": read_tiles}


def synthetic_tiles(task, seed=0, size=200):
    """Blocks of terrain that rises to the east, with four classes by height and wetness.

    Seen as 64 embeddings that mix both (height), or as 9 bands in three seasons, a tenth of the
    pixels cloudy (landcover).
    """
    rng, (rows, columns) = np.random.default_rng(seed), np.indices((size, size)) / size

    def field(scale):                       # a smooth random field, (H, W)
        waves = np.stack([rows, columns], -1) @ (scale * rng.standard_normal((2, 64)))
        return np.cos(waves + rng.uniform(0, 2 * np.pi, 64)).sum(-1) / 5.7

    height = 300 + 80 * field(12) + 15 * field(40) + 120 * columns              # m
    slope, wet = np.hypot(*np.gradient(height, 10.0)), field(15)
    classes = np.select([wet > 1, height > 420, wet < -0.3], [0, 1, 2], 3)      # (H, W)
    if task == "height":
        is_class = classes == np.arange(4)[:, None, None]                       # (4, H, W)
        latents = np.stack([height / 100 - 3.5, 3 * slope, wet, *is_class])
        mixed = np.einsum("chw,ck->khw", latents, rng.standard_normal((7, 64)))
        image = np.tanh(mixed + 0.3 * rng.standard_normal(mixed.shape))         # (64, H, W)
        return blocks("synthetic", image.astype(np.float32), height=height)
    spectra = rng.uniform(0.1, 0.9, (3, 4, 9))[:, classes]                      # (3, H, W, 9)
    seen = spectra + 0.25 * rng.standard_normal(spectra.shape)
    seen[rng.random(seen.shape[:3]) < 0.1] = 1                                  # cloud
    image = np.concatenate(seen.transpose(0, 3, 1, 2)).astype(np.float32)       # (27, H, W)
    return blocks("synthetic", image, landcover=classes)


def folds(sites, kind, k, seed=0):
    """Fold of each site, (N,) int in 0..k-1; a gauge that two archives hold has one fold.

    "pub", ungauged basins: a hash of seed and gauge, whatever other sites there are. "pur",
    ungauged regions: k-means on the sphere with an offset per region that balances their sizes.
    """
    check(kind in ("pub", "pur"), f"hold-out '{kind}': expected pub or pur")
    keys = [gauge(i) for i in sites.ids]
    if kind == "pub":
        digests = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in keys]
        return np.array([int(digest, 16) % k for digest in digests])
    place = {k: x for k, x in sorted(zip(keys, sites.latlon.tolist())) if not np.isnan(x).any()}
    lost = [i for i, key in zip(sites.ids, keys) if key not in place]
    check(not lost, f"{len(lost)} sites have no coordinates, so no region: {', '.join(lost[:3])}")
    xyz = on_sphere([*place.values()])
    centres = xyz[np.random.default_rng(seed).choice(len(xyz), k, replace=False)]
    offset = np.zeros(k)
    for step in range(300):
        distance = ((xyz[:, None] - centres) ** 2).sum(-1)                      # (N, k)
        member = (distance + offset).argmin(1)[:, None] == np.arange(k)
        sums, sizes = member.T.astype(float) @ xyz, member.sum(0)
        if step < 100:                      # first the regions, then their sizes
            centres = sums / np.maximum(sizes, 1)[:, None]
        else:
            pressure = 0.1 * 0.98 ** (step - 100) * (sizes * k / len(xyz) - 1)
            offset += distance.min(1).mean() * pressure
    region = dict(zip(place, member.argmax(1)))
    return np.array([region[key] for key in keys])


def one_file(folder, pattern):
    """The file of a folder with this name; FileNotFoundError if there is none."""
    for path in sorted(folder.glob(pattern)):
        return path
    raise FileNotFoundError(f"{folder}: no file {pattern}")


def gauge(site):
    """One name for a gauge that several archives hold: hysets_01022500, camels_… -> 01022500."""
    return site.removeprefix("camels_").removeprefix("hysets_")


def day_of_year(dates):
    """(T,) dates -> 1..366."""
    return (dates - dates.astype("datetime64[Y]")).astype(int) + 1


def write_atomically(path, write, suffix="new"):
    """Call write(file) on a temporary file, then rename it to `path`: never half an output."""
    temporary = path.with_name(f".{path.name}.{suffix}")    # a killed one is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise OSError(f"cannot write {path}, what was there is kept: {error}") from None


def check(fine, complaint):
    """ValueError(complaint) unless all is fine."""
    if not fine:
        raise ValueError(complaint)

"""Sites: what the models see of the land surface, from a synthetic world or from real archives.

    load("synthetic")                    load("camels:DIR,caravan:DIR")

Every source becomes the same container, with one set of names and units; NaN = missing.
Axes: N sites, T days, C dynamic variables, S static attributes.
"""

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# name, group (hidden together; "context" never), unit, column of Caravan and of CAMELS-US
STATIC = """
elevation           terrain     m        ele_mt_sav             elev_mean
slope               terrain     deg      slp_dg_sav*0.1         slope_mean*0.0573
groundwater_depth   terrain     m        gwt_cm_sav*0.01        -
soil_depth          terrain     m        -                      soil_depth_pelletier
clay                soil        %        cly_pc_sav             clay_frac
silt                soil        %        slt_pc_sav             silt_frac
sand                soil        %        snd_pc_sav             sand_frac
organic_carbon      soil        t/ha     soc_th_sav             -
soil_porosity       soil        -        -                      soil_porosity
water_capacity      soil        m        -                      max_water_content
carbonate           geology     %        kar_pc_sse             carbonate_rocks_frac*100
permeability        geology     log10m2  -                      geol_permeability
rock_porosity       geology     -        -                      geol_porostiy
forest              vegetation  %        for_pc_sse             frac_forest*100
cropland            vegetation  %        crp_pc_sse             -
pasture             vegetation  %        pst_pc_sse             -
ndvi                vegetation  -        -                      -
p_mean              climate     mm/d     p_mean                 p_mean
p_seasonality       climate     -        -                      p_seasonality
high_p_days         climate     d/yr     high_prec_freq*365.25  high_prec_freq
low_p_days          climate     d/yr     low_prec_freq*365.25   low_prec_freq
temperature_mean    climate     degC     tmp_dc_syr*0.1         -
pet_mean            climate     mm/d     pet_mm_syr*0.002738    pet_mean
wetness             climate     -        ari_ix_sav*0.01        -
snow_fraction       climate     -        frac_snow              frac_snow
area                context     km2      area                   area_gages2
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
GROUP = {name: row[0] for name, row in (STATIC | DYNAMIC).items()}


@dataclass
class Sites:
    """N sites with everything known of them; float32, NaN = missing."""
    ids: np.ndarray        # (N,) str, unique
    latlon: np.ndarray     # (N, 2) degrees
    static: np.ndarray     # (N, S)
    forcing: np.ndarray    # (N, T, C) daily
    target: np.ndarray     # (N, T) daily streamflow in mm, or (N,)
    dates: np.ndarray      # (T,) datetime64[D], every day from the first to the last
    static_names: tuple
    dynamic_names: tuple


def load(spec="synthetic", seed=0, cache="out/cache", **options):
    """"synthetic", or one or several real sources ("caravan:DIR,camels:DIR"), as one `Sites`.

    Archives are parsed once and kept under `cache` (None: not), keyed on this code and on every
    file's path, size and time. `options` go to synthetic_world. ValueError names file and line.
    """
    if spec == "synthetic":
        return synthetic_world(seed=seed, **options)
    sources, key = [part.partition(":")[::2] for part in spec.split(",")], [spec]
    for kind, folder in sources:
        check(kind in READERS, f"data '{kind}': expected synthetic, or NAME:DIR with {[*READERS]}")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"data {kind}: no folder '{folder}'")
        key += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns)
                for p in [Path(__file__), *sorted(Path(folder).rglob("*"))]]
    path = Path(cache or "", hashlib.sha256(repr(key).encode()).hexdigest()[:16] + ".npz")
    if cache and path.exists():
        with np.load(path) as z:
            sites = Sites(**{k: tuple(z[k].tolist()) if "names" in k else z[k] for k in z})
    else:
        sites = assemble([site for kind, folder in sources for site in READERS[kind](Path(folder))])
        if cache:
            write_atomically(path, lambda file: np.savez(file, **vars(sites)))
    print(f"{spec}: {len(sites.ids)} sites, {sites.dates[0]} to {sites.dates[-1]}; daily "
          f"{', '.join(sites.dynamic_names)}; {len(sites.static_names)} attributes, "
          f"{np.isnan(sites.static).mean():.0%} of their values missing")
    return sites


def synthetic_world(seed=0, n_sites=700, years=6):
    """A world with StefaLand's premise: attributes, weather and flow follow from hidden latents.

    Smooth fields of location plus local noise make latent terrain, climate, rock, soil and plants.
    Attributes are noisy views of them, and a third of the sites lacks whole groups; weather is a
    seasonal wet/dry chain; flow leaves a bucket shaped by the latents. Same seed, same bytes.
    """
    rng, N = np.random.default_rng(seed), n_sites

    def smooth(xyz, scale=2.0):             # a standardised random field, by Fourier features
        waves = xyz @ (scale * rng.standard_normal((3, 64))) + rng.uniform(0, 2 * np.pi, 64)
        field = np.cos(waves).sum(1, keepdims=True)
        return (field - field.mean()) / field.std()                             # (N, 1)

    def noise(size, days=1):
        return size * rng.standard_normal((N, days))

    def share(x):                           # the logistic function
        return 0.5 + 0.5 * np.tanh(x / 2)

    xyz = rng.standard_normal((40 * N, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    xyz = xyz[(smooth(xyz, 1.5)[:, 0] > 0.2) & (abs(xyz[:, 2] - 0.06) < 0.88)][:N]  # 55 S to 70 N
    x, y, z = np.split(xyz, 3, 1)
    lat, lon, polar = np.rad2deg(np.arcsin(z)), np.rad2deg(np.arctan2(y, x)), z ** 2
    # latents, (N, 1) each
    relief = 0.9 * smooth(xyz, 3) + noise(0.5)
    wet = 0.8 * smooth(xyz) + 0.3 * relief + noise(0.3)
    inland, season = share(1.5 * smooth(xyz)), 0.9 * np.tanh(smooth(xyz))       # > 0: wet summers
    rock, lime = smooth(xyz) + noise(0.4), smooth(xyz) + noise(0.4)
    elevation = 350 * np.exp(0.9 * relief)                                      # m
    t_mean = 27 - 34 * polar - 0.004 * elevation + noise(0.7)                   # degC
    warm = share((t_mean - 12) / 6)
    weathered = warm * np.tanh(wet)
    parts = np.exp([1.1 * weathered + 0.5 * lime - 0.5 * rock - 0.6, 0.6 * inland - 0.2,
                    0.8 * rock - 0.5 * weathered])
    clay, silt, sand = 100 * parts / parts.sum(0)                               # %
    depth = 1.2 * np.exp(0.5 * weathered - 0.45 * relief + noise(0.2))          # m
    conductive = -13 + 1.2 * rock + 0.5 * np.maximum(lime, 0)                   # log10 m2
    growth = np.tanh(np.maximum(0.9 + wet, 0)) * (0.25 + 0.75 * warm)
    forest = 100 * share(6 * (growth - 0.55) + 0.8 * np.log(depth) + noise(0.4))
    # daily weather, (N, T) each: a wet/dry Markov chain and red-noise temperature, both seasonal
    dates = np.arange("1995-01-01", f"{1995 + years}-01-01", dtype="datetime64[D]")
    doy, T = day_of_year(dates), len(dates)
    summer = np.cos(2 * np.pi * (doy - 197) / 365.25) * np.sign(lat)
    p_wet = (0.3 + 0.12 * np.tanh(wet)) * (1 + 0.6 * season * summer)
    rains, anomaly = rng.random((N, T)), noise(1, T)
    for t in range(T):                      # day 0 follows the last: any state will do
        rains[:, t] = rains[:, t] < p_wet[:, t] + 0.35 * (rains[:, t - 1] - p_wet[:, t])
        anomaly[:, t] = 0.75 * anomaly[:, t - 1] + 0.66 * anomaly[:, t]
    amount = np.exp(0.75 + 0.5 * wet) / p_wet.mean(1, keepdims=True) * (1 + 0.4 * season * summer)
    rain = rains * amount * rng.gamma(0.8, 1.25, (N, T))
    yearly = (1 + 20 * polar ** 0.7 * (0.4 + inland)) * summer
    temperature = t_mean + yearly + (1.5 + 2.5 * inland) * anomaly
    swing = (7 + 8 * inland - 3 * growth) * (1.1 - 0.45 * rains)
    tmax, tmin = temperature + swing / 2, temperature - swing / 2
    clear = np.clip(0.72 - 0.3 * rains - 0.1 * growth + noise(0.05, T), 0.1, 0.8)
    pet = potential_evaporation(lat, doy, temperature, tmax, tmin)
    daily = {"precipitation": rain, "tmax": tmax, "tmin": tmin, "pet": pet,
             "shortwave": extraterrestrial_radiation(lat, doy) * clear * 11.574,    # W/m2
             "humidity": np.clip(55 + 20 * growth + 15 * rains - 0.8 * swing + noise(4, T), 8, 100)}
    # the bucket, mm: snow, soil with saturation excess, groundwater
    capacity, curve = depth * (40 + 1.6 * clay + 1.8 * silt), 1.2 + 0.04 * sand
    recession = np.clip(10 ** (0.35 * (conductive + 13) - 1.8), 0.002, 0.3)
    snow, soil, ground, flow = 0 * lat, 0.5 * capacity, 20 + 0 * lat, []
    for p, t, e in zip(rain.T[..., None], temperature.T[..., None], pet.T[..., None]):   # (N, 1)
        melt, fill = np.minimum(snow, 3 * np.maximum(t - 0.5, 0)), soil / capacity
        snow, water = snow + p * (t < 0.5) - melt, p * (t >= 0.5) + melt
        quick = np.maximum(water * fill ** curve, soil + water - capacity)
        drain, base = (0.004 + 0.0004 * sand) * soil * fill, recession * ground
        evaporation = e * np.minimum(1, 2 * fill) * (0.6 + 0.004 * forest)
        soil = np.maximum(soil + water - quick - drain - evaporation, 0)
        ground = ground + drain + 0.1 * quick - base
        flow.append(0.9 * quick + base)
    views = {  # what is observed: the latents through noise
        "elevation": elevation * np.exp(noise(0.05)), "soil_depth": depth * np.exp(noise(0.2)),
        "slope": 4 * np.exp(0.7 * relief + noise(0.25)), "p_seasonality": season + noise(0.1),
        "clay": np.clip(clay + noise(3), 0, 100), "silt": np.clip(silt + noise(3), 0, 100),
        "sand": np.clip(sand + noise(3), 0, 100), "forest": np.clip(forest + noise(3), 0, 100),
        "organic_carbon": 60 * np.exp(0.8 * growth - 0.9 * warm + 0.01 * clay + noise(0.25)),
        "carbonate": 100 * share(4 * (lime - 0.7) + noise(0.3)),
        "rock_porosity": 0.03 + 0.25 * share(1.5 * rock + noise(0.3)),
        "permeability": conductive + noise(0.3), "ndvi": 0.1 + 0.75 * growth + noise(0.03),
        "pasture": np.clip((100 - forest) * np.tanh(growth) + noise(4), 0, 100),
        "p_mean": rain.mean(1)[:, None] * np.exp(noise(0.1)),
        "temperature_mean": temperature.mean(1)[:, None] + noise(0.5),
        "pet_mean": pet.mean(1)[:, None] * np.exp(noise(0.05)),
        "snow_fraction": ((rain * (temperature < 0.5)).sum(1) / rain.sum(1))[:, None],
        "area": np.exp(6 + noise(1)), "population_density": np.exp(2 + growth - relief + noise(1))}
    static, poor = np.hstack([*views.values()]), rng.random(N) < 1 / 3          # (N, S), (N,)
    groups = np.array([GROUP[name] for name in views])
    for group in sorted({*groups} - {"context"}):
        static[np.ix_(poor & (rng.random(N) < 0.5), groups == group)] = np.nan
    arrays = (np.hstack([lat, lon]), static, np.stack([*daily.values()], -1), np.hstack(flow))
    return Sites(np.array([f"synthetic_{i:04d}" for i in range(N)]),
                 *(x.astype(np.float32) for x in arrays), dates, tuple(views), tuple(daily))


# Real archives. A reader yields sites: (id, file, {attribute: value}, dates, {series: values}).

def assemble(records, target="streamflow"):
    """What the readers yield -> `Sites` on the union of dates and variables."""
    check(records, "no site with a daily series found")
    ids, files, attributes, days, series = zip(*records)
    static_names = tuple(n for n in STATIC if any(a.get(n) == a.get(n, "") for a in attributes))
    dynamic_names = tuple(n for n in DYNAMIC if any(n in s for s in series))
    table = np.array([[a.get(n, np.nan) for n in ("gauge_lat", "gauge_lon", *static_names)]
                      for a in attributes], np.float32)
    dates = np.arange(min(d.min() for d in days), max(d.max() for d in days) + 1)
    daily = np.full((len(ids), len(dates), len(dynamic_names) + 1), np.nan, np.float32)
    for i, (site, (lat, lon)) in enumerate(zip(ids, table[:, :2])):
        place, day = f"{files[i]}: site {site}", (days[i] - dates[0]).astype(int)
        check(site not in ids[:i], f"{place} was already read from another file")
        check(len(set(day)) == len(day), f"{place} has the same date twice")
        check(not (abs(lat) > 90 or abs(lon) > 360), f"{place} has coordinates {lat}, {lon}")
        for c, name in enumerate((*dynamic_names, target)):
            daily[i, day, c] = series[i].get(name, np.nan)
    latlon = np.stack([table[:, 0], (table[:, 1] + 180) % 360 - 180], 1)        # (N, 2)
    return Sites(np.array(ids), latlon, table[:, 2:], daily[..., :-1], daily[..., -1], dates,
                 static_names, dynamic_names)


CALENDAR = ("date", "Year", "Mnth", "Day")


def read_table(path, numeric, delimiter=",", header=None, lines=slice(0, None)):
    """A text table's columns: float32 for `numeric`, str for CALENDAR and the first one ("key").

    delimiter None = blanks; empty, NA and -999 = NaN. ValueError names the file, line and value.
    """
    rows = Path(path).read_text(encoding="utf-8-sig").splitlines()[lines]
    rows = [*(csv.reader(rows, delimiter=delimiter) if delimiter else map(str.split, rows))]
    width = len(header or (rows and rows[0]))
    for i, row in enumerate(rows, lines.start + 1):
        check(len(row) in (0, width), f"{path}, line {i}: {len(row)} fields, expected {width}")
    rows = [header or (), *filter(None, rows)][header is None:]
    check(len(rows) > 1, f"{path}: no rows below the header")
    table, missing = {"key": [row[0] for row in rows[1:]]}, {"": "nan", "NA": "nan", "NULL": "nan"}
    for name, *column in zip(*rows):
        if name in CALENDAR:
            table[name] = column
        elif name in numeric:
            try:
                values = [float(missing.get(v, v)) for v in column]
            except ValueError as error:
                line = [repr(v) in str(error) for v in column].index(True) + lines.start + 1
                raise ValueError(f"{path}, line {line + (not header)}: {error}") from None
            table[name] = np.where(np.less(values, -998), np.nan, values).astype(np.float32)
    return table


def read_attributes(paths, source, delimiter=","):
    """Tables joined on their first column -> {site: {name: value}}; source: 2 or 3, of STATIC."""
    columns = {"gauge_lat": ("gauge_lat", ""), "gauge_lon": ("gauge_lon", "")}
    columns |= {name: row[source].partition("*")[::2] for name, row in STATIC.items()}
    sites = {}
    for path in paths:
        table = read_table(path, {column for column, _ in columns.values()}, delimiter)
        check(len(set(table["key"])) == len(table["key"]), f"{path}: the same site twice")
        for name, (column, factor) in columns.items():
            for site, value in zip(table["key"], table.get(column, ())):
                sites.setdefault(site, {})[name] = value * float(factor or 1)
    return sites


def read_series(path, source, lat, **layout):
    """dates (T,) and {variable of DYNAMIC or streamflow: (T,)} of a daily table; PET is derived."""
    wanted = {"streamflow", "dayl(s)", "vp(Pa)", *(row[source] for row in DYNAMIC.values())}
    table = read_table(path, wanted, **layout)
    check(any(name in table for name in CALENDAR), f"{path}: no column date")
    ymd = (table.get(name, ()) for name in CALENDAR[1:])
    days = table.get("date") or map("{:0>4}-{:0>2}-{:0>2}".format, *ymd)
    try:
        dates = np.array([*days], "datetime64[D]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    series = {name: table[row[source]] for name, row in DYNAMIC.items() if row[source] in table}
    tmax, tmin = series.get("tmax"), series.get("tmin")
    if tmax is not None and tmin is not None:
        series.setdefault("temperature", (tmax + tmin) / 2)
    if "temperature" in series:
        t = series["temperature"]
        series["pet"] = potential_evaporation(lat, day_of_year(dates), t, tmax, tmin)
        if "vp(Pa)" in table:                               # saturation pressure: FAO-56 eq. 11
            humidity = table["vp(Pa)"] / (6.108 * np.exp(17.27 * t / (t + 237.3)))
            series["humidity"] = np.clip(humidity, 0, 100)
    if "dayl(s)" in table:                                  # mean over daylight -> over the day
        series["shortwave"] = series["shortwave"] * table["dayl(s)"] / 86400
    return dates, series | {"streamflow": table.get("streamflow", np.full(len(dates), np.nan))}


def read_caravan(folder):
    """Every gauge with a series in Caravan's layout (doi 10.1038/s41597-023-01975-w)."""
    for source in sorted(folder.glob("timeseries/csv/*/")):
        attributes = read_attributes(sorted(folder.glob(f"attributes/{source.name}/*.csv")), 2)
        for path in sorted(source.glob("*.csv")):
            if path.stem not in attributes:
                print(f"{path}: a gauge without attributes, they are fed as missing")
            site = attributes.get(path.stem, {})
            yield path.stem, path, site, *read_series(path, 2, site.get("gauge_lat", np.nan))


def read_camels(folder):
    """CAMELS-US (doi 10.5065/D6MW2F4D, 10.5194/hess-21-5293-2017), Daymet if there are several.

    camels_hydro.txt is made from the streamflow and never read. Latitude, elevation and area also
    stand in the forcing files: all that is known where there are no attribute tables.
    """
    tables = [p for p in sorted(folder.rglob("camels_*.txt")) if p.stem != "camels_hydro"]
    if not tables:
        print(f"{folder}: no camels_topo.txt and so on, only latitude, elevation and area known")
    attributes = read_attributes(tables, 3, ";")
    columns = ("id", *CALENDAR[1:], "streamflow", "flag")
    flows = {p.name[:8]: p for p in folder.glob("usgs_streamflow/**/*_streamflow_qc.txt")}
    forcings = sorted(folder.glob("basin_mean_forcing/**/*_forcing_leap.txt"))
    for path in [p for p in forcings if "cida" in p.name] or forcings:
        basin = path.name[:8]
        lat, height, area = read_table(path, ("m",), None, ("m",), slice(0, 3))["m"]
        check(area > 0, f"{path}, line 3: a basin area of {area} m2")
        dates, series = read_series(path, 3, lat, delimiter=None, lines=slice(3, None))
        if basin in flows:
            days, flow = read_series(flows[basin], 3, lat, delimiter=None, header=columns)
            _, here, there = np.intersect1d(dates, days, return_indices=True)
            mm = flow["streamflow"] * (0.028316846592 * 86400 * 1000 / area)    # ft3/s -> mm/d
            series["streamflow"][here] = mm[there]
        known = {"gauge_lat": lat, "elevation": height, "area": area / 1e6}
        yield basin, path, known | attributes.get(basin, {}), dates, series


READERS = {"caravan": read_caravan, "camels": read_camels}


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
    lat, lon = np.deg2rad([*place.values()]).T
    xyz = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    centres = xyz[np.random.default_rng(seed).choice(len(xyz), k, replace=False)]
    offset = np.zeros(k)
    for step in range(300):
        cost = ((xyz[:, None] - centres) ** 2).sum(-1) + offset                 # (N, k)
        member = cost.argmin(1)[:, None] == np.arange(k)
        offset += 0.3 * 0.98 ** step * cost.min(1).std() * (member.mean(0) * k - 1)
        sums, sizes = member.T.astype(float) @ xyz, member.sum(0)[:, None]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
    return np.array([dict(zip(place, member.argmax(1)))[key] for key in keys])


def gauge(site):
    """One name for a gauge that several archives hold: hysets_01022500, camels_… -> 01022500."""
    return site.removeprefix("camels_").removeprefix("hysets_")


def day_of_year(dates):
    """(T,) dates -> 1..366."""
    return (dates - dates.astype("datetime64[Y]")).astype(int) + 1


def write_atomically(path, write):
    """Call write(file) on a temporary file, then rename it to `path`: never half an output."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def check(fine, complaint):
    """ValueError(complaint) unless all is fine."""
    if not fine:
        raise ValueError(complaint)

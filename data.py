"""Sites: what the models see of the land surface, from a synthetic world or from real archives.

    load("synthetic")                    load("camels:DIR,caravan:DIR")

Every source becomes the same container, with one set of names and units; NaN = missing.
Axes: N sites, T days, C dynamic variables, S static attributes.
"""

import csv
import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# name, group (hidden together in pretraining; "context" never), unit, column in Caravan and in CAMELS-US
STATIC = """
elevation           terrain     m        ele_mt_sav             elev_mean
slope               terrain     deg      slp_dg_sav*0.1         slope_mean*0.0573
stream_gradient     terrain     m/km     sgr_dk_sav*0.1         -
groundwater_depth   terrain     m        gwt_cm_sav*0.01        -
soil_depth          terrain     m        -                      soil_depth_pelletier
clay                soil        %        cly_pc_sav             clay_frac
silt                soil        %        slt_pc_sav             silt_frac
sand                soil        %        snd_pc_sav             sand_frac
organic_carbon      soil        t/ha     soc_th_sav             -
soil_porosity       soil        -        -                      soil_porosity
soil_conductivity   soil        cm/h     -                      soil_conductivity
water_capacity      soil        m        -                      max_water_content
carbonate           geology     %        kar_pc_sse             carbonate_rocks_frac*100
permeability        geology     log10m2  -                      geol_permeability
rock_porosity       geology     -        -                      geol_porostiy
forest              vegetation  %        for_pc_sse             frac_forest*100
cropland            vegetation  %        crp_pc_sse             -
pasture             vegetation  %        pst_pc_sse             -
ndvi                vegetation  -        -                      -
lai_max             vegetation  -        -                      lai_max
green_max           vegetation  -        -                      gvf_max
p_mean              climate     mm/d     p_mean                 p_mean
p_seasonality       climate     -        -                      p_seasonality
high_p_days         climate     d/yr     high_prec_freq*365.25  high_prec_freq
low_p_days          climate     d/yr     low_prec_freq*365.25   low_prec_freq
temperature_mean    climate     degC     tmp_dc_syr*0.1         -
pet_mean            climate     mm/d     pet_mm_syr*0.002738    pet_mean
wetness             climate     -        ari_ix_sav*0.01        -
snow_fraction       climate     -        frac_snow              frac_snow
snow_cover          climate     %        snw_pc_syr             -
glacier             climate     %        gla_pc_sse             -
area                context     km2      area                   area_gages2
population_density  context     1/km2    ppd_pk_sav             -
urban               context     %        urb_pc_sse             -
irrigated           context     %        ire_pc_sse             -
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
STATIC, DYNAMIC = ({name: tuple(rest) for name, *rest in map(str.split, table.strip().splitlines())}
                   for table in (STATIC, DYNAMIC))


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

    def __len__(self):
        return len(self.ids)

    def subset(self, keep):
        """The sites selected by a boolean mask or an index array (copies their rows)."""
        rows = {k: getattr(self, k)[keep] for k in ("ids", "latlon", "static", "forcing", "target")}
        return replace(self, **rows)


def group_of(name):
    """The group a variable is hidden with; a variable in no table is a group of its own."""
    return (STATIC.get(name) or DYNAMIC.get(name) or (name,))[0]


def load(spec="synthetic", seed=0, cache="out/cache", **options):
    """"synthetic", or one or several real sources ("caravan:DIR,camels:DIR"), as one `Sites`.

    Real archives are parsed once and kept under `cache` (None: not), keyed on this code and on every
    file's path, size and time. `options` go to synthetic_world. ValueError names file and line.
    """
    if spec == "synthetic":
        return synthetic_world(seed=seed, **options)
    sources = [part.partition(":")[::2] for part in spec.split(",")]
    for kind, folder in sources:
        if kind not in READERS:
            raise ValueError(f"data source '{kind}': expected synthetic or NAME:DIR, NAME in {[*READERS]}")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"data source {kind}: no folder '{folder}'")
    files = sorted(p for _, folder in sources for p in Path(folder).rglob("*") if p.is_file())
    key = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in [*files, Path(__file__)]]
    path = Path(cache or ".") / (hashlib.sha256(repr((spec, key)).encode()).hexdigest()[:16] + ".npz")
    if cache and path.exists():
        with np.load(path) as z:
            sites = Sites(**{k: tuple(z[k].tolist()) if k.endswith("_names") else z[k] for k in z})
    else:
        sites = assemble([record for kind, folder in sources for record in READERS[kind](Path(folder))])
        if cache:
            write_atomically(path, lambda file: np.savez(file, **vars(sites)))
    print(f"{spec}: {len(sites)} sites, {sites.dates[0]} to {sites.dates[-1]}; daily "
          f"{', '.join(sites.dynamic_names)}; {len(sites.static_names)} attributes, "
          f"{np.isnan(sites.static).mean():.0%} of their values missing")
    return sites


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then rename: never a half-written output."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def synthetic_world(seed=0, n_sites=700, years=6):
    """A world with StefaLand's premise: attributes, weather and flow all follow from hidden latents.

    Smooth fields of location plus local noise make latent climate, terrain, soil, plants and rock.
    Attributes are noisy views of them, and a third of the sites lacks whole groups; weather is a
    seasonal wet/dry chain; flow leaves a bucket shaped by the latents. Same seed, same bytes.
    """
    rng, N = np.random.default_rng(seed), n_sites

    def smooth(xyz, scale=2.0):
        """A random field on the sphere by Fourier features, standardised over the points: (N,)."""
        field = np.cos(xyz @ (scale * rng.standard_normal((3, 64))) + rng.uniform(0, 2 * np.pi, 64)).sum(1)
        return (field - field.mean()) / field.std()

    def noise(size):
        return size * rng.standard_normal(N)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    xyz = rng.standard_normal((40 * N, 3))
    xyz /= np.linalg.norm(xyz, axis=1, keepdims=True)
    xyz = xyz[(smooth(xyz, 1.5) > 0.2) & (xyz[:, 2] > -0.82) & (xyz[:, 2] < 0.94)][:N]  # land, 55 S to 70 N
    lat, lon = np.rad2deg([np.arcsin(xyz[:, 2]), np.arctan2(xyz[:, 1], xyz[:, 0])])

    # latents, (N,) each: terrain, climate, rock, soil, plants
    relief = 0.9 * smooth(xyz, 3) + noise(0.5)
    wet = 0.8 * smooth(xyz) + 0.3 * relief + noise(0.3)
    inland, season = sigmoid(1.5 * smooth(xyz)), 0.9 * np.tanh(smooth(xyz))     # season > 0: wet summers
    rock, lime = smooth(xyz) + noise(0.4), smooth(xyz) + noise(0.4)
    polar, elevation = xyz[:, 2] ** 2, 350 * np.exp(0.9 * relief)               # -, m
    t_mean = 27 - 34 * polar - 0.004 * elevation + noise(0.7)                   # degC
    warm = sigmoid((t_mean - 12) / 6)
    weathering = warm * np.tanh(wet)
    texture = np.exp([1.1 * weathering + 0.5 * lime - 0.5 * rock - 0.6, 0.6 * inland - 0.2, 0.8 * rock - 0.5 * weathering])
    clay, silt, sand = 100 * texture / texture.sum(0)                           # %
    depth = 1.2 * np.exp(0.5 * weathering - 0.45 * relief + noise(0.2))         # m
    conductive = -13 + 1.2 * rock + 0.5 * np.maximum(lime, 0)                   # log10 m2
    growth = np.tanh(np.maximum(0.9 + wet, 0)) * (0.25 + 0.75 * warm)
    forest = 100 * sigmoid(6 * (growth - 0.55) + 0.8 * np.log(depth) + noise(0.4))

    # daily weather, (N, T) each: a wet/dry Markov chain and red-noise temperature, both seasonal
    dates = np.arange(np.datetime64("1995-01-01"), np.datetime64(f"{1995 + years}-01-01"))
    doy, T = day_of_year(dates), len(dates)
    summer = np.cos(2 * np.pi * (doy - 197) / 365.25) * np.where(lat >= 0, 1, -1)[:, None]
    p_wet = (0.3 + 0.12 * np.tanh(wet))[:, None] * (1 + 0.6 * season[:, None] * summer)
    rains, anomaly = rng.random((N, T)), rng.standard_normal((N, T))
    for t in range(1, T):
        rains[:, t] = rains[:, t] < p_wet[:, t] + 0.35 * (rains[:, t - 1] - p_wet[:, t])
        anomaly[:, t] = 0.75 * anomaly[:, t - 1] + 0.66 * anomaly[:, t]
    rain_per_day = np.exp(0.75 + 0.5 * wet)[:, None] / p_wet.mean(1, keepdims=True)  # mm on a wet day
    rain = (rains > 0.5) * rain_per_day * (1 + 0.4 * season[:, None] * summer) * rng.gamma(0.8, 1.25, (N, T))
    t_swing = 1 + 20 * polar ** 0.7 * (0.4 + inland)
    temperature = t_mean[:, None] + t_swing[:, None] * summer + (1.5 + 2.5 * inland)[:, None] * anomaly
    swing = (7 + 8 * inland - 3 * growth)[:, None] * np.where(rain > 0, 0.65, 1.1)
    tmax, tmin = temperature + swing / 2, temperature - swing / 2
    clear = np.clip(0.72 - 0.3 * (rain > 0) - 0.1 * growth[:, None] + 0.05 * rng.standard_normal((N, T)), 0.1, 0.8)
    humidity = 55 + 20 * growth[:, None] + 15 * (rain > 0) - 0.8 * swing + 4 * rng.standard_normal((N, T))
    pet = potential_evaporation(lat[:, None], doy, temperature, tmax, tmin)
    daily = {"precipitation": rain, "tmax": tmax, "tmin": tmin, "pet": pet, "humidity": np.clip(humidity, 8, 100),
             "shortwave": extraterrestrial_radiation(lat[:, None], doy) * clear * 11.574}  # MJ/m2/d -> W/m2

    # the bucket, mm: snow, soil with saturation excess, groundwater
    capacity, curve = depth * (40 + 1.6 * clay + 1.8 * silt), 1.2 + 0.04 * sand
    recession, leak = np.clip(10 ** (0.35 * (conductive + 13) - 1.8), 0.002, 0.3), 0.004 + 0.0004 * sand
    snow, soil, ground, flow = 0 * lat, 0.5 * capacity, 20 + 0 * lat, np.zeros((N, T))
    for t in range(T):
        frozen = temperature[:, t] < 0.5
        melt = np.where(frozen, 0, np.minimum(snow, 3 * (temperature[:, t] - 0.5)))
        snow, water = snow + rain[:, t] * frozen - melt, rain[:, t] * ~frozen + melt
        fill = soil / capacity
        quick = np.maximum(water * fill ** curve, soil + water - capacity)
        drain = leak * soil * fill
        evaporated = np.minimum(0.9 * soil, pet[:, t] * np.minimum(1, 2 * fill) * (0.6 + 0.004 * forest))
        soil = np.maximum(soil + water - quick - drain - evaporated, 0)
        base = recession * ground
        ground, flow[:, t] = ground + drain + 0.1 * quick - base, 0.9 * quick + base

    views = {  # what is observed: the latents through noise
        "elevation": elevation * np.exp(noise(0.05)), "slope": 4 * np.exp(0.7 * relief + noise(0.25)),
        "groundwater_depth": 4 * np.exp(0.5 * relief - 0.4 * wet + noise(0.3)),
        "soil_depth": depth * np.exp(noise(0.2)), "clay": np.clip(clay + noise(3), 0, 100),
        "silt": np.clip(silt + noise(3), 0, 100), "sand": np.clip(sand + noise(3), 0, 100),
        "organic_carbon": 60 * np.exp(0.8 * growth - 0.9 * warm + 0.01 * clay + noise(0.25)),
        "carbonate": 100 * sigmoid(4 * (lime - 0.7) + noise(0.3)), "permeability": conductive + noise(0.3),
        "rock_porosity": 0.03 + 0.25 * sigmoid(1.5 * rock + noise(0.3)),
        "forest": np.clip(forest + noise(4), 0, 100), "ndvi": 0.1 + 0.75 * growth + noise(0.03),
        "pasture": np.clip((100 - forest) * np.tanh(growth) + noise(4), 0, 100),
        "p_mean": rain.mean(1) * np.exp(noise(0.08)), "p_seasonality": season + noise(0.08),
        "temperature_mean": temperature.mean(1) + noise(0.5), "pet_mean": pet.mean(1) * np.exp(noise(0.05)),
        "snow_fraction": (rain * (temperature < 0.5)).sum(1) / rain.sum(1),
        "area": np.exp(6 + noise(1)), "population_density": np.exp(2 + 2 * growth - relief + noise(1))}
    static = np.stack([*views.values()], 1).astype(np.float32)                  # (N, S)
    groups, poor = np.array([group_of(name) for name in views]), rng.random(N) < 1 / 3
    for group in sorted({*groups} - {"context"}):
        static[np.ix_(poor & (rng.random(N) < 0.5), groups == group)] = np.nan
    return Sites(np.array([f"synthetic_{i:04d}" for i in range(N)]), np.stack([lat, lon], 1).astype(np.float32),
                 static, np.stack([*daily.values()], -1).astype(np.float32), flow.astype(np.float32), dates,
                 tuple(views), tuple(daily))


# ---- real archives: a reader yields (id, file, {attribute or "lat", "lon": value}, dates, {series}) ----

def assemble(records, target="streamflow"):
    """Records of single sites, as the readers yield them -> `Sites` on the union of dates and names."""
    if not records:
        raise ValueError("no site with a daily series found")
    ids, files, attributes, days, series = zip(*records)
    static_names = tuple(n for n in STATIC if np.isfinite([a.get(n, np.nan) for a in attributes]).any())
    dynamic_names = tuple(n for n in DYNAMIC if any(n in s for s in series))
    dates = np.arange(min(d.min() for d in days), max(d.max() for d in days) + 1)   # (T,)
    table = np.array([[a.get(n, np.nan) for n in ("lat", "lon", *static_names)] for a in attributes], np.float32)
    latlon = np.stack([table[:, 0], (table[:, 1] + 180) % 360 - 180], 1)        # (N, 2)
    daily = np.full((len(ids), len(dates), len(dynamic_names) + 1), np.nan, np.float32)
    for i, site in enumerate(ids):
        where = f"{files[i]}, site {site}"
        if site in ids[:i]:
            raise ValueError(f"{where}: this id was already read from {files[ids.index(site)]}")
        if len(np.unique(days[i])) < len(days[i]):
            raise ValueError(f"{where}: the same date twice")
        if abs(table[i, 0]) > 90 or abs(table[i, 1]) > 360:
            raise ValueError(f"{where}: coordinates {table[i, :2]} are not degrees")
        for c, name in enumerate((*dynamic_names, target)):
            daily[i, (days[i] - dates[0]).astype(int), c] = series[i].get(name, np.nan)
    return Sites(np.array(ids), latlon, table[:, 2:], daily[..., :-1], daily[..., -1], dates,
                 static_names, dynamic_names)


def read_table(path, numeric, text=(), delimiter=",", skip=0, header=None):
    """A text table -> {column: float32 array}, str array for the columns in `text`, others left out.

    delimiter None = blanks; empty, NA and -999 = NaN. ValueError names file and line of what is wrong.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = file.read().splitlines()[skip:]
    rows = [line.split() for line in lines] if delimiter is None else [*csv.reader(lines, delimiter=delimiter)]
    header = header or (rows.pop(0) if rows else ())
    first, rows, table = skip + 1 + len(lines) - len(rows), [row for row in rows if row], {}
    if not rows:
        raise ValueError(f"{path}: no rows below the header")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {i + first}: {len(row)} fields, expected {len(header)}")
    for name, column in zip(header, zip(*rows)):
        if name in text:
            table[name] = np.array(column)
        elif name in numeric:
            try:
                values = np.array([v or "nan" for v in column], np.float32)
            except ValueError:
                values = [number(v, f"{path}, line {i + first}, {name}") for i, v in enumerate(column)]
            table[name] = np.where(np.less(values, -998), np.nan, values).astype(np.float32)
    return table


def number(text, where):
    """float(text), with empty and NA as NaN; ValueError says where."""
    try:
        return float("nan" if text.strip().upper() in ("", "NA", "NULL") else text)
    except ValueError:
        raise ValueError(f"{where}: '{text.strip()}' is not a number") from None


def parse_dates(table, path):
    """The column date (ISO), or Year, Mnth and Day -> (T,) datetime64[D]."""
    text = table.get("date")
    if text is None:
        text = [f"{y}-{m:0>2}-{d:0>2}" for y, m, d in zip(*(table[c] for c in ("Year", "Mnth", "Day")))]
    try:
        return np.array(text, "datetime64[D]")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_attributes(paths, source, delimiter=","):
    """Join attribute tables on their first column -> {site: {name: value}}; source: column of STATIC."""
    wanted = {"lat": "gauge_lat", "lon": "gauge_lon"} | {name: row[source] for name, row in STATIC.items()}
    wanted = {name: column.partition("*")[::2] for name, column in wanted.items()}
    sites = {}
    for path in paths:
        with open(path, encoding="utf-8-sig") as file:
            key = file.readline().strip().split(delimiter)[0]
        table = read_table(path, {column for column, _ in wanted.values()}, (key,), delimiter)
        if len(set(table[key])) < len(table[key]):
            raise ValueError(f"{path}: the same {key} twice")
        for name, (column, factor) in wanted.items():
            for site, value in zip(table[key], table.get(column, ())):
                sites.setdefault(str(site), {})[name] = value * float(factor or 1)
    return sites


def weather(table, source, lat, dates):
    """The variables of DYNAMIC that a source's table has, and those that follow from them."""
    series = {name: table[row[source]] for name, row in DYNAMIC.items() if row[source] in table}
    tmax, tmin = series.get("tmax"), series.get("tmin")
    if tmax is not None and tmin is not None:
        series.setdefault("temperature", (tmax + tmin) / 2)
    if "temperature" in series:
        series["pet"] = potential_evaporation(lat, day_of_year(dates), series["temperature"], tmax, tmin)
    if "dayl(s)" in table:                                  # mean over daylight -> mean over the day
        series["shortwave"] = series["shortwave"] * table["dayl(s)"] / 86400
    if "vp(Pa)" in table:                                   # saturation: FAO-56 eq. 11
        saturation = 610.8 * np.exp(17.27 * series["temperature"] / (series["temperature"] + 237.3))
        series["humidity"] = np.clip(100 * table["vp(Pa)"] / saturation, 0, 100)
    return series


def read_caravan(folder):
    """Every gauge with a series in a folder of Caravan's layout (doi 10.1038/s41597-023-01975-w)."""
    for source in sorted(p for p in folder.glob("timeseries/csv/*") if p.is_dir()):
        attributes = read_attributes(sorted(folder.glob(f"attributes/{source.name}/*.csv")), 2)
        for path in sorted(source.glob("*.csv")):
            if path.stem not in attributes:
                print(f"{path}: a gauge without attributes, they are fed as missing")
            site = attributes.get(path.stem, {})
            table = read_table(path, {"streamflow", *(row[2] for row in DYNAMIC.values())}, ("date",))
            dates = parse_dates(table, path)
            series = weather(table, 2, site.get("lat", np.nan), dates)
            yield path.stem, path, site, dates, series | {"streamflow": table.get("streamflow", np.nan)}


def read_camels(folder):
    """CAMELS-US (doi 10.5065/D6MW2F4D, 10.5194/hess-21-5293-2017); Daymet where several products are.

    camels_hydro.txt is made from the streamflow and never read. Without attribute tables only
    latitude, elevation and area are known, from the forcing files.
    """
    tables = [p for p in sorted(folder.rglob("camels_*.txt")) if p.stem != "camels_hydro"]
    if not tables:
        print(f"{folder}: no attribute tables (camels_topo.txt …), only latitude, elevation and area known")
    attributes, ymd = read_attributes(tables, 3, ";"), ("Year", "Mnth", "Day")
    flows = {p.name[:8]: p for p in folder.glob("usgs_streamflow/**/*_streamflow_qc.txt")}
    product = next((p for p in ("daymet", "maurer", "nldas") if (folder / "basin_mean_forcing" / p).is_dir()), ".")
    for path in sorted((folder / "basin_mean_forcing" / product).glob("**/*_forcing_leap.txt")):
        basin = path.name[:8]
        with open(path) as file:
            lat, elevation, area = (number(file.readline(), f"{path}, line {i}") for i in (1, 2, 3))
        if not area > 0:
            raise ValueError(f"{path}, line 3: a basin area of {area} m2")
        table = read_table(path, {"dayl(s)", "vp(Pa)", *(row[3] for row in DYNAMIC.values())}, ymd, None, 3)
        dates = parse_dates(table, path)
        series = weather(table, 3, lat, dates)
        if basin in flows:
            flow = read_table(flows[basin], ("ft3/s",), ymd, None, 0, ("id", *ymd, "ft3/s", "flag"))
            _, here, there = np.intersect1d(dates, parse_dates(flow, flows[basin]), return_indices=True)
            series["streamflow"] = np.full(len(dates), np.nan, np.float32)
            series["streamflow"][here] = flow["ft3/s"][there] * (0.028316846592 * 86400 * 1000 / area)  # mm/d
        known = {"lat": lat, "elevation": elevation, "area": area / 1e6}
        yield basin, path, known | attributes.get(basin, {}), dates, series


READERS = {"caravan": read_caravan, "camels": read_camels}


# ---- what every script does with sites ----

def day_of_year(dates):
    """(T,) dates -> 1..366."""
    return (dates - dates.astype("datetime64[Y]")).astype(int) + 1


def extraterrestrial_radiation(lat, doy):
    """Radiation at the top of the atmosphere in MJ/m2/d, lat in degrees (FAO-56 eq. 21)."""
    phi, angle = np.deg2rad(lat), 2 * np.pi * doy / 365
    declination = 0.409 * np.sin(angle - 1.39)
    sunset = np.arccos(np.clip(-np.tan(phi) * np.tan(declination), -1, 1))
    return 37.6 * (1 + 0.033 * np.cos(angle)) * (
        sunset * np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.sin(sunset))


def potential_evaporation(lat, doy, temperature, tmax=None, tmin=None):
    """PET in mm/d from degC: Hargreaves where tmax and tmin exist, else Oudin et al. 2005."""
    radiation = extraterrestrial_radiation(lat, doy) / 2.45                     # mm/d of evaporation
    if tmax is None or tmin is None:
        return (radiation * np.maximum(temperature + 5, 0) / 100).astype(np.float32)
    swing = np.sqrt(np.maximum(tmax - tmin, 0))
    return (0.0023 * radiation * np.maximum(temperature + 17.8, 0) * swing).astype(np.float32)


def fit_scaling(values):
    """Per-variable statistics of (..., V) *training* values for scale(): (3, V) log flag, mean, std.

    Variables that are never negative and skewed (precipitation, areas) are scaled as log(1 + x).
    """
    v = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # a variable all missing gets NaN: stays missing
        skew = np.nanmean(((v - np.nanmean(v, 0)) / np.nanstd(v, 0)) ** 3, 0)
        log = (np.nanmin(v, 0) >= 0) & (skew > 2)
        v = np.where(log, np.log1p(np.maximum(v, 0)), v)
        std = np.nanstd(v, 0)
        return np.stack([log, np.nanmean(v, 0), np.where(std < 1e-6, 1, std)])


def scale(values, scaling):
    """Standardise (..., V) with the statistics of fit_scaling; NaN stays NaN."""
    log, mean, std = scaling
    return ((np.where(log > 0, np.log1p(np.maximum(values, 0)), values) - mean) / std).astype(np.float32)


def gauge(site):
    """One name for a gauge that several archives hold: camels_01022500, hysets_01022500 -> 01022500."""
    return site.removeprefix("camels_").removeprefix("hysets_")


def folds(sites, kind, k, seed=0):
    """Fold of each site, (N,) int in 0..k-1; a gauge that two archives hold has one fold.

    "pub", ungauged basins: a hash of seed and gauge, whatever other sites there are. "pur", ungauged
    regions: k-means on the sphere, an offset per region balancing the sizes, so regions are contiguous.
    """
    keys = [gauge(i) for i in sites.ids]
    if kind == "pub":
        return np.array([int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest(), 16) % k for key in keys])
    if kind != "pur":
        raise ValueError(f"hold-out '{kind}': expected pub or pur")
    known = {key: where for key, where in sorted(zip(keys, sites.latlon.tolist())) if not np.isnan(where).any()}
    lost = [i for i, key in zip(sites.ids, keys) if key not in known]
    if lost:
        raise ValueError(f"{len(lost)} sites, such as {lost[0]}, have no coordinates, so no region")
    lat, lon = np.deg2rad([*known.values()]).T
    xyz = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    centres = xyz[np.random.default_rng(seed).choice(len(xyz), k, replace=False)]
    offset = np.zeros(k)
    for step in range(300):
        cost = ((xyz[:, None] - centres) ** 2).sum(-1) + offset                 # (N, k)
        label = cost.argmin(1)
        surplus = np.bincount(label, minlength=k) * k / len(xyz) - 1
        offset += 0.3 * 0.98 ** step * cost.min(1).std() * surplus
        centres = np.stack([xyz[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)])
    return np.array([dict(zip(known, label))[key] for key in keys])

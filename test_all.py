"""All tests: python test_all.py [part of a name], or pytest test_all.py. Real data: MINSTEFALAND_REAL."""

import dataclasses
import inspect
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch

import data
import model
import train

HERE = Path(__file__).resolve().parent
REAL = Path(os.environ.get("MINSTEFALAND_REAL", HERE.parent / "shared" / "real"))
CONFIG = dict(dynamic_names=("p", "tmax", "tmin"), static_names=("clay", "sand", "height", "area"),
              dynamic_groups=("p", "t", "t"), static_groups=("soil", "soil", "terrain", "context"),
              d_model=16, n_heads=2, n_layers=2, d_ff=32, d_hidden=8, max_days=120)


def real(folder):
    if not (REAL / folder).exists():
        raise SkipTest(f"no real data at {folder}")
    return REAL / folder


def raises(kind, words, call):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), f"{words} not in: {error}"
        return
    raise AssertionError(f"no {kind.__name__}")


def small_model(**changes):
    torch.manual_seed(0)
    return model.StefaLand(model.Config(**{**CONFIG, **changes})).eval()


def small_batch(B=5, T=60):
    g = torch.Generator().manual_seed(1)
    forcing, static = torch.randn(B, T, 3, generator=g), torch.randn(B, 4, generator=g)
    forcing[0, 5:9, 1], static[1, 2] = torch.nan, torch.nan
    latlon = torch.rand(B, 2, generator=g) * 90
    return forcing, static, latlon, torch.arange(1.0, T + 1).expand(B, T)


# ---- model ----

def test_spherical_harmonics_are_orthonormal():
    z, weight = np.polynomial.legendre.leggauss(16)
    lon = np.arange(32) * 360 / 32
    grid = torch.tensor([(lat, x) for lat in np.rad2deg(np.arcsin(z)) for x in lon])
    basis = model.spherical_harmonics(grid, 6)                                  # (16 32, 49)
    area = torch.tensor(weight).repeat_interleave(32) * 2 * np.pi / 32
    gram = basis.T @ (basis * area[:, None])
    assert basis.shape[1] == 49 and (gram - torch.eye(49)).abs().max() < 1e-12
    high = model.spherical_harmonics(torch.tensor([[89.9, 10.0]]), 40)
    assert torch.isfinite(high).all()


def test_embedding_equals_one_map_per_variable():
    e = model.VariableEmbedding(3, 16, 8)
    x, hide = torch.randn(4, 7, 3), torch.rand(4, 7, 3) < 0.3
    x[0, 0, 0] = torch.nan
    total = torch.zeros(4, 7, 16)
    for b in range(4):
        for t in range(7):
            for v in range(3):
                if hide[b, t, v] or x[b, t, v].isnan():
                    total[b, t] += e.mask_vector[v]
                else:
                    h = torch.nn.functional.gelu(x[b, t, v] * e.w1[v] + e.b1[v])
                    total[b, t] += e.w2[:, v * 8:v * 8 + 8] @ h + e.b2[v]
    assert torch.allclose(e(x, hide), total, atol=1e-5)


def test_linear_and_dropout_are_what_they_say():
    x, layer = torch.randn(3, 11, 8), model.Linear(8, 5)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    y = model.dropout(torch.ones(1000, 1001), 0.1)
    p = round(25.6) / 256
    assert abs((y == 0).double().mean() - p) < 1e-3 and abs(y.mean() - 1) < 2e-3
    assert model.dropout(x, 0.0) is x or torch.equal(model.dropout(x, 0.0), x)


def test_masks_respect_groups_windows_and_chances():
    m = small_model(p_always=0.0, p_static=0.25, windows=1)
    B, T = 4000, 120
    dynamic, static, location = m.draw_masks(B, T, torch.Generator().manual_seed(0))
    assert torch.equal(dynamic[..., 1], dynamic[..., 2]) and not torch.equal(dynamic[..., 0], dynamic[..., 1])
    assert torch.equal(static[:, 0], static[:, 1]) and not static[:, 3].any()
    days = dynamic[..., 0].sum(1)
    assert set(days[days > 0].tolist()) == set(range(30, 91))
    switches = (dynamic[:, 1:, 0] != dynamic[:, :-1, 0]).sum(1)
    assert switches.max() <= 2                                                  # one contiguous window
    for share, expected in (((days > 0), 0.5), (static[:, 0], 0.25), (static[:, 2], 0.25), (location, 0.3)):
        assert abs(share.double().mean() - expected) < 0.03
    whole = small_model(p_always=0.2, p_dynamic=0.0).draw_masks(B, T)[0]
    assert set(whole[..., 0].sum(1).tolist()) == {0, T} and abs(whole[..., 0].double().mean() - 0.2) < 0.03


def test_loss_ignores_missing_and_shown_entries():
    m, (forcing, static, latlon, doy) = small_model(), small_batch()
    hidden = m.draw_masks(5, 60, torch.Generator().manual_seed(3))
    forcing[2, :, 0] = torch.nan
    truth = [forcing.clone().requires_grad_(), static.clone().requires_grad_()]
    outputs = m.decode(m.encode(forcing, static, latlon, doy, hidden))
    errors, counts = m(forcing, static, latlon, doy, hidden)
    for out, t, hide, error, n in zip(outputs, truth, hidden, errors, counts):
        scored = hide & ~t.isnan()
        assert n == scored.sum() and torch.allclose(error, (out - t)[scored].square().sum(), rtol=1e-5)
    # values behind a mask reach the loss only as truth: hidden inputs must not change the output
    other = torch.where(hidden[0], forcing + 9, forcing)
    assert torch.allclose(m.encode(other, static, latlon, doy, hidden), m.encode(forcing, static, latlon, doy, hidden))
    everything = [torch.ones_like(h) for h in hidden]
    forcing = forcing.clone().requires_grad_()
    m(forcing, static, latlon, doy, everything)[0].sum().backward()
    assert (forcing.grad[forcing.isnan()] == 0).all() and (forcing.grad[~forcing.isnan()] != 0).all()


def test_sites_of_a_batch_do_not_mix():
    m, batch = small_model(), small_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        assert torch.allclose(m.encode(*batch)[order], m.encode(*(x[order] for x in batch)), atol=1e-5)
        alone = m.encode(*(x[1:2] for x in batch))
        assert torch.allclose(m.encode(*batch)[1:2], alone, atol=1e-5)


def test_location_and_season_can_be_absent():
    m, (forcing, static, latlon, doy) = small_model(), small_batch()
    nowhere = m.encode(forcing, static, torch.full_like(latlon, torch.nan), doy)
    assert torch.equal(nowhere, m.encode(forcing, static, None, doy))
    assert not torch.allclose(nowhere, m.encode(forcing, static, latlon, doy))
    assert torch.isfinite(m.encode(forcing, static)).all()


def test_bad_input_is_refused():
    m, (forcing, static, latlon, doy) = small_model(), small_batch()
    raises(ValueError, ["2 dynamic", "tmin"], lambda: m.encode(forcing[..., :2], static))
    raises(ValueError, ["3 static", "clay"], lambda: m.encode(forcing, static[:, :3]))
    raises(ValueError, ["180 days", "120"], lambda: m.encode(torch.zeros(5, 180, 3), static))
    raises(ValueError, ["5 sites", "of 2"], lambda: m.encode(forcing, static[:2]))
    raises(ValueError, ["missing"], lambda: m.encode(forcing * torch.nan, static * torch.nan))
    raises(ValueError, ["nothing to learn"], lambda: model.masked_loss(torch.zeros(2), torch.zeros(2)))


def test_release_parity():
    z = np.load(real("release") / "release_io.npz")
    state = {key[6:]: z[key] for key in z.files if key.startswith("state/")}
    m = model.StefaLand.from_release(state, int(z["heads"])).eval()
    x, s, mask = (torch.tensor(z[key]) for key in ("x", "s", "mask"))
    assert m.dynamic_names == tuple(z["dynamic_names"]) and m.static_names == tuple(z["static_names"])
    with torch.no_grad():
        encoded = m.encode(x, s)
        got = {"tokens": m.embed(x, s), "encoded": encoded, "out_dynamic": m.decode(encoded)[0],
               "out_static": m.decode(encoded)[1],
               "out_dynamic_masked": m.decode(m.encode(x, s, hidden=(mask, None, None)))[0]}
    for key, value in got.items():
        assert np.abs(value.numpy() - z[key]).max() < 1e-5, key
    raises(ValueError, ["surprise"], lambda: model.StefaLand.from_release({**state, "surprise": z["x"]}, 4))
    del state["decoder_norm.bias"]
    raises(ValueError, ["decoder_norm.bias"], lambda: model.StefaLand.from_release(state, 4))


# ---- data ----

def test_synthetic_world():
    a, b = data.load("synthetic", n_sites=80, years=2), data.load("synthetic", n_sites=80, years=2)
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(vars(a).values(), vars(b).values()))
    assert data.load(seed=1, n_sites=80, years=2).static.tobytes() != a.static.tobytes()
    started = time.time()
    s = data.load("synthetic")
    assert time.time() - started < 10 and s.forcing.shape == (700, 2192, 6)
    rain, pet, flow = s.forcing[..., 0].mean(1), s.forcing[..., 3].mean(1), s.target.mean(1)
    assert 1.5 < rain.mean() < 4 and 2 < pet.mean() < 4 and 0.3 < (flow / rain).mean() < 0.6
    assert (flow < rain).all() and (s.target >= 0).all() and 0.2 < (s.forcing[..., 0] > 0).mean() < 0.45
    assert 0.25 < np.isnan(s.static).any(1).mean() < 0.4


def test_potential_evaporation_and_radiation():
    # FAO-56 example 8: 3 September at 20 S, extraterrestrial radiation 32.2 MJ/m2/d
    assert abs(data.extraterrestrial_radiation(-20.0, np.array([246]))[0] - 32.2) < 0.1
    oudin = data.potential_evaporation(0.0, np.array([80]), np.array([20.0]))[0]
    assert abs(oudin - 37.7 / 2.45 * 25 / 100) < 0.1                            # Ra at the equator, equinox
    hargreaves = data.potential_evaporation(0.0, np.array([80]), np.array([20.0]), np.array([26.0]), np.array([14.0]))
    assert abs(hargreaves[0] - 0.0023 * 37.7 / 2.45 * 37.8 * 12 ** 0.5) < 0.1
    assert data.potential_evaporation(80.0, np.array([1]), np.array([-30.0]))[0] == 0


CARAVAN = {
    "attributes/camels/attributes_caravan_camels.csv": "gauge_id,p_mean,frac_snow\ncamels_01,3.5,0.1\ncamels_02,2.5,\n",
    "attributes/camels/attributes_other_camels.csv":
        'gauge_id,gauge_name,country,gauge_lat,gauge_lon,area\ncamels_01,"A, at B",US,40.5,-75,100\n'
        "camels_02,C,US,41,285.5,200\ncamels_09,no series,US,42,-74,1\n",
    "attributes/camels/attributes_hydroatlas_camels.csv": "gauge_id,slp_dg_sav,cly_pc_sav\ncamels_01,55,20\n",
    "timeseries/csv/camels/camels_01.csv": "date,streamflow,total_precipitation_sum,temperature_2m_mean,snow\n"
        "2000-01-01,1.5,0,10,9\n2000-01-03,,2,11,9\n2000-01-04,0.5,4,,9\n",
    "timeseries/csv/camels/camels_02.csv": "date,temperature_2m_min,temperature_2m_max\n2000-01-02,0,10\n"}
TIMES = "Year Mnth Day Hr\tdayl(s)\tprcp(mm/day)\tsrad(W/m2)\tswe(mm)\ttmax(C)\ttmin(C)\tvp(Pa)\n"
CAMELS = {
    "basin_mean_forcing/daymet/01/01013500_lump_cida_forcing_leap.txt": "  47.24\n 250.00\n86400000\n" + TIMES +
        "1980 01 01 12\t43200.00\t3.00\t200.00\t0.00\t10.00\t0.00\t610.80\n1980 01 02 12\t43200.00\t0.00\t100.00\t0\t8\t2\t500\n",
    "usgs_streamflow/01/01013500_streamflow_qc.txt": "01013500 1980 01 01   100.00 A\n01013500 1980 01 02  -999.00 M\n",
    "camels_attributes_v2.0/camels_topo.txt": "gauge_id;gauge_lat;gauge_lon;elev_mean;area_gages2\n01013500;47.2;-68.6;251;90\n",
    "camels_attributes_v2.0/camels_geol.txt": "gauge_id;carbonate_rocks_frac;geol_porostiy\n01013500;0.25;NA\n",
    "camels_attributes_v2.0/camels_hydro.txt": "gauge_id;q_mean\n01013500;1.7\n"}


def archive(files, **changes):
    """Write the files of an archive to a new temporary folder; changes replace texts by file name part."""
    folder = Path(tempfile.mkdtemp())
    for name, text in files.items():
        for part, (old, new) in changes.items():
            text = text.replace(old, new) if part in name else text
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_caravan_reader():
    folder = archive(CARAVAN)
    s = data.load(f"caravan:{folder}", cache=None)
    assert list(s.ids) == ["camels_01", "camels_02"] and len(s.dates) == 4      # the gap on 2000-01-02 is a day
    assert np.allclose(s.latlon, [[40.5, -75], [41, -74.5]])                    # 285.5 E is 74.5 W
    static, daily = dict(zip(s.static_names, s.static.T)), dict(zip(s.dynamic_names, s.forcing.transpose(2, 0, 1)))
    assert np.allclose(static["slope"], [5.5, np.nan], equal_nan=True) and np.allclose(static["area"], [100, 200])
    assert np.allclose(daily["precipitation"][0], [0, np.nan, 2, 4], equal_nan=True)
    assert np.allclose(s.target[0], [1.5, np.nan, np.nan, 0.5], equal_nan=True) and np.isnan(s.target[1]).all()
    assert daily["temperature"][1, 1] == 5 and np.isnan(daily["tmax"][0]).all() and daily["pet"][1, 1] > 0
    for part, old, new, words in (
            ("camels_01.csv", "2,11,9", "2,11", ["camels_01.csv", "line 3", "4 fields"]),
            ("camels_01.csv", "2,11,9", "two,11,9", ["camels_01.csv", "line 3", "'two'"]),
            ("camels_01.csv", "2000-01-03", "2000-01-01", ["camels_01", "same date twice"]),
            ("camels_01.csv", "2000-01-03", "soon", ["camels_01.csv", "soon"]),
            ("_other_", "41,285.5", "95,285.5", ["camels_02", "95"]),
            ("_other_", "camels_02,C", "camels_01,C", ["attributes_other", "twice"])):
        raises(ValueError, words, lambda: data.load(f"caravan:{archive(CARAVAN, **{part: (old, new)})}", cache=None))
    raises(FileNotFoundError, ["nowhere"], lambda: data.load("caravan:/nowhere"))
    raises(ValueError, ["pigeon", "caravan"], lambda: data.load("pigeon:/"))


def test_camels_reader():
    s = data.load(f"camels:{archive(CAMELS)}", cache=None)
    static, daily = dict(zip(s.static_names, s.static[0])), dict(zip(s.dynamic_names, s.forcing[0].T))
    assert s.ids[0] == "01013500" and np.allclose(s.latlon[0], [47.2, -68.6])
    assert static["elevation"] == 251 and static["carbonate"] == 25 and "q_mean" not in s.static_names
    assert abs(s.target[0, 0] - 100 * 0.028316846592 * 86400 / 86400) < 1e-4 and np.isnan(s.target[0, 1])
    assert daily["shortwave"][0] == 100 and daily["temperature"][0] == 5                # half a day of light
    assert abs(daily["humidity"][0] - 100 * 610.8 / (610.8 * np.exp(17.27 * 5 / 242.3))) < 0.01
    bare = data.load(f"camels:{archive({k: v for k, v in CAMELS.items() if 'attributes' not in k})}", cache=None)
    assert bare.static_names == ("elevation", "area") and np.isnan(bare.latlon[0, 1])
    raises(ValueError, ["line 3", "area"], lambda: data.load(
        f"camels:{archive(CAMELS, lump=('86400000', '0'))}", cache=None))


def test_sources_are_joined_by_name_and_cached():
    a, b, cache = archive(CARAVAN), archive(CAMELS), Path(tempfile.mkdtemp())
    spec = f"caravan:{a},camels:{b}"
    first, again = data.load(spec, cache=cache), data.load(spec, cache=cache)
    assert len(first.ids) == 3 and first.dates[0] == np.datetime64("1980-01-01") and len(list(cache.iterdir())) == 1
    assert all(np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f")
               for x, y in zip(vars(first).values(), vars(again).values()))
    assert np.isnan(first.static[2][first.static_names.index("clay")])
    path = next((a / "timeseries/csv/camels").glob("*01.csv"))
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert np.nanmax(data.load(spec, cache=cache).target[0]) == 2.5


def test_real_caravan_and_camels():
    spec = f"caravan:{real('caravan')},camels:{real('camels_us')}"
    cache = Path(tempfile.mkdtemp())
    s = data.load(spec, cache=cache)
    started = time.time()
    assert len(data.load(spec, cache=cache).ids) == 482 + 77 and time.time() - started < 2
    daily = dict(zip(s.dynamic_names, s.forcing.transpose(2, 0, 1)))
    assert 2.5 < np.nanmean(daily["precipitation"]) < 4 and 1.5 < np.nanmean(daily["pet"]) < 3.5
    # the same gauge in both archives has the same flow: mm/d from ft3/s and area agrees within a few per cent
    both = [(i, j) for i, x in enumerate(s.ids) for j, y in enumerate(s.ids) if x == "camels_" + y]
    ratio = [np.nanmean(s.target[i] - 0 * s.target[j]) / np.nanmean(s.target[j] - 0 * s.target[i]) for i, j in both]
    assert len(both) > 50 and abs(np.median(ratio) - 1) < 0.02
    fold = data.folds(s, "pub", 5)
    assert all(fold[i] == fold[j] for i, j in both)


def test_folds():
    s = data.load("synthetic", n_sites=300, years=1)
    pub, pur = data.folds(s, "pub", 5), data.folds(s, "pur", 5)
    assert set(pub) == set(pur) == set(range(5)) and np.bincount(pub).min() > 35
    assert np.bincount(pur).min() > 40 and np.bincount(pur).max() < 80          # nearly equal regions
    part = dataclasses.replace(s, ids=s.ids[::3])
    assert np.array_equal(data.folds(part, "pub", 5), pub[::3])     # whatever other sites there are
    assert not np.array_equal(data.folds(s, "pub", 5, seed=1), pub)
    # contiguous: two sites of a region are joined by a great circle whose nearby sites are of the region
    lat, lon = np.deg2rad(s.latlon.astype(float)).T
    xyz = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    near = np.argsort(-(xyz @ xyz.T), 1)[:, 1:4]                                # three nearest neighbours
    assert (pur[near] == pur[:, None]).mean() > 0.9 and (pub[near] == pub[:, None]).mean() < 0.4
    raises(ValueError, ["pub or pur"], lambda: data.folds(s, "puf", 5))


def test_scaling():
    rng = np.random.default_rng(0)
    x = np.stack([rng.gamma(0.3, 5, 5000), rng.normal(3, 2, 5000), np.full(5000, np.nan), np.full(5000, 7.0)], 1)
    scaling = train.fit_scaling(x)
    y = train.scale(x, scaling)
    assert scaling[0].tolist() == [1, 0, 0, 0] and np.isnan(y[:, 2]).all() and (y[:, 3] == 0).all()
    assert np.abs(y[:, :2].mean(0)).max() < 1e-5 and np.abs(y[:, :2].std(0) - 1).max() < 1e-4


# ---- training ----

def run(*arguments, check=True, launcher=(sys.executable,), env=None):
    done = subprocess.run([*map(str, launcher), "train.py", *map(str, arguments)], cwd=HERE, text=True,
                          capture_output=True, env={**os.environ, **(env or {})})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkpoint(folder):
    return torch.load(Path(folder) / "pretrained.pt", weights_only=True)


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def test_resume_equals_uninterrupted():
    a, b = tempfile.mkdtemp(), tempfile.mkdtemp()
    run("--quick", "--steps", 8, "--out", a)
    process = subprocess.Popen([sys.executable, "train.py", "--quick", "--steps", "8", "--save-every", "3", "--out", b],
                               cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "step 1/" not in (line := process.stdout.readline()):
        assert line, "ended before the first step"
    process.terminate()                                                         # SIGTERM: save, exit 0
    assert "continue with --resume" in process.stdout.read() and process.wait() == 0
    assert "resuming at step" in run("--resume", "--out", b)
    assert same(checkpoint(a)["model"], checkpoint(b)["model"])


def test_two_processes_equal_one():
    a, b = tempfile.mkdtemp(), tempfile.mkdtemp()
    options = ("--quick", "--steps", 1, "--config", "dropout=0", "--dtype", "float32", "--out")
    run(*options, a)
    out = run(*options, b, launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
              env={"OMP_NUM_THREADS": "1"})
    one, two = ([s["exp_avg"] for s in checkpoint(x)["optimizer"]["state"].values()] for x in (a, b))
    assert "2 process(es)" in out and len(one) > 20                             # exp_avg is a tenth of the gradient
    assert all((x - y).abs().max() < 1e-6 + 1e-4 * x.abs().max() for x, y in zip(one, two))
    assert same(checkpoint(a)["model"], checkpoint(b)["model"], 1e-4)           # Adam magnifies rounding


def test_checkpoint_and_holdout():
    out = Path(tempfile.mkdtemp())
    text = run("--quick", "--steps", 3, "--holdout", "pub", "--folds", 3, "--fold", 1, "--out", out)
    saved = checkpoint(out)
    sites = data.load("synthetic", n_sites=60, years=3)
    held = set(sites.ids[data.folds(sites, "pub", 3) == 1])
    assert saved["ids"] and not held & set(saved["ids"]) and saved["latlon"].shape == (len(saved["ids"]), 2)
    assert saved["step"] == 3 and "fold 1 of 3" in text and "static soil" in text
    m = model.StefaLand(model.Config(**saved["config"]))
    m.load_state_dict(saved["model"])
    training = np.isin(sites.ids, saved["ids"])
    assert np.allclose(saved["scaling"]["static"], train.fit_scaling(sites.static[training]), equal_nan=True)


def test_nonfinite_loss_stops_and_keeps_the_checkpoint():
    out = Path(tempfile.mkdtemp())
    run("--quick", "--steps", 2, "--out", out)
    before = (out / "pretrained.pt").read_bytes()
    text = run("--resume", "--steps", 9, "--lr", 1e30, "--out", out, check=False)
    assert "FloatingPointError" in text and "step" in text and (out / "pretrained.pt").read_bytes() == before


def test_ridge_yardstick():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(200, 5)), rng.normal(size=200)
    y = x @ [1, -2, 0, 0, 3] + 1 + 0.1 * noise
    assert np.abs(train.ridge(x[:150], y[:150], x[150:]) - y[150:]).max() < 0.5
    assert abs(train.r_squared(y[:, None], np.full((200, 1), y.mean()))) < 1e-9
    useless = train.ridge(x[:150], noise[:150], x[150:])
    assert np.abs(useless - noise[:150].mean()).max() < 0.5                     # shrinks to the mean


def main():
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name, test in [*globals().items()]:
        if not name.startswith("test_") or not inspect.isfunction(test) or (sys.argv[1:] and sys.argv[1] not in name):
            continue
        started = time.time()
        try:
            test()
            result = "passed"
        except SkipTest as why:
            result = f"skipped: {why}"
        except Exception:
            traceback.print_exc()
            result = "failed"
        counts[result.split(":")[0]] += 1
        print(f"{name}: {result} ({time.time() - started:.1f} s)", flush=True)
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()

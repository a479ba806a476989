"""All tests, those of applications/tests.py too: python test_all.py [part of a name], or pytest.

Real data: $MINSTEFALAND_REAL, or ../shared/real; tests that need it skip where it is not.
"""

import contextlib
import copy
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import unittest
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import mkdtemp
from unittest import mock

import numpy as np
import torch
from numpy import nan

import data
import eval as evaluate
import finetune
import model
import train

REAL = Path(os.environ.get("MINSTEFALAND_REAL", Path(train.__file__).parents[1] / "shared/real"))
needs_real_data = unittest.skipUnless(REAL.exists(), f"no folder {REAL}")
raises = unittest.TestCase().assertRaisesRegex
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5, equal_nan=True, check_dtype=False)


# model.py

def small(**changes):
    """A model, and a batch of 5 sites and 60 days for it with some values missing."""
    torch.manual_seed(0)
    m = model.StefaLand(model.Config(
        ("p", "tmax", "tmin"), ("clay", "sand", "height", "area"), ("p", "t", "t"),
        ("soil", "soil", "terrain", "context"), d_model=16, d_hidden=8, **changes)).eval()
    forcing, static, latlon = torch.randn(5, 60, 3), torch.randn(5, 4), 90 * torch.rand(5, 2)
    forcing[0, 5:9, 1], forcing[2, :, 0], static[1, 2] = nan, nan, nan
    return m, forcing, static, latlon, torch.arange(1.0, 61).expand(5, 60)


def test_spherical_harmonics_fulfil_the_addition_theorem():
    place = 180 * torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).double() - 90
    basis, xyz = model.spherical_harmonics(place, 40), data.on_sphere(place)
    kernel = np.polynomial.legendre.legval(xyz @ xyz.T, (2 * np.arange(41) + 1) / (4 * np.pi))
    assert np.abs(basis @ basis.T - kernel).max() < 1e-9


def test_variable_embedding_equals_its_formula():
    torch.manual_seed(0)
    e, gelu = model.VariableEmbedding(3, 16, 8), torch.nn.GELU()
    x, hide = torch.randn(4, 7, 3).sqrt(), torch.rand(4, 7, 3) < 0.3            # half of x is NaN
    torch.nn.init.normal_(e.b2)
    units = gelu(x[..., None] * e.w1 + e.b1)                                    # (4, 7, V, hidden)
    tokens = torch.einsum("btvh,dvh->btvd", units, e.w2.view(16, 3, 8)) + e.b2
    close(e(x, hide), torch.where((hide | x.isnan())[..., None], e.mask_vector, tokens).sum(2))


def test_fast_dropout_keeps_share_and_mean():
    y = model.Dropout(0.1)(torch.ones(999_999))
    assert abs((y == 0).double().mean() - 26 / 256) < 1e-3 and abs(y.mean() - 1) < 2e-3
    assert torch.equal(model.Dropout(0.1).eval()(torch.ones(99)), torch.ones(99))


def test_encoder_layer_equals_torchs():
    for heads in (2, 4):                                    # head widths 32 and 16: two ways
        torch.manual_seed(0)
        ours, x = model.EncoderLayer(model.Config(n_heads=heads)).eval(), torch.randn(3, 9, 64)
        theirs = torch.nn.TransformerEncoderLayer(64, heads, 128, 0, "gelu", batch_first=True)
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
        close(ours(x), theirs(x))


def test_groups_are_hidden_together_within_one_window_of_30_to_90_days():
    m, *_ = small(p_always=0.0, windows=1)
    hidden = m.draw_masks(4000, 120)
    p, tmax, tmin = hidden.dynamic.unbind(-1)
    clay, sand, height, area = hidden.static.unbind(-1)
    assert torch.equal(tmax, tmin) and torch.equal(clay, sand)
    assert not torch.equal(p, tmax) and not torch.equal(clay, height)
    assert set(p.sum(1).tolist()) - {0} == set(range(30, 91))
    assert (p[:, 1:] != p[:, :-1]).sum(1).max() <= 2
    assert not area.any()                                   # "context" is never hidden
    m, *_ = small(p_always=0.0, windows=1, window_days=(30, 30))
    p = m.draw_masks(500, 31).dynamic[..., 0]
    assert set(p.sum(1).tolist()) == {0, 30} and p[:, 0].any() and p[:, 30].any()


def test_presets_have_known_sizes():
    names = tuple("abcdef"), tuple(f"s{i}" for i in range(19))
    sizes = {}
    for name, preset in model.PRESETS.items():
        network = model.StefaLand(model.Config(*names, **preset))
        sizes[name] = sum(p.numel() for p in network.parameters())
    assert sizes == {"small": 341_593, "paper": 3_580_953}


def test_masks_hide_the_shares_asked_for():
    m, *_ = small(p_always=0.0, p_static=0.25, windows=1)
    hidden = m.draw_masks(4000, 120)
    always = small(p_always=0.2, p_dynamic=0.0)[0].draw_masks(4000, 120).dynamic[..., 0]
    assert set(always.sum(1).tolist()) == {0, 120}
    parts = hidden.dynamic[..., 0].any(1), hidden.static[:, 0], hidden.static[:, 2], hidden.location
    shares = [part.double().mean() for part in (*parts, always)]
    assert np.allclose(shares, [0.5, 0.25, 0.25, 0.6, 0.2], atol=0.03)
    several = small(p_always=0.0, windows=3)[0].draw_masks(4000, 120).dynamic[..., 0].any(1)
    assert abs(several.double().mean() - (1 - 0.5 ** 3)) < 0.03


def test_errors_are_summed_over_what_is_hidden_and_observed():
    m, forcing, *rest = small()
    hidden = m.draw_masks(5, 60)
    errors, counts = m(forcing, *rest, hidden)
    outputs = m.decode(m.encode(forcing, *rest, hidden))
    for k, (output, truth, hide) in enumerate(zip(outputs, (forcing, rest[0]), hidden)):
        squares = (output - truth)[hide].square()
        assert counts[k] == (~squares.isnan()).sum()
        close(errors[k] / counts[k], squares.nanmean())


def test_hidden_values_do_not_reach_the_encoder():
    m, forcing, *rest = small()
    hidden = m.draw_masks(5, 60)
    changed = torch.where(hidden.dynamic, forcing + 9, forcing)
    close(m.encode(changed, *rest, hidden), m.encode(forcing, *rest, hidden))


def test_a_missing_value_is_never_scored():
    m, forcing, *rest = small()
    nothing_shown = model.Masks(*[mask | True for mask in m.draw_masks(5, 60)])
    m(forcing.requires_grad_(), *rest, nothing_shown)[0].sum().backward()
    assert torch.equal(forcing.grad == 0, forcing.isnan())


def test_objective_is_dynamic_plus_half_of_static():
    close(model.masked_loss(torch.tensor([6, 4]), torch.tensor([3, 1])), torch.tensor(2 + 0.5 * 4))
    raises(ValueError, "nothing to learn", model.masked_loss, torch.zeros(2), torch.zeros(2))


def test_sites_of_a_batch_do_not_mix():
    m, *batch = small()
    close(m.encode(*(x[[3, 1]] for x in batch)), m.encode(*batch)[[3, 1]])


def test_an_unknown_place_is_a_hidden_place_and_a_known_one_counts():
    m, forcing, static, latlon, doy = small()
    nowhere, hide = m.encode(forcing, static, None, doy), torch.ones(5).bool()
    close(m.encode(forcing, static, latlon * nan, doy), nowhere)
    close(m.encode(forcing, static, latlon, doy, model.Masks(location=hide)), nowhere)
    assert (m.encode(forcing, static, latlon * 0, doy) - nowhere).abs().max() > 1e-3


def test_the_season_counts():
    m, forcing, static, latlon, doy = small()
    now = m.encode(forcing, static, latlon, doy)
    for other in (doy + 90, None):
        assert (m.encode(forcing, static, latlon, other) - now).abs().max() > 1e-3
    close(m.encode(forcing, static, latlon, doy + 365.25), now, atol=1e-4)


def test_the_network_refuses_input_it_has_no_place_for():
    m, forcing, static, *_ = small()
    raises(ValueError, "2 dynamic.*tmin", m.encode, forcing[..., :2], static)
    raises(ValueError, "3 static.*clay", m.encode, forcing, static[:, :3])
    raises(ValueError, "5 sites.*of 2", m.encode, forcing, static[:2])
    raises(ValueError, "400 days.*365", m.encode, torch.zeros(5, 400, 3), static)
    raises(ValueError, "missing", m.encode, forcing * nan, static * nan)
    assert m.encode(forcing * nan, static).isfinite().all()     # either may be missing, not both
    assert m.encode(forcing, static * nan).isfinite().all()
    assert m.encode(torch.zeros(5, 365, 3), static).shape == (5, 366, 16)


# data.py

def test_the_synthetic_world_is_the_same_for_the_same_seed():
    a, b, c = (vars(data.synthetic_world(seed, 80, 2)) for seed in (0, 0, 1))
    np.testing.assert_equal(a, b)
    assert not np.array_equal(a["latlon"], c["latlon"])
    for values, means in (                                  # and the one that results are of
            (a["static"], [534.3, 1.411, 4.898, 29.29, 35.88, 36.43, 57.32, 25.66, -12.9, 0.4463,
                           0.1587, 47.87, 15.27, 2.284, 3.103, 14.67, 0.106, 621.8, 44.79]),
            (a["forcing"].reshape(-1, 6), [2.387, 19.59, 10.35, 3.084, 198.7, 61.07]),
            (a["target"].reshape(-1, 1), [1.064]), (a["extra"]["latents"], [
                0.06082, -0.008743, 0.4911, -0.03388, 0.02868, 0.4498, 1.374, 1.498])):
        np.testing.assert_allclose(np.nanmean(values, 0), means, rtol=2e-3)


def test_the_synthetic_world_is_plausible():
    s = data.load()
    rain, flow, wet = s.forcing[..., 0], s.target.mean(1), s.extra["soil_moisture"]
    assert s.forcing.shape == (700, 2192, 6) and (flow < rain.mean(1)).all()
    for low, values, high in (
            (1.5, rain.mean(), 4), (0.2, (rain > 0).mean(), 0.45), (2, s.forcing[..., 3].mean(), 4),
            (0.3, (flow / rain.mean(1)).mean(), 0.6), (0, s.target, np.inf), (0, wet, 0.5),
            (0.001, wet.std(1), 1), (0.25, np.isnan(s.static).mean(), 0.4),
            (-56, s.latlon[:, 0], 71)):
        assert low <= np.min(values) and np.max(values) <= high


def test_radiation_and_evaporation_equal_published_values():
    # FAO-56 example 8: 3 September at 20 S; the equator at an equinox has 37.7
    assert abs(data.extraterrestrial_radiation(-20.0, 246) - 32.2) < 0.1
    oudin, hargreaves = 25 / 100, 0.0023 * 37.8 * 12 ** 0.5
    assert abs(data.potential_evaporation(0.0, 80, 20.0) - 37.7 / 2.45 * oudin) < 0.1
    both = data.potential_evaporation(0.0, 80, 20.0, 26.0, 14.0)
    assert abs(both - 37.7 / 2.45 * hargreaves) < 0.1
    assert data.potential_evaporation(0.0, 80, -30.0) == 0
    assert data.potential_evaporation(0.0, 80, -30.0, -25.0, -35.0) == 0


FILES = {  # of a small archive of each kind, with | between the lines
    "attributes/us/attributes_other_us.csv": "gauge_id,name,gauge_lat,gauge_lon,area,p_mean|"
        'us_1,"A, at B",40.5,-75,100,3.5|us_2,C,41,285.5,200,|us_9,no series,42,-74,1,2',
    "attributes/us/attributes_hydroatlas_us.csv": "gauge_id,slp_dg_sav,cly_pc_sav|us_1,55,20",
    "timeseries/csv/us/us_1.csv": "date,streamflow,total_precipitation_sum,temperature_2m_mean,"
        "snow|2000-01-01,1.5,0,10,9|2000-01-03,,2,11,9|2000-01-04,0.5,4,,9",
    "timeseries/csv/us/us_2.csv": "date,temperature_2m_min,temperature_2m_max|2000-01-02,0,10",
    "basin_mean_forcing/01/01013500_lump_cida_forcing_leap.txt": "  47.24| 250.00|86400000|"
        "Year Mnth Day Hr\tdayl(s)\tprcp(mm/day)\tsrad(W/m2)\ttmax(C)\ttmin(C)\tvp(Pa)|"
        "1980 01 01 12\t43200\t3\t200\t10\t0\t610.8|1980 01 02 12\t43200\t0\t100\t8\t2\t500",
    "usgs_streamflow/01/01013500_streamflow_qc.txt":
        "01013500 1980 01 01   100.00 A|01013500 1980 01 02  -999.00 M",
    "camels_topo.txt": "gauge_id;gauge_lat;gauge_lon;elev_mean|01013500;47.2;-68.6;251",
    "camels_geol.txt": "gauge_id;carbonate_rocks_frac;geol_porostiy|01013500;0.25;NA",
    "camels_hydro.txt": "gauge_id;q_mean|01013500;1.7",
    "sites.csv": "id,lat,LON,clay,my_index|b1,50,8,20,1|b2,,,30,NA",
    "b1.csv": "date,Precipitation,tmax,tmin,streamflow|2000/01/01,1,8,2,0.5|2000/01/02,2,9,1,0.6"}


def archives(old="", new="", only=""):
    """A folder with FILES, the pattern `old` replaced in those whose name has `only`."""
    folder = Path(mkdtemp())
    for name, text in FILES.items():
        path, text = folder / name, text.replace("|", "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(old, new, text) if only in name else text, "utf-8", newline="")
    return folder


def test_caravan_and_camels_are_read_and_joined():
    folder = archives()
    s = data.load(f"caravan:{folder},camels:{folder}", cache=None)
    assert list(s.ids) == ["us_1", "us_2", "01013500"]
    assert np.array_equal(s.dates, np.arange("1980-01-01", "2000-01-05", dtype="M8[D]"))  # no gaps
    assert s.static_names == ("elevation", "slope", "clay", "carbonate", "rock_porosity", "p_mean",
                              "area")                       # not the flow's q_mean
    assert s.dynamic_names == ("precipitation", "temperature", "tmax", "tmin", "pet", "shortwave",
                               "humidity")
    pet = [data.potential_evaporation(*x, 5.0, 10.0, 0.0) for x in ((41, 2), (47.24, 1))]
    for got, expected in (
            (s.latlon, [[40.5, -75], [41, -74.5], [47.2, -68.6]]),              # 285.5 E is 74.5 W
            (s.static, [[nan, 5.5, 20, nan, nan, 3.5, 100], [*[nan] * 6, 200],
                        [251, nan, nan, 25, nan, nan, 86.4]]),
            (s.forcing[0, -4:, :3], [[0, 10, nan], [nan] * 3, [2, 11, nan], [4, nan, nan]]),
            (s.forcing[1, -3], [nan, 5, 10, 0, pet[0], nan, nan]),
            (s.forcing[2, 0], [3, 5, 10, 0, pet[1], 200 / 2, 100 / np.exp(17.27 * 5 / 242.3)]),
            (s.target[0, -4:], [1.5, nan, nan, 0.5]), (s.target[1], nan),
            (s.target[2, :2], [2.8316846592, nan])):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_camels_without_attribute_tables_knows_what_the_forcing_files_say():
    folder = archives()
    for path in folder.glob("camels_*"):
        path.unlink()
    s = data.load(f"camels:{folder}", cache=None)
    assert s.static_names == ("elevation", "area") and np.allclose(s.static, [[250, 86.4]])
    assert np.isnan(s.latlon).all()                         # a latitude alone is no place


def test_basins_of_your_own_are_read():
    s = data.load(f"csv:{archives()}", cache=None)
    assert s.ids.tolist() == ["b1", "b2"] and s.static_names == ("clay", "my_index")
    np.testing.assert_equal(s.latlon, [[50, 8], [nan, nan]])
    np.testing.assert_equal(s.static, [[20, 1], [30, nan]])
    assert s.dynamic_names == ("precipitation", "temperature", "tmax", "tmin", "pet")
    np.testing.assert_allclose(s.forcing[0, :, :4], [[1, 5, 8, 2], [2, 5, 9, 1]])
    assert np.isclose(s.forcing[0, 0, 4], data.potential_evaporation(50, 1, 5.0, 8.0, 2.0))
    np.testing.assert_allclose(s.target, [[0.5, 0.6], [nan, nan]])              # b2 has no file
    assert np.isnan(s.forcing[1]).all()
    s = data.load(f"csv:{archives('tmax,tmin', 'temperature,pet')}", cache=None)
    np.testing.assert_equal(s.forcing[0], [[1, 8, 2], [2, 9, 1]])               # one's own pet


NLDAS = ("Year Mnth Day Hr Dayl(s) PRCP(mm/day) SRAD(W/m2) SWE(mm) Tmax(C) Tmin(C) Vp(Pa)\n"
         "1980 01 01 12 43200 3 200 0 5 5 610.8\n1980 01 02 12 43200 0 100 0 4 4 500\n")


def test_the_forcings_of_camels_have_a_rule_and_equal_extremes_are_means():
    folder = archives()
    daymet, = folder.rglob("*_cida_*")
    other = folder / "basin_mean_forcing/nldas/01013500_lump_nldas_forcing_leap.txt"
    other.parent.mkdir()
    other.write_text("47.24\n250\n86400000\n" + NLDAS)
    s = data.load(f"camels:{folder}", cache=None)
    assert s.forcing[0, 0, s.dynamic_names.index("tmax")] == 10                 # of Daymet
    daymet.unlink()
    s = data.load(f"camels:{folder}", cache=None)
    assert s.dynamic_names == ("precipitation", "temperature", "pet", "shortwave", "humidity")
    pet = data.potential_evaporation(47.24, 1, 5.0)
    np.testing.assert_allclose(s.forcing[0, 0, :4], [3, 5, pet, 100], rtol=1e-5)
    assert pet > 0


def test_a_table_without_weather_is_refused_and_a_site_may_have_none():
    assert "us_2.csv: no weather among its columns date, a, b" in complaints(
        "temperature_2m_min,temperature_2m_max", "a,b")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"csv:{archives('1,8,2,|2,9,1,', ',,,')}", cache=None)
    assert "2 of 2 sites have no weather" in said.getvalue() and "; no weather;" in said.getvalue()
    np.testing.assert_allclose(s.target, [[0.5, 0.6], [nan, nan]])


def test_what_else_lies_in_a_caravan_folder_is_told_and_own_attributes_are_read():
    folder = archives()
    add = {"timeseries/csv/us/evap_us.csv": "date,evaporation\n2000-01-01,3",
           "timeseries/csv/mine/a.csv": "date,total_precipitation_sum,temperature_2m_mean,"
           "dewpoint_temperature_2m_mean,surface_net_solar_radiation_mean\n2000-01-01,1,20,10,99",
           "timeseries/csv/mine/notes.csv": "who,what\nme,this",
           "attributes/us/national_station_ids.csv": "a;b",
           "attributes/us/attributes_mine_us.csv": "gauge_id,Fens,rock,run_mm_syr,ele_mt_sav\n"
           "us_1,7,marl,400,251"}
    for name, text in add.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        s = data.load(f"caravan:{folder}", cache=None)
    assert s.ids.tolist() == ["a", "us_1", "us_2"] and "fens" in s.static_names
    assert "no gauges, passed over: notes.csv, evap_us.csv" in said.getvalue()
    assert "its own attributes ['fens'], text that is not read ['rock']" in said.getvalue()
    assert not {"run_mm_syr", "rock"} & {*s.static_names}   # run-off would give the flow away
    assert s.static[1, s.static_names.index("elevation")] == 251
    first = dict(zip(s.dynamic_names, s.forcing[0, 0]))
    assert first["net_shortwave"] == 99 and abs(first["humidity"] - 52.5) < 0.1


def test_classes_of_one_prefix_are_one_group():
    names = ("clay", "rock_marl", "cover", "rock_granite", "p_mean", "p_max")
    assert data.groups(names) == ("soil", "rock", "cover", "rock", "climate", "p_max")


def test_archives_are_parsed_once_until_a_file_changes():
    folder, cache = archives(), mkdtemp()
    spec = f"caravan:{folder},camels:{folder}"
    s = data.load(spec, cache=cache)
    with mock.patch.object(data, "assemble", None):         # not parsed again
        again = data.load(spec, cache=cache)
    np.testing.assert_equal(vars(again), vars(s))
    np.testing.assert_equal(vars(data.load(spec, cache=None)), vars(s))
    assert isinstance(again.forcing, np.memmap)             # stays on disk
    path = folder / "timeseries/csv/us/us_1.csv"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert np.nanmax(data.load(spec, cache=cache).target[0]) == 2.5
    assert len(list(Path(cache).iterdir())) == 2            # nothing half-written is left
    code = Path(cache, "own_reader.py")                     # nor if a reader has changed
    for value in (1.0, 2.0):
        text = f"def read(folder):\n yield Record('x', folder, None, {{'a': {value}}}, {{}})"
        code.write_text(text)
        exec(compile(text, code, "exec"), own := {"Record": data.Record})
        with mock.patch.dict(data.READERS, own=own["read"]):
            assert data.load(f"own:{folder}", cache=cache).static == value
    exec(compile(text, "<stdin>", "exec"), own := {"Record": data.Record})      # of a notebook
    with mock.patch.dict(data.READERS, own=own["read"]):
        assert data.load(f"own:{folder}", cache=cache).static == 2
    for file in Path(cache).rglob("forcing.npy"):
        file.write_bytes(b"")
    raises(ValueError, "is damaged, delete it", data.load, spec, cache=cache)


def test_line_ends_blanks_quotes_and_byte_order_marks_change_nothing():
    folder = archives()
    spec = "caravan:{0},camels:{0},csv:{0}"
    whole = vars(data.load(spec.format(folder), cache=None))
    for old, new in ((r"\A", "\ufeff"), (r"\n", "\r\n"), (r"\Z", "\n\n"), (",", ", "),
                     ("(2000-01-..)", r'"\1"')):
        changed = vars(data.load(spec.format(archives(old, new)), cache=None))
        np.testing.assert_equal(changed, whole)


def complaints(old, new):
    """What is said of archives with one file changed at a time; those that load are finite."""
    said = []
    for name in FILES:
        folder = archives(old, new, name)
        try:
            s = data.load("caravan:{0},camels:{0},csv:{0}".format(folder), cache=None)
            assert not np.isinf(s.forcing).any() and not np.isinf(s.static).any()
        except (ValueError, FileNotFoundError) as error:
            assert folder.name in str(error), error         # it names the file
            said.append(str(error))
    return "\n".join(said)


def test_a_damaged_table_is_refused_with_file_and_line():
    for old, new, complaint in (
            (r"(?s).{9}\Z", "", "us_1.csv, line 4: 1 fields, expected"), (r"(?s).+", "", "no rows"),
            (r"(?s)\n.*", "", "no rows"), (r"(?s)(.+)", r"\1\n\1", "us_1.csv, line 5: "),
            ("[,;\t]", "|", "no column"), (",", ',"', "line 1: |fields|no column"),
            (r"\n", "\n1,", "line 2: 6 fields"), ("snow", "date", "a column twice"),
            ("us_2,C", "us_1,C", "_other_us.csv: site us_1 twice"),
            ("dayl", "day", r"no column dayl\(s\)"), ("86400000", "0", "to 3: .*basin area"),
            ("47.24", "97.24", "lines 1 to 3: latitude"),
            ("b1,50,8", "b1,50,", "b1 has the longitude nan")):
        assert re.search(complaint, complaints(old, new)), (old, new, complaints(old, new))


def test_a_bad_value_is_refused_with_file_and_line():
    for old, new, complaint in (
            ("41,285", "95,0", "us_2 has the latitude 95"), (",-75,", ",-775,", "longitude -775"),
            ("2000-01-03", "2000-01-01", "us_1 has the same date twice"),
            ("2000-01-03", "today", "us_1.csv, line 3: date is 'today'"),
            ("-01-", "-31-", "'2000-31-01'"), ("1980 01 02", "1980 02 30", "line 6: date is"),
            (r"\d+\.\d+", "1e39", "'1e39'"), (r"\d+\.\d+", "-inf", "'-inf'"),
            (r"\d+\.\d+", "a'b", "us_1.csv, line 2: streamflow is 'a'b'"),
            ("01,1,8", "01,-1,8", r"b1.csv: site b1: precipitation is \[-1.\] mm/d, it cannot be"),
            ("01,1,8", "01,1,288", r"b1: temperature is \[145.\] degC, it cannot be outside -90"),
            ("8,20,1", "8,120,1", r"b1: clay is \[120.\] %, it cannot be outside 0 to 100"),
            (",0.5", ",500", "b1: a mean streamflow of 250.3 mm/d")):
        assert re.search(complaint, complaints(old, new)), (old, new, complaints(old, new))


def test_unknown_or_empty_sources_and_one_given_twice_are_refused():
    raises(FileNotFoundError, "nowhere", data.load, "caravan:/nowhere")
    raises(ValueError, "pigeon.*caravan", data.load, "pigeon:/")
    raises(ValueError, "no site found", data.load, f"caravan:{mkdtemp()}", cache=None)
    twice = "caravan:{0},caravan:{0}".format(archives())
    raises(ValueError, "the site us_1 is there twice", data.load, twice, cache=None)


@needs_real_data
def test_real_archives_agree_on_their_common_gauges():
    folder, camels = Path(mkdtemp()), REAL / "camels_us"    # Caravan, but of those gauges alone
    (folder / "timeseries/csv/camels").mkdir(parents=True)
    (folder / "attributes").symlink_to(REAL / "caravan/attributes")
    for path in camels.rglob("*_forcing_leap.txt"):
        name = f"timeseries/csv/camels/camels_{path.name[:8]}.csv"
        if (REAL / "caravan" / name).is_file():
            (folder / name).symlink_to(REAL / "caravan" / name)
    s = data.load(f"caravan:{folder},camels:{camels}", cache=None)
    mean = dict(zip(s.dynamic_names, np.nanmean(s.forcing, (0, 1), float)))
    assert len(s.ids) > 77 + 50 and 2.5 < mean["precipitation"] < 4 and 1.5 < mean["pet"] < 3.5
    i, j = np.nonzero(s.ids[:, None] == np.char.add("camels_", s.ids))
    seen, fold = ~np.isnan(s.target[i] + s.target[j]), data.folds(s, "pub", 5)
    flow, other = s.target[i].mean(1, where=seen), s.target[j].mean(1, where=seen)
    # in mm/d, and from ft3/s and area
    assert len(i) > 50 and abs(np.median(flow / other) - 1) < 0.02 and (fold[i] == fold[j]).all()


def test_pub_folds_are_of_a_site_whatever_other_sites_there_are():
    s = data.synthetic_world(0, 300, 1)
    pub = data.folds(s, "pub", 5)
    assert set(pub) == set(range(5)) and np.bincount(pub).min() > 35
    assert not np.array_equal(data.folds(s, "pub", 5, seed=1), pub)
    s.ids = s.ids[::3]
    assert np.array_equal(data.folds(s, "pub", 5), pub[::3])


def test_pur_folds_are_contiguous_regions_of_similar_size():
    s = data.synthetic_world(0, 300, 1)
    pub, pur, xyz = data.folds(s, "pub", 5), data.folds(s, "pur", 5), data.on_sphere(s.latlon)
    assert set(pur) == set(range(5)) and 20 < np.bincount(pur).min() <= np.bincount(pur).max() < 100
    near = np.argsort(-(xyz @ xyz.T), 1)[:, 1:4]
    assert (pur[near] == pur[:, None]).mean() > 0.9 and (pub[near] == pub[:, None]).mean() < 0.4
    raises(ValueError, "pub, pur or none", data.folds, s, "puf", 5)
    s.latlon[3] = nan
    raises(ValueError, "no coordinates.*synthetic_0003", data.folds, s, "pur", 5)


def test_a_gauge_under_two_names_is_in_one_fold():
    s = data.synthetic_world(0, 60, 1)
    twice = data.replace(s, ids=np.concatenate([np.char.add("hysets_", s.ids), s.ids]),
                         latlon=np.concatenate([s.latlon + 0.01, s.latlon]))
    for kind in ("pub", "pur"):
        fold = data.folds(twice, kind, 5)
        assert np.array_equal(fold[:60], fold[60:]) and len(set(fold)) == 5


def test_an_output_is_written_whole_or_not_at_all():
    path = Path(mkdtemp(), "sub", "x.bin")
    data.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("no space left")
    raises(OSError, "cannot write .*what was there is kept: no", data.write_atomically, path, fail)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


# train.py

def run(options, out, launcher="", stop=None, code=0):
    """What train.py prints, and its checkpoint; SIGTERM once it has printed `stop`."""
    command = [sys.executable, *launcher.split(), train.__file__, *options.split(), "--out", out,
               "--device", "cpu"]                           # bit for bit, and two without two GPUs
    text, env = "", os.environ | {"OMP_NUM_THREADS": "1"}   # threads crawl on a busy machine
    with Popen(command, text=True, stdout=PIPE, stderr=STDOUT, env=env) as process:
        for line in process.stdout:
            text += line
            if stop and stop in line:
                process.terminate()
    assert process.returncode == code, text
    return text, torch.load(Path(out, "pretrained.pt"), weights_only=True)


def test_two_processes_have_the_gradients_of_one():
    options, gradients = "--quick --steps 1 --config dropout=0 --dtype float32", []
    for launcher in ("", "-m torch.distributed.run --nproc_per_node=2"):
        text, saved = run(options, mkdtemp(), launcher)
        gradients.append([10 * state["exp_avg"] for state in saved["optimizer"]["state"].values()])
    assert "2 process(es)" in text and len(gradients[0]) > 20
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() < 1e-5 + 1e-4 * one.abs().max()


QUICK = "--quick --steps 8 --holdout pub --folds 3 --fold 1 --dtype float32"


def test_the_first_losses_of_default_training_are_known():
    losses, loss_of = [], train.masked_loss

    def note(errors, counts):
        losses.append(loss_of(errors, counts).item())
        assert len(losses) < 6, "that is enough"
        return loss_of(errors, counts)
    before = signal.getsignal(signal.SIGINT)
    with mock.patch.object(train, "masked_loss", note):
        raises(AssertionError, "enough", train.main,
               ["--out", mkdtemp(), "--dtype", "float32", "--device", "cpu"])
    assert signal.getsignal(signal.SIGINT) == before        # Ctrl-C is the caller's again
    close(losses, [1.310926, 1.472093, 1.682551, 1.604199, 1.465066, 1.381019], atol=1e-3)


def test_a_stopped_run_resumes_bit_for_bit():
    out = mkdtemp()
    text, whole = run(QUICK, mkdtemp())
    stopped, part = run(QUICK + " --save-every 3", out, stop="step 1/")
    resumed, same = run("--resume", out)
    assert "continue with --resume" in stopped and part["step"] < 8 == same["step"]
    assert f"from step {part['step']}" in resumed and "R2 of hidden weather" in text
    close(same["model"], whole["model"], atol=0)
    raises(AssertionError, "\nerror: --resume: .*other training", run, "--resume --fold 2", out)


def checkpoint():
    """The path of a checkpoint after few steps, made once, and what it holds."""
    if not hasattr(checkpoint, "path"):
        out = mkdtemp()
        _, checkpoint.saved = run(QUICK.replace("pub --folds 3 --fold 1", "pub"), out)
        checkpoint.path = Path(out, "pretrained.pt")
    return checkpoint.path, checkpoint.saved


def test_a_checkpoint_knows_its_training_sites_and_is_scaled_by_them_alone():
    _, saved = checkpoint()
    sites = data.load(quick=True)
    held, validation = data.folds(sites, "pub", 5) == 0, data.folds(sites, "pub", 10, seed=1) == 0
    seen = np.isin(sites.ids, saved["ids"])
    assert np.array_equal(seen, ~held & ~validation) and saved["step"] == 8
    close(saved["latlon"], torch.tensor(sites.latlon[seen]))
    close(saved["scaling"]["static"], train.fit_standardisation(sites.static[seen]))
    close(saved["scaling"]["forcing"], train.fit_standardisation(sites.forcing[seen]))


def test_a_diverging_run_keeps_the_last_good_checkpoint():
    out = mkdtemp()
    run(QUICK, out)
    whole = Path(out, "pretrained.pt").read_bytes()
    text, _ = run("--resume --steps 15 --save-every 99 --lr 1e30", out, code=2)
    assert "\nerror: loss nan" in text and Path(out, "pretrained.pt").read_bytes() == whole
    _, saved = run(QUICK + " --save-every 99 --lr 1e30", mkdtemp(), code=2)
    assert saved["step"] == 0                               # kept before the first step


def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason():
    path, saved = checkpoint()
    whole, other = path.read_bytes(), Path(mkdtemp(), "other.pt")
    at = whole.index(saved["model"]["position"].numpy().tobytes())
    for content, reason in (
            (whole[:len(whole) // 2], "not a zip"), (b"text", "not a zip"), (b"", "not a zip"),
            (whole[:at] + b"1234" + whole[at + 4:], "damaged")):                # one weight changed
        other.write_bytes(content)
        raises(ValueError, "other.pt cannot be read: .*" + reason, train.load_checkpoint, other)
    for content, reason in (
            ({"a": 1}, "KeyError.*version"), (saved | {"version": train.VERSION + 1}, "version 3"),
            ({key: x for key, x in saved.items() if key != "ids"}, "it lacks ids"),
            (saved | {"x": os.system}, "could be code"), (saved | {"config": {}}, "RuntimeError")):
        torch.save(content, other)
        raises(ValueError, "other.pt cannot be read: .*" + reason, train.load_checkpoint, other)
    raises(FileNotFoundError, "run python train.py", train.load_checkpoint, "nowhere.pt")


def test_standardisation():
    rng = np.random.default_rng(0)
    x = np.full((5000, 4), nan)
    x[:, 0], x[:, 1], x[:, 3] = rng.gamma(0.3, 5, 5000), rng.normal(3, 2, 5000), 7
    scaling = train.fit_standardisation(x)
    y = train.apply_standardisation(x, scaling)
    assert scaling[0].tolist() == [1, 0, 0, 0]              # only the first is skewed
    assert np.allclose(y.mean(0), [0, 0, nan, 0], atol=1e-5, equal_nan=True)
    assert np.allclose(y.std(0), [1, 1, nan, 0], atol=1e-4, equal_nan=True)
    x[:, 0] -= 1                                            # now it has negative values
    assert train.fit_standardisation(x)[0].tolist() == [0, 0, 0, 0]


def test_learning_rate_warms_up_and_falls():
    rates = [train.learning_rate(step / 1000) for step in range(1000)]
    assert rates[0] < 0.01 and np.isclose(rates[25], 0.5, atol=0.01)
    assert max(rates) == rates[50] == 1 and np.isclose(rates[-1], 0.02, atol=1e-3)
    assert np.isclose(rates[525], 0.51, atol=0.01) and np.all(np.diff(rates[50:]) < 0)


def test_windows_serve_the_days_of_their_sites():
    s = data.synthetic_world(0, 8, 3)
    s.forcing[2, :300] = nan
    s.forcing[2, 900:] = nan
    s.forcing[3] = nan
    identity = {"forcing": torch.tensor([[0.0] * 6, [0.0] * 6, [1.0] * 6]).double(),
                "static": torch.tensor([[0.0] * 19, [0.0] * 19, [1.0] * 19]).double()}
    w = train.Windows(s, identity, 365, s.dynamic_names, s.static_names)
    site, rng = np.repeat([2, 3, 4], 300), np.random.default_rng(0)
    starts = w.starts(site, rng).reshape(3, 300)
    assert starts[0].min() == 300 and starts[0].max() == 900 - 365              # within the record
    assert not starts[1].any() and starts[2].min() < 20 and starts[2].max() > 1096 - 365 - 20
    forcing, static, latlon, day = w.get(np.array([4, 0]), np.array([100, 731]))
    np.testing.assert_allclose(forcing[1], s.forcing[0, 731:1096], rtol=1e-6)
    np.testing.assert_allclose(static, s.static[[4, 0]], rtol=1e-6)
    assert np.array_equal(latlon, s.latlon[[4, 0]])
    assert day[0, 0] == 101 and day[1, 0] == 1 and day[0, 265] == 1
    raises(ValueError, "1096 days of data, windows of 2000", train.Windows, s, identity, 2000,
           s.dynamic_names, s.static_names)


def test_variables_are_arranged_by_name_and_lacking_ones_missing():
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_equal(train.arrange(x, ("a", "b", "c"), ("c", "z", "a")),
                            [[2, nan, 0], [5, nan, 3]])
    assert train.arrange(x, ("a", "b", "c"), ("a", "b", "c")) is x
    assert train.arrange(np.zeros((4, 5, 1)), ("a",), ("a", "b")).shape == (4, 5, 2)


def test_windows_cover_the_days_asked_for_and_periods_name_them():
    dates = np.arange("1995-01-01", "1998-01-01", dtype="M8[D]")
    named = train.day_slice("1995-12-31/1997-12-30", dates, None)
    assert dates[named][0] == np.datetime64("1995-12-31") and named.stop == len(dates) - 1
    assert train.day_slice("", dates, slice(548, 1096)) == slice(548, 1096)
    raises(ValueError, "period '1996': expected FROM/TO", train.day_slice, "1996", dates, None)
    raises(ValueError, "not within", train.day_slice, "1994-01-01/1996-01-01", dates, None)
    for days in (slice(0, 700), slice(400, 1096), named):
        covered = np.zeros(len(dates), bool)
        for start in train.cover_with_windows(days, 365, 120):
            assert 0 <= start <= len(dates) - 365
            covered[start + (120 if start else 0):start + 365] = True
        assert covered[days].all()


def test_a_group_left_out_is_unknown_to_the_network():
    sites = data.load(quick=True)
    c = train.configure(train.Options(without="soil,radiation"), sites)
    assert not {"clay", "silt", "sand", "organic_carbon"} & {*c.static_names}
    assert "shortwave" not in c.dynamic_names and len(c.static_groups) == len(c.static_names) == 15
    train.main(["--quick", "--steps", "1", "--without", "soil", "--out", out := mkdtemp()])
    network, saved = train.load_checkpoint(Path(out, "pretrained.pt"))
    assert "clay" not in network.config.static_names and saved["scaling"]["static"].shape == (3, 15)
    raises(ValueError, "--without climate.*leaves none of", train.configure, train.Options(
        without="climate"), data.replace(sites, static_names=("p_mean",)))


def test_config_takes_any_field():
    o = train.Options(config="window_days=(20,40),dropout=0")
    c = train.configure(o, data.load(quick=True))
    assert c.window_days == (20, 40) and c.dropout == 0


SCRIPTS = {"train": train, "finetune": finetune, "eval": evaluate}


def test_every_script_explains_its_options():
    for name, script in SCRIPTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            raises(SystemExit, "0", script.main, ["--help"])
        assert "--out" in said.getvalue() and script.__doc__[:40] in said.getvalue(), name


def test_a_bad_option_is_refused_in_one_line():
    for main, options, complaint in (
            (train.main, "--stpes 5", "unrecognized arguments: --stpes"),
            (train.main, "--steps many", "--steps: invalid int value: 'many'"),
            (train.main, "--steps -5", "--steps -5: expected 0 or more"),
            (train.main, "--config dmodel=3", "--config dmodel: expected one of .*d_model"),
            (train.main, "--config d_model=wide", "'wide' is no number"),
            (train.main, "--preset huge", "--preset huge: expected one of small, paper"),
            (train.main, "--dtype float8", "--dtype float8: expected one of auto"),
            (train.main, "--holdout pup", "hold-out 'pup': expected pub"),
            (train.main, "--fold 5", "--fold 5: with --folds 5, 0 to 4"),
            (train.main, "--device gpu", "--device gpu: "),
            (finetune.main, "--steps 0", "--steps 0: expected 1 or more"),
            (finetune.main, "--fold 7", "--fold 7: expected all, or some of 0 to 4"),
            (finetune.main, "--fold one", "--fold one: expected all"),
            (finetune.main, "--labelled 99 --model lstm", "--labelled 99: only 42 sites outside"),
            (finetune.main, "--train-period 1996 --model lstm", "period '1996': expected FROM/TO"),
            (finetune.main, "--basins nowhere.txt --model lstm", "nowhere.txt")):
        raises((ValueError, OSError), complaint, main,
               ["--quick", "--out", mkdtemp(), *options.split()])
    if not torch.cuda.is_available():
        raises(ValueError, "--device cuda: ", train.main, ["--quick", "--device", "cuda"])
    for script, options in ((train, "--data x:y"), (finetune, "--data x:y"), (evaluate, "")):
        command = [sys.executable, script.__file__, "--out", mkdtemp(), *options.split()]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done
        assert done.stderr.startswith("error: "), done
    debug = [sys.executable, train.__file__, "--data", "x:y", "--debug"]
    assert "Traceback" in subprocess.run(debug, text=True, capture_output=True).stderr


# finetune.py

def tune(options, out):
    """Run finetune.py; its files and when they were written."""
    finetune.main(f"--quick --out {out} {options}".split())
    return {path: path.stat().st_mtime_ns for path in Path(out, "runs").iterdir()}


def out_with_encoder():
    out = mkdtemp()
    Path(out, "pretrained.pt").write_bytes(checkpoint()[0].read_bytes())
    return out


def quick_run(variant, change=lambda sites: sites, fold=0, **options):
    """What the file of one short run holds; the data are changed before."""
    sites = change(data.load(quick=True))
    o = finetune.Options(**dict(out=str(checkpoint()[0].parent), steps=4, batch_size=8,
                                device="cpu") | options)
    return finetune.run(o, variant, sites, data.folds(sites, "pub", 5), fold, 0)[1]


def test_every_variant_predicts_flow_at_the_held_out_sites():
    out, sites = out_with_encoder(), data.load(quick=True)
    tune("--model resconn,lstm,noresconn,linear,scratch,direct", out)
    (setting, models), = evaluate.load_runs(out).items()
    assert setting == "streamflow synthetic pub5" and len(models) == 6
    test = data.folds(sites, "pub", 5) == 0
    for name, (result,) in models.items():
        assert np.array_equal(result["ids"], sites.ids[test]) and result["overlap"] == 0, name
        assert np.array_equal(result["obs"], sites.target[test, -len(result["dates"]):]), name
        assert np.isfinite(result["sim"]).all() and (result["sim"] >= 0).all(), name


def test_a_run_with_the_same_settings_is_not_repeated():
    out = mkdtemp()
    written = tune("--model lstm", out)
    assert tune("--model lstm", out) == written != tune("--model lstm --steps 9", out)


def test_runs_of_other_settings_or_checkpoints_never_meet():
    def found(options, out):
        tune("--model resconn,lstm --allow-overlap " + options, out)
        return {(setting.removeprefix("streamflow synthetic pub5"), name): len(of_model)
                for setting, models in evaluate.load_runs(out).items()
                for name, of_model in models.items()}
    out, (path, saved) = out_with_encoder(), checkpoint()
    path = Path(out, "pretrained.pt")
    assert found("", out) == {("", "resconn"): 1, ("", "lstm"): 1}
    expected = {(", steps 10", "resconn"): 1, (", steps 10", "lstm"): 1,
                (", steps 9", "resconn"): 2, (", steps 9", "lstm"): 2}
    assert found("--fold 0,1 --steps 9", out) == expected
    # a checkpoint trained anew with the same options: its run is repeated, and replaces the old one
    before = {p: p.stat().st_mtime_ns for p in Path(out, "runs").glob("*.npz")}
    torch.save(saved | {"ids": saved["ids"][1:]}, path)
    assert found("--fold 0,1 --steps 9", out) == expected
    changed = [p.name for p, time in before.items() if p.stat().st_mtime_ns != time]
    assert len(changed) == 2 and all("resconn" in name for name in changed)
    # with other options: it stands beside the old one, and the baseline is shared
    torch.save(saved | {"options": saved["options"] | {"seed": 5}}, path)
    assert found("", out) == {(", steps 10", "resconn, seed 0"): 1, (", steps 10", "lstm"): 1,
                              (", steps 10", "resconn, seed 5"): 1, (", steps 9", "lstm"): 2,
                              (", steps 9", "resconn"): 2}


def test_default_periods_are_of_the_days_with_observations():
    def early(sites):                                       # flow of the first two years alone
        target = sites.target.copy()
        target[:, 731:] = nan
        return data.replace(sites, target=target)
    dates = quick_run("lstm", early)["dates"]
    assert dates[0] == np.datetime64("1996-03-14") and dates[-1] == np.datetime64("1996-12-31")


def test_a_validation_score_that_is_missing_is_no_best():
    scores = iter([nan, 0.5, 0.1, nan, 0])                  # the last one is of the test sites
    with mock.patch.dict(evaluate.SCORINGS, series=lambda obs, sim: {"x": next(scores)}):
        assert quick_run("lstm")["validation"] == 0.5


def test_a_saved_model_predicts_what_its_run_predicted():
    out, sites = out_with_encoder(), data.load(quick=True)
    for variant in ("resconn", "lstm"):
        tune("--device cpu --model " + variant, out)
        path, = Path(out, "runs").glob(f"streamflow synthetic pub5, {variant}, fold 0, seed 0*.npz")
        test, predictor = data.folds(sites, "pub", 5) == 0, finetune.load(path.with_suffix(".pt"))
        days = slice(int(0.6 * len(sites.dates)), len(sites.dates))
        again = finetune.Samples(predictor, sites, np.flatnonzero(test), days).predict()
        assert np.array_equal(again, np.load(path)["sim"])
        assert np.isfinite(predictor.predict(sites)).all()  # every day of every site
        path.with_suffix(".pt").write_bytes(path.with_suffix(".pt").read_bytes()[:999])
        raises(ValueError, "cannot be read", finetune.load, path.with_suffix(".pt"))


def test_attributes_of_a_test_site_reach_a_model_and_observations_do_not():
    def forge(sites):
        test = data.folds(sites, "pub", 5) == 0
        return data.replace(sites, target=np.where(test[:, None], 7 * sites.target, sites.target))
    for variant in ("resconn", "lstm"):
        assert np.array_equal(quick_run(variant)["sim"], quick_run(variant, forge)["sim"])
    assert not np.array_equal(quick_run("lstm")["sim"], quick_run("lstm", missing=1.0)["sim"])


def test_a_checkpoint_that_has_seen_test_sites_is_refused():
    def rename(sites):                                      # the same gauges in another archive
        return data.replace(sites, ids=np.char.add("camels_", sites.ids))
    raises(ValueError, "has seen .* of the .* test sites; pretrain with --holdout pub",
           quick_run, "resconn", rename, 1)
    assert quick_run("resconn", rename, 1, allow_overlap=True)["overlap"] > 0


def test_unknown_names_are_refused():
    raises(ValueError, "'elastic': expected one of resconn", tune, "--model elastic", mkdtemp())
    raises(ValueError, "'tea': expected one of streamflow", tune, "--task tea", mkdtemp())
    raises(ValueError, "windows of 365 days, of which --warmup 400", quick_run, "lstm", warmup=400)


def test_sites_are_chosen_by_fold_label_and_basin_list():
    sites = data.load(quick=True)
    fold_of, rng = data.folds(sites, "pub", 5), np.random.default_rng
    everyone = finetune.choose_sites(finetune.Options(), sites, fold_of, 1, rng(0))
    training, validation, test = everyone
    assert np.array_equal(np.sort(np.concatenate(everyone)), np.arange(60))
    assert (fold_of[test] == 1).all() and len(validation) == (60 - len(test)) // 7
    some = finetune.choose_sites(finetune.Options(labelled=14), sites, fold_of, 1, rng(0))
    assert [len(part) for part in some] == [12, 2, len(test)]
    path = Path(mkdtemp(), "list.txt")
    path.write_text("\n".join(sites.ids[::2]))
    half = finetune.choose_sites(finetune.Options(basins=str(path)), sites, fold_of, 1, rng(0))
    assert np.array_equal(np.sort(np.concatenate(half)), np.arange(0, 60, 2))
    sites.target[test] = nan
    raises(ValueError, "fold 1: 0 test", finetune.choose_sites, finetune.Options(), sites, fold_of,
           1, rng(0))


def test_the_first_predictions_are_known():
    for variant, mean in (("resconn", 0.63573), ("lstm", 0.62690), ("noresconn", 0.68630)):
        assert abs(quick_run(variant)["sim"].mean() - mean) < 2e-4, variant


def test_bfloat16_changes_predictions_little_and_is_the_default_where_it_is_fast():
    for variant in ("resconn", "lstm"):
        whole, half = (quick_run(variant, steps=10, dtype=dtype)["sim"]
                       for dtype in ("float32", "bfloat16"))
        assert 0 < abs(whole - half).max() < 0.03 and abs(whole - half).mean() < 0.005
        assert len(np.unique(half)) > 0.9 * len(np.unique(whole))       # no steps of three digits
    assert train.fastest_dtype(torch.device("cuda")) == "bfloat16"
    with mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=False, create=True):
        assert train.fastest_dtype(torch.device("cpu")) == "float32"


def test_a_frozen_encoder_stays_and_a_tuned_one_changes():
    (path, saved), sites = checkpoint(), data.load(quick=True)
    o = finetune.Options(out=str(path.parent), steps=2, batch_size=8, device="cpu")
    for variant in ("resconn", "direct"):
        trained, _ = finetune.run(o, variant, sites, data.folds(sites, "pub", 5), 0, 0)
        weights = trained.encoder.state_dict()
        same = all(torch.equal(weights[name], saved["model"][name]) for name in weights)
        assert same == (variant == "resconn")


def test_what_is_learned_can_be_undone():
    task, y = finetune.TASKS["streamflow"], np.array([[0, 0.3, 9]])
    close(task.inverse(task.transform(y, None), None), y)
    assert task.inverse(np.array([-3.0]), None) == 0        # no negative flow


def samples(length=365, warmup=300, first=0):
    """Windows of two sites, with an encoder of random weights; their weather begins with a day."""
    sites = data.synthetic_world(0, 20, 3)
    sites.forcing[:, :first] = nan
    torch.manual_seed(0)
    config = model.Config(sites.dynamic_names, sites.static_names, d_model=16)
    scaling = {key: train.fit_standardisation(getattr(sites, key)) for key in ("forcing", "static")}
    predictor = finetune.Predictor(dict(
        task="streamflow", variant="resconn", width=16, dropout=0.0, length=length, warmup=warmup,
        dtype="float32", bound=np.inf,
        config=vars(config), encoder_scaling=scaling, scaling=scaling, shapes={}, centre=1.0,
        spread=2.0, forcing_names=sites.dynamic_names, static_names=sites.static_names))
    days = slice(0, 1096 if length > 1 else 1)
    return finetune.Samples(predictor, sites, np.array([3, 7]), days)


def test_a_value_per_site_sees_the_first_year_of_the_sites_record():
    assert samples(1, 0, first=500).encoder_start.tolist() == [500, 500]
    assert samples(1, 0, first=1000).encoder_start.tolist() == [1096 - 365] * 2     # a short one


def test_cached_embeddings_equal_the_encoders():
    s = samples()
    windows = s.encoder_windows.get(s.site[7:8], s.start[7:8])
    before, after = s.encoded[7].float().chunk(2, -1)
    close(before, s.model.encoder.embed(*windows)[0], atol=1e-2)
    close(after, s.model.encoder.encode(*windows)[0], atol=1e-2)
    assert s.encoded.shape == (len(s.site), 366, 32)


def test_predictions_are_put_together_from_windows_after_their_warm_up():
    s = samples()
    result, spread = s.predict(), s.model.settings["spread"]
    for k in (0, 1, 4):                                     # windows of the first site
        days = slice(s.start[k] + (300 if k else 0), s.start[k] + 365)
        with torch.no_grad():
            out = s.outputs([k])[0].numpy()[days.start - s.start[k]:] * spread + 1.0
        close(result[0, days], np.maximum(out, 0) ** 2)
    assert result.shape == (2, 1096) and np.isfinite(result).all()


@unittest.skipUnless(torch.cuda.is_available(), "no GPU")
def test_a_gpu_computes_what_the_cpu_computes():
    m, *batch = small()
    hidden = m.draw_masks(5, 60)
    on_cpu, on_gpu = m(*batch, hidden), copy.deepcopy(m).cuda()(
        *[x.cuda() for x in batch], model.Masks(*[x.cuda() for x in hidden]))
    close(on_gpu[0].cpu(), on_cpu[0], rtol=1e-3)
    assert torch.equal(on_gpu[1].cpu(), on_cpu[1])
    for dtype, tolerance in (("float32", 0.01), ("bfloat16", 0.1)):
        cpu, gpu = (quick_run("resconn", device=device, dtype=dtype, dropout=0.0)["sim"]
                    for device in ("cpu", "cuda"))
        assert 0 < abs(gpu - cpu).max() < tolerance


# eval.py

def test_metrics_equal_their_formulas():
    rng = np.random.default_rng(0)
    o, s = rng.gamma(1, 2, 1000), rng.gamma(1, 2, 1000)
    error, r = s - o, np.corrcoef(o, s)[0, 1]
    kge = 1 - np.sqrt((r - 1) ** 2 + (s.std() / o.std() - 1) ** 2 + (s.mean() / o.mean() - 1) ** 2)
    high_o, high_s = (np.sort(x)[-20:].sum() for x in (o, s))
    low_o, low_s = (np.log(np.sort(x)[:301] / x.min()).sum() for x in (o, s))
    curve_o, curve_s = (np.quantile(x, np.linspace(0, 1, 100)) for x in (o, s))
    close(evaluate.site_metrics(np.append(o, [nan, 3]), np.append(s, [1, nan])), dict(
        rmse=np.sqrt((error ** 2).mean()), ubrmse=error.std(), corr=r, kge=kge,
        nse=1 - (error ** 2).mean() / o.var(), mae=abs(error).mean(), flv=100 * (1 - low_s / low_o),
        pbias=100 * error.sum() / o.sum(), fhv=100 * (high_s / high_o - 1),
        fdc_rmse=np.sqrt(((curve_s - curve_o) ** 2).mean())))


def test_undefined_metrics_are_missing():
    constant = evaluate.site_metrics(np.full(9, 2.0), np.arange(9.0))
    assert np.isnan(constant["nse"]) and np.isnan(constant["corr"]) and constant["rmse"] > 0
    assert all(np.isnan(v) for v in evaluate.site_metrics([nan, 1], [1, nan]).values())
    assert np.isnan(evaluate.class_metrics([1, 1], [0.2, 0.9])["auc"])


def test_class_metrics_equal_their_definitions():
    rng = np.random.default_rng(0)
    label, score = rng.random(200) < 0.4, rng.integers(0, 5, 200) / 4
    guess, pairs = score >= 0.5, score[label][:, None] - score[~label]
    precision, recall = label[guess].mean(), guess[label].mean()
    close(evaluate.class_metrics(label, score), dict(
        accuracy=(label == guess).mean(), precision=precision, recall=recall,
        f1=2 / (1 / precision + 1 / recall), auc=(0.5 + np.sign(pairs) / 2).mean()))


def test_scores_of_series_are_medians_over_sites():
    rng = np.random.default_rng(0)
    obs = rng.gamma(1, 2, (9, 200))
    sim = obs + rng.normal(0, np.linspace(0.1, 2.5, 9)[:, None], obs.shape)
    nse = np.array([evaluate.site_metrics(o, s)["nse"] for o, s in zip(obs, sim)])
    scores = evaluate.series_scores(obs, sim)
    assert scores["nse"] == np.median(nse) and scores["below 0"] == (nse < 0).mean() > 0
    assert np.isclose(scores["clipped"], nse.mean()) and next(iter(scores)) == "clipped"
    assert scores["worst tenth"] == nse.min() > -1          # one of nine
    many = evaluate.series_scores(np.tile(obs, (4, 1)), np.tile(sim, (4, 1)))   # four of 36
    assert np.isclose(many["worst tenth"], nse.min())
    far = evaluate.series_scores(obs, -9 * sim)
    assert far["clipped"] == far["worst tenth"] == -1
    assert evaluate.series_scores(obs[:1], -sim[:1])["below 0"] == 1


def test_scores_of_values_are_over_all_sites():
    obs, sim = np.array([[0.0], [1], [2], [5]]), np.array([[1.0], [2], [4], [5]])
    close(evaluate.value_scores(obs, sim), {
        "R2": 1 - 6 / 14, "rmse": 1.5 ** 0.5, "median difference": 1.0, "nmad": 1.4826 / 2})


def test_sign_test_is_exact():
    assert np.isclose(evaluate.sign_test(np.array([1] * 9 + [-1])), 2 * 11 / 1024)
    assert evaluate.sign_test(np.array([1, -1, 0])) == 1
    assert np.isnan(evaluate.sign_test(np.zeros(3)))
    assert evaluate.sign_test(np.ones(2000)) < 1e-300


def table_of(scoring, runs):
    """What eval.table prints of runs (model, fold, seed, obs, sim)."""
    settings = {"a setting": {}}
    for name, fold, seed, obs, sim in runs:
        run = dict(ids=np.arange(len(obs)) + 10 * fold, obs=obs, sim=sim, fold=fold, seed=seed,
                   overlap=0, baseline="lstm", scoring=scoring, shown=())
        settings["a setting"].setdefault(name, []).append(run)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.table(settings)
    return out.getvalue()


def test_the_table_scores_all_test_sites_at_once_and_gains_by_site():
    far, near = np.array([[0.0], [1]]), np.array([[10.0], [11]])
    text = table_of("value", [
        ("resconn", 0, 0, far, far + 0.5), ("resconn", 1, 0, near, near + 0.5),
        ("lstm", 0, 0, far, far + 1), ("lstm", 1, 0, near, near + 1)])
    # within a fold R2 is 0 and -3, over both it is 1 - 4 * error^2 / 101
    assert re.search(r"resconn +4 of 4 sites, 2 folds, 1 seeds  R2 0.990 ± 0.000", text), text
    assert "gain over lstm +0.500, p 1.2e-01" in text and text.count("gain") == 1
    unseen = np.array([[0.0], [nan]])                       # no observation, no score
    assert " 1 of 2 sites" in table_of("value", [("lstm", 0, 0, unseen, far)])


def test_the_table_does_not_rank_probabilities_of_different_folds():
    label, sure, unsure = np.array([[0.0], [1]]), np.array([[0.8], [0.9]]), np.array([[0.1], [0.2]])
    text = table_of("class", [("cnn", 0, 0, label, sure), ("cnn", 1, 0, label, unsure)])
    assert "auc 1.000 ± 0.000" in text


def test_the_table_says_which_runs_have_seen_test_sites():
    out = out_with_encoder()
    raises(FileNotFoundError, "start with python finetune.py", evaluate.main, ["--out", out])
    tune("--fold 1 --allow-overlap --model resconn", out)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluate.main(["--out", out])
    assert "(has seen test sites)" in text.getvalue() and "±" not in text.getvalue()
    np.savez(Path(out, "runs", "older.npz"), settings="{}")
    raises(ValueError, "older.npz is no run of this version", evaluate.main, ["--out", out])


def everything():
    """{name: test}, of this file and of applications/tests.py."""
    from applications import tests                          # which imports this file
    named = {**globals(), **vars(tests)}
    return {name: test for name, test in named.items() if name.startswith("test_")}


def run_one(name):
    """Run a test by its name: number of failures and of skips, and the text to show."""
    case, text = unittest.FunctionTestCase(everything()[name], description=name), io.StringIO()
    with contextlib.redirect_stdout(text):
        result = unittest.TextTestRunner(stream=text).run(case)
    failed, skipped = len(result.failures + result.errors), len(result.skipped)
    word = "FAILED" if failed else f"skipped, {result.skipped[0][1]}" if skipped else "ok"
    return failed, skipped, f"{name} ... {word}\n" + text.getvalue() * failed


if __name__ == "__main__":
    import test_all                         # this file as a module, which the others import
    os.environ["OMP_NUM_THREADS"] = "1"     # of the processes, one for each core
    parts = sys.argv[1:] or [""]
    chosen = [name for name in test_all.everything() if any(part in name for part in parts)]
    failed = skipped = 0
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), 8)) as pool:
        for failure, skip, text in pool.imap(test_all.run_one, chosen):
            print(text, end="", flush=True)
            failed, skipped = failed + failure, skipped + skip
    print(f"{len(chosen) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)

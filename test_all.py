"""All tests, those of applications/tests.py too: python test_all.py [part of a name], or pytest."""

import ast
import contextlib
import io
import os
import re
import signal
import sys
import tokenize
import unittest
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import TemporaryDirectory, mkdtemp
from unittest import mock

import data
import numpy as np
import torch
from numpy import nan

import eval as evaluate
import finetune
import model
import train

HERE = Path(train.__file__).parent
raises = unittest.TestCase().assertRaisesRegex
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5, equal_nan=True, check_dtype=False)

def printed(function, *args, **options):
    """What a call prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        function(*args, **options)
    return said.getvalue()

def test_the_method_fits_its_size():
    code = lines = 0
    for name in ("model.py", "data.py", "train.py", "finetune.py", "eval.py"):
        text, held, start = (HERE / name).read_text(), set(), True      # the first of a statement?
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.string.strip() and token.type != tokenize.COMMENT and not (
                    start and token.type == tokenize.STRING):                   # a docstring
                held |= {*range(token.start[0], token.end[0] + 1)}
            start = not token.string.strip() and (start or token.type != tokenize.NL)
        code, lines = code + len(held), lines + text.count("\n")
    assert code <= 1200 and lines <= 1650, (code, lines)

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

def test_encoder_layer_equals_torchs():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):     # two ways
        torch.manual_seed(0)
        ours, x = model.EncoderLayer(model.Config()).eval(), torch.randn(3, 9, 64)
        ours.qkv.weight.data *= 4                           # scores that matter
        torchs = torch.nn.TransformerEncoderLayer(64, 2, 128, 0, "gelu", batch_first=True)
        torchs.load_state_dict(dict(zip(torchs.state_dict(), ours.state_dict().values())))
        assert (ours.to(dtype)(x.to(dtype)) - torchs(x)).abs().max() < tolerance

def test_groups_are_hidden_together_within_one_window_of_30_to_90_days():
    m, *_ = small(p_always=0.0, windows=1)
    hidden = m.draw_masks(4000, 120)
    p, tmax, tmin = hidden.dynamic.unbind(-1)
    clay, sand, height, area = hidden.static.unbind(-1)
    assert torch.equal(tmax, tmin) and torch.equal(clay, sand) and not area.any()   # a context
    assert not torch.equal(p, tmax) and not torch.equal(clay, height)
    assert set(p.sum(1).tolist()) - {0} == set(range(30, 91))
    assert (p[:, 1:] != p[:, :-1]).sum(1).max() <= 2
    m, *_ = small(p_always=0.0, windows=1, window_days=(30, 30))
    p = m.draw_masks(500, 31).dynamic[..., 0]
    assert set(p.sum(1).tolist()) == {0, 30} and p[:, 0].any() and p[:, 30].any()

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

def test_an_unknown_place_is_a_hidden_place_and_a_known_one_counts():
    m, forcing, static, latlon, doy = small()
    nowhere, hide = m.encode(forcing, static, None, doy), torch.ones(5).bool()
    close(m.encode(forcing, static, latlon * nan, doy), nowhere)
    close(m.encode(forcing, static, latlon, doy, model.Masks(location=hide)), nowhere)
    assert (m.encode(forcing, static, latlon * 0, doy) - nowhere).abs().max() > 1e-3

def test_the_network_refuses_input_it_has_no_place_for():
    m, forcing, static, *_ = small()
    raises(ValueError, "2 and 4 variables, not .*tmin", m.encode, forcing[..., :2], static)
    raises(ValueError, "3 and 3 variables.*clay", m.encode, forcing, static[:, :3])
    raises(ValueError, "400 days.*365", m.encode, torch.zeros(5, 400, 3), static)
    for batch in ((forcing * nan, static), (forcing, static * nan)):            # either is enough
        assert m.encode(*batch).isfinite().all()

# data.py

def test_the_synthetic_world_is_the_same_for_the_same_seed():
    a, b, c = (data.synthetic_world(seed, 80, 2) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    means = [*np.nanmean(a.forcing, (0, 1)), a.target.mean(), *np.nanmean(a.static[:, 3:6], 0),
             *np.quantile(a.target, (0.05, 0.99, 0.999))]
    np.testing.assert_allclose(             # and the one that results are of
        means, [2.387, 19.59, 10.35, 3.084, 198.7, 61.07, 1.064, 29.29, 35.88, 36.43,
                0.11715, 11.273, 34.983], rtol=1e-3)

def test_radiation_and_evaporation_equal_published_values():
    # FAO-56 example 8: 3 September at 20 S; the equator at an equinox has 37.7
    assert abs(data.extraterrestrial_radiation(-20.0, 246) - 32.2) < 0.1
    for extremes, share in (((), 25 / 100), ((26.0, 14.0), 0.0023 * 37.8 * 12 ** 0.5)):
        assert abs(data.potential_evaporation(0.0, 80, 20.0, *extremes) - 37.7 / 2.45 * share) < 0.1
        assert data.potential_evaporation(0.0, 80, -30.0, *extremes) == 0

FILES = {  # of a small archive of each kind, with | between the lines
    "attributes/us/attributes_other_us.csv": "gauge_id,name,gauge_lat,gauge_lon,pet_mean,area,"
        'p_mean|us_1,"A, at B",40.5,-75,15,100,3.5|us_2,C,41,285.5,,200,|us_9,no flow,42,-74,,1,2',
    "attributes/us/attributes_hydroatlas_us.csv": "gauge_id,slp_dg_sav,cly_pc_sav|us_1,55,20",
    "attributes/us/attributes_mine_us.csv": "gauge_id,Fens,rock,run_mm_syr,clay|us_1,7,marl,400,",
    "timeseries/csv/us/us_1.csv": "date,streamflow,total_precipitation_sum,temperature_2m_mean,"
        "snow|2000-01-01,1.5,0,10,9|2000-01-03,,2,11,9|2000-01-04,0.5,4,,9",
    "timeseries/csv/us/us_2.csv": "date,temperature_2m_min,temperature_2m_max|2000-01-02,0,10",
    "timeseries/csv/us/notes.csv": "who,what|me,this",
    "sites.csv": "id,lat,LON,clay,my_index|b1,50,8,20,1|b2,,,30,NA",
    "b1.csv": "date,Precipitation,tmax,tmin,streamflow|2000/01/01,1,8,2,0.5|2000/01/02,2,9,1,0.6"}

def archives(old="", new="", only=""):
    """Folders of Caravan and of one's own basins: FILES, the pattern `old` replaced in those whose
    name has `only`; as --data takes them."""
    folder = Path(mkdtemp())
    for name, text in FILES.items():
        path, text = folder / ("us" if "/" in name else "own") / name, text.replace("|", "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(old, new, text) if only in name else text, "utf-8", newline="")
    return f"caravan:{folder}/us", f"csv:{folder}/own"

def test_caravan_and_own_basins_are_read_and_joined():
    s = data.load(",".join(archives()), cache=None)
    assert list(s.ids) == ["us_1", "us_2", "b1", "b2"]
    assert np.array_equal(s.dates, np.arange("2000-01-01", "2000-01-05", dtype="M8[D]"))
    assert s.static_names == ("slope", "clay", "p_mean", "area", "fens", "my_index")
    assert s.dynamic_names == ("precipitation", "temperature", "tmax", "tmin", "pet")
    pet = [data.potential_evaporation(*x) for x in ((41, 2, 5.0, 10.0, 0.0), (40.5, 1, 10.0))]
    for got, expected in (
            (s.latlon, [[40.5, -75], [41, 285.5], [50, 8], [nan, nan]]),
            (s.static, [[5.5, 20, 3.5, 100, 7, nan], [nan, nan, nan, 200, nan, nan],
                        [nan, 20, nan, nan, nan, 1], [nan, 30, nan, nan, nan, nan]]),
            (s.forcing[0, :, :2], [[0, 10], [nan] * 2, [2, 11], [4, nan]]),
            (s.forcing[1, 1], [nan, 5, 10, 0, pet[0]]), (s.forcing[0, 0, 4], pet[1]),
            (s.forcing[2, :2, :4], [[1, 5, 8, 2], [2, 5, 9, 1]]), (s.forcing[3], nan),
            (s.target, [[1.5, nan, nan, 0.5], [nan] * 4, [0.5, 0.6, nan, nan], [nan] * 4])):
        np.testing.assert_allclose(got, np.broadcast_to(expected, np.shape(got)), rtol=1e-6)

def test_what_is_derived_of_daily_data():
    _, own = archives("tmax,tmin", "temperature,pet")
    np.testing.assert_equal(data.load(own, cache=None).forcing[0], [[1, 8, 2], [2, 9, 1]])
    s = data.load(archives("8,2|9,1", "5,5")[1], cache=None)       # as in NLDAS: both are means
    assert s.dynamic_names == ("precipitation", "temperature", "pet")
    s = data.load(archives("tmax,tmin", "temperature,dewpoint_temperature_2m_mean")[1], cache=None)
    share = np.exp(17.27 * 2 / 239.3) / np.exp(17.27 * 8 / 245.3)
    np.testing.assert_allclose(s.forcing[0, 0, -1], 100 * share, rtol=1e-5)

def test_what_is_not_used_is_told():
    said = printed(data.load, ",".join(archives()), cache=None)
    for text in ("line 2: rock is 'marl', a column of text, not read", "a daily table: 1 (us_9)",
                 "without a row of attributes: 1 (notes)", "without weather: 1 (b2)", "place: 1 (b",
                 "without streamflow: 2 (us_2, b2)"):
        assert text in said, (text, said)
    s = data.load(archives()[0], cache=None)
    assert not {"run_mm_syr", "snow"} & {*s.static_names}   # run-off would give the flow away
    said = printed(data.load, archives("my_index", "tmax", "sites")[1], cache=None)
    assert re.search(r"(?s)attributes, left out: 1 \(tmax\).*tmax +degC +8.5 ", said), said
    assert "gauge_id" not in printed(data.load, archives("tmax", "gauge_id", "b1")[1], cache=None)
    said = printed(data.load, archives(",8,20", ",,20")[1], cache=None)
    assert "without place: 2 (b1, b2)" in said              # a latitude alone is none

def test_classes_of_one_prefix_are_one_group():
    names = ("clay", "rock_marl", "cover", "rock_granite", "p_mean", "p_max")
    assert data.groups(names) == ("soil", "rock", "cover", "rock", "climate", "p_max")

def test_archives_are_parsed_once_until_a_file_changes():
    spec, cache = ",".join(archives()), mkdtemp()
    s = data.load(spec, cache=cache)
    with mock.patch.object(data, "assemble", None):         # not parsed again
        again = data.load(spec, cache=cache)
    np.testing.assert_equal(vars(again), vars(s))
    assert isinstance(again.forcing, np.memmap) and again.digest == s.digest    # stays on disk
    path = Path(spec.partition(":")[2].partition(",")[0], "timeseries/csv/us/us_1.csv")
    path.write_text(path.read_text().replace("1.5", "2.5"))
    path.with_name(".#us_1.csv").symlink_to("nowhere")      # an editor's lock
    changed = data.load(spec, cache=cache)
    assert np.nanmax(changed.target[0]) == 2.5 and changed.digest != s.digest
    assert len(list(Path(cache).iterdir())) == 2            # nothing half-written is left
    for file in Path(cache).rglob("forcing.npy"):
        file.write_bytes(b"")
    raises(ValueError, "is damaged, delete it", data.load, spec, cache=cache)

def test_the_digest_is_of_everything_but_the_extra():
    s = data.synthetic_world(0, 5, 1)
    changes = [dict(ids=s.ids[::-1]), dict(latlon=s.latlon + 1), dict(static=s.static + 1),
               dict(forcing=s.forcing * 2), dict(target=3 * s.target), dict(dates=s.dates + 1),
               dict(static_names=s.static_names[::-1]), dict(dynamic_names=s.dynamic_names[::-1])]
    digests = {data.replace(s, **change).digest for change in changes}
    assert len(digests | {s.digest}) == 9 and data.replace(s, extra={}).digest == s.digest

def test_line_ends_blanks_quotes_and_byte_order_marks_change_nothing():
    whole = data.load(",".join(archives()), cache=None).digest
    for old, new in ((r"\A", "\ufeff"), (r"\n", "\r\n"), (r"\Z", "\n\n"), ("(?<=[a-z0-9]),", " ,"),
                     ("(2000-01-..)", r' "\1"'), ("NA", "-999"), ("A, at B", "A" * 200_000)):
        assert data.load(",".join(archives(old, new)), cache=None).digest == whole, (old, new)

def complaints(old, new):
    """What is said of archives with one file changed at a time."""
    said = []
    for name in FILES:
        try:
            data.load(",".join(archives(old, new, name)), cache=None)
        except ValueError as error:
            said.append(str(error))
    return "\n".join(said)

def test_a_bad_table_or_value_is_refused_by_file_and_line():
    for old, new, complaint in (
            (r"(?s).{9}\Z", "", "us_1.csv, line .4.: expected 5"), (r"(?s).+", "", "it is empty"),
            (r"(?s)\n.*", "", "no row"), ("[,;\t]", "|", "no column"), ("snow", "date", "a column"),
            (r"\n", "\n1,", "line .2.*expected 7 fields"),
            ("us_2,C", "us_1,C", "us.csv: site us_1 twice"),
            ("b2,,", "b1,,", "sites.csv: site b1 twice"), ("b1,", ",", "csv, line 2: id is ''"),
            ("b1,", "b/1,", "line 2: id is 'b/1', expected a name that a file can have"),
            ("41,285", "95,0", "us_2: lat 95 is not -90 to 90"), (",-75,", ",-775,", "lon -775"),
            ("2000-01-03", "2000-01-01", "us_1.csv: the same date twice"),
            ("2000-01-03", "today", "us_1.csv, line 3: date is 'today', expected 2000-01-31"),
            ("2000-01-03", "2199-01-03", "'2199-01-03'"), ("-01-", "-31-", "'2000-31-01'"),
            (r"\d+\.\d+", "1e39", "'1e39'"), (r"\d+\.\d+", "-inf", "'-inf', expected a number"),
            (r"\d+\.\d+", "a'b", "us_1.csv, line 2: streamflow is 'a'b'"),
            ("01,1,8", "01,-1,8", "own: site b1: precipitation -1 is not 0 to 2000 mm/d"),
            ("01,1,8", "01,1,288", "b1: temperature 145 is not -90 to 60 degC"),
            ("8,20,1", "8,120,1", "b1: clay 120 is not 0 to 100 %"),
            ("0.6", "-99.99", "streamflow -99.99 is not .* if it means missing, write an empty"),
            ("tmax,tmin", "tmin,tmax", "b1.csv: tmin is above tmax"),
            ("tmax,tmin", "precipitation,total_precipitation_sum", "twice, or under two names")):
        assert re.search(complaint, complaints(old, new)), (old, new, complaints(old, new))
    s = data.load(archives("0.5", "-1e-9", "b1")[1], cache=None)
    assert s.target[0, 0] == 0                              # rounding noise

def test_wrong_units_of_rain_and_flow_can_be_seen():
    ratio = "streamflow / precipitation at the median site: "
    for change, shown in ((("", ""), "0.367\n"), ((r"(0\d),", r"\1,.00"), "367: are both in mm/d?"),
                          ((",0[.]", ",0.00"), "0.00367: are both in mm/d?")):
        said = printed(data.load, archives(*change, "b1")[1], cache=None)
        assert ratio + shown in said, (change, said)
    assert re.search(r"precipitation +mm/d +1.5 +1 +2 +50% +1\n", said)
    assert re.search(r"clay +% +25 +20 +30 +0% +2\n", said)

def test_ids_that_lost_their_leading_zeros_are_refused():
    for files, ids in (("007", "7"), ("us_007", "us_7")):
        raises(ValueError, f"DIR: ids and files differ in leading zeros: ..{ids}",
               data.compare_ids, "DIR", [ids, "other"], [files])
    data.compare_ids("DIR", ["10", "7"], ["1", "7"])

def test_a_file_with_semicolons_is_named_as_such():
    for change in ((",", ";"), (r"(?m)^([^,]*),", r"\1;")):    # without and with decimal commas
        assert "(fields separated by ';'? expected ',')" in complaints(*change)

def test_unknown_or_empty_sources_and_one_given_twice_are_refused():
    raises(ValueError, "caravan:/nowhere': no such folder", data.load, "caravan:/nowhere")
    raises(ValueError, "pigeon.*neither csv nor caravan", data.load, "pigeon:/")
    raises(ValueError, "no site found", data.load, f"caravan:{mkdtemp()}", cache=None)
    own = archives()[1]
    raises(ValueError, "site b1 is there twice", data.load, f"{own},{own}", cache=None)

def test_folds_are_of_gauges_at_random_or_regions_of_one_size():
    s = data.synthetic_world(0, 300, 1)
    pub, pur, xyz = data.folds(s, "pub", 5), data.folds(s, "pur", 5), data.on_sphere(s.latlon)
    assert np.bincount(pub).min() > 35 and np.bincount(pur).tolist() == [60] * 5
    assert not np.array_equal(data.folds(s, "pub", 5, seed=1), pub)
    near = np.argsort(-(xyz @ xyz.T), 1)[:, 1:4]
    assert (pur[near] == pur[:, None]).mean() > 0.85 and (pub[near] == pub[:, None]).mean() < 0.4
    some = data.replace(s, ids=s.ids[::3], latlon=s.latlon[::3])
    assert np.array_equal(data.folds(some, "pub", 5), pub[::3])     # whatever others there are
    twice = data.replace(s, ids=np.append(np.char.add("hysets_", s.ids), s.ids),
                         latlon=np.append(s.latlon + 0.01, s.latlon, 0))
    for kind in ("pub", "pur"):                             # of one gauge in two archives
        assert np.array_equal(*data.folds(twice, kind, 5).reshape(2, 300))
    raises(ValueError, "pub, pur or none", data.folds, s, "puf", 5)
    s.latlon[3] = nan
    raises(ValueError, "without a place have no region", data.folds, s, "pur", 5)

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
    text, env = "", os.environ | {"OMP_NUM_THREADS": "1"}
    with Popen(command, text=True, stdout=PIPE, stderr=STDOUT, env=env) as process:
        for line in process.stdout:
            text += line
            if stop and stop in line:
                process.terminate()
    assert process.returncode == code, text
    return text, torch.load(Path(out, "pretrained.pt"), weights_only=True)

def test_two_processes_have_the_gradients_of_one():
    options, gradients = '--quick --steps 1 --config {"dropout":0} --dtype float32', []
    for launcher in ("", "-m torch.distributed.run --nproc_per_node=2"):
        text, saved = run(options, mkdtemp(), launcher)
        gradients.append([10 * state["exp_avg"] for state in saved["optimizer"]["state"].values()])
    assert "float32 on 2 cpu" in text and len(gradients[0]) > 20
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() < 1e-5 + 1e-4 * one.abs().max()

def test_the_first_losses_of_default_training_are_known():
    loss_of, before = train.masked_loss, signal.getsignal(signal.SIGINT)

    def note(*errors_and_counts):
        losses.append(loss_of(*errors_and_counts).item())
        assert len(losses) < len(known), "that is enough"
        return loss_of(*errors_and_counts)
    for short, known in (("0", [1.310926, 1.472093, 1.682551]), ("0.8", [1.422404, 1.582901])):
        losses, options = [], ["--out", mkdtemp(), "--dtype", "float32", "--short", short]
        with mock.patch.object(train, "masked_loss", note):
            raises(AssertionError, "enough", train.main, options)
        close(losses, known, atol=1e-3)
    assert signal.getsignal(signal.SIGINT) == before        # Ctrl-C is the caller's again

QUICK = "--quick --steps 8 --dtype float32 "

def checkpoint():
    """The path of a checkpoint after few steps, made once, and what it holds."""
    if not hasattr(checkpoint, "path"):
        out = mkdtemp()
        _, checkpoint.saved = run(QUICK, out)
        checkpoint.path = Path(out, "pretrained.pt")
    return checkpoint.path, checkpoint.saved

def test_a_stopped_run_resumes_bit_for_bit():
    out, (_, whole) = mkdtemp(), checkpoint()
    stopped, part = run(QUICK, out, stop="step 1/")
    resumed, same = run("--resume", out)
    assert "continue with --resume" in stopped and part["step"] < 8 == same["step"]
    assert f"from step {part['step']}" in resumed and "R2 of hidden weather" in resumed
    close(same["model"], whole["model"], atol=0)
    raises(AssertionError, "\nerror: --resume: .*other data", run, "--resume --fold 2", out)

def test_a_checkpoint_knows_its_training_sites_and_is_scaled_by_them_alone():
    (_, saved), sites = checkpoint(), data.load(quick=True)
    held, validation = data.folds(sites, "pub", 5) == 0, data.folds(sites, "pub", 10, seed=1) == 0
    seen = np.isin(sites.ids, saved["ids"])
    assert np.array_equal(seen, ~held & ~validation) and saved["digest"] == sites.digest
    close(saved["latlon"], torch.tensor(sites.latlon[seen]))
    close(saved["scaling"]["static"], train.fit_standardisation(sites.static[seen]))
    close(saved["scaling"]["forcing"], train.fit_standardisation(sites.forcing[seen]))

def test_a_diverging_run_keeps_the_last_good_checkpoint():
    text, saved = run(QUICK + "--lr 1e30", mkdtemp(), code=2)
    assert "\nerror: loss nan" in text and saved["step"] == 0

def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason():
    path, saved = checkpoint()
    whole, other = path.read_bytes(), Path(mkdtemp(), "other.pt")
    at = whole.index(saved["model"]["position"].numpy().tobytes())
    for content, reason in (
            (whole[:len(whole) // 2], "not a zip"), (b"text", "not a zip"), (b"", "not a zip"),
            (whole[:at] + b"1234" + whole[at + 4:], "damaged"),                 # one weight changed
            ({"a": 1}, "it has no optimizer: train.py"), (saved | {"x": os.system}, "code"),
            (saved | {"version": train.VERSION + 1}, "version 9, not 8")):
        other.write_bytes(content) if isinstance(content, bytes) else torch.save(content, other)
        raises(ValueError, "other.pt cannot be read: .*" + reason, train.load_checkpoint, other)
    raises(FileNotFoundError, "run train.py first", train.load_checkpoint, "nowhere.pt")
    raises(ValueError, "no settings: train.py and", finetune.load, path)

def test_standardisation():
    x, rng = np.full((5000, 4), nan), np.random.default_rng(0)
    x[:, 0], x[:, 1], x[:, 3] = rng.gamma(0.3, 5, 5000), rng.normal(3, 2, 5000), 7
    scaling = train.fit_standardisation(x)
    y = train.apply_standardisation(x, scaling)
    assert scaling[0].tolist() == [1, 0, 0, 0]              # only the first is skewed
    np.testing.assert_allclose(y.mean(0), [0, 0, nan, 0], atol=1e-5)
    np.testing.assert_allclose(y.std(0), [1, 1, nan, 0], atol=1e-4)
    assert train.fit_standardisation(x - 1)[0].tolist() == [0, 0, 0, 0]         # negative values

def test_windows_serve_the_days_of_their_sites():
    s = data.synthetic_world(0, 8, 3)
    s.forcing[2, :300] = s.forcing[2, 900:] = s.forcing[3] = nan
    same = {name: torch.tensor([[0.0] * n, [0.0] * n, [1.0] * n]).double()
            for name, n in (("forcing", 7), ("static", 19))}
    w = train.Windows(s, same, 365, ("tea", *s.dynamic_names[::-1]), s.static_names)
    starts = w.starts(np.repeat([2, 3, 4], 300), np.random.default_rng(0)).reshape(3, 300)
    assert starts[0].min() == 300 and starts[0].max() == 900 - 365              # within the record
    assert not starts[1].any() and starts[2].min() < 20 and starts[2].max() > 1096 - 365 - 20
    forcing, static, latlon, day = w.get(np.array([4, 0]), np.array([100, 731]))
    expected = np.c_[np.full(365, nan), s.forcing[0, 731:1096, ::-1]]
    np.testing.assert_allclose(forcing[1], expected, rtol=1e-6)
    np.testing.assert_allclose(static, s.static[[4, 0]], rtol=1e-6)
    assert np.array_equal(latlon, s.latlon[[4, 0]])
    assert day[0, 0] == 101 and day[1, 0] == 1 and day[0, 265] == 1
    raises(ValueError, '1096 days .* windows of 2000: .*"max_days": 1096', train.Windows, s, same,
           2000, s.dynamic_names, s.static_names)

def test_a_bad_option_is_refused_in_one_line_and_help_explains():
    for main, options, complaint in (
            (train.main, '--config {"dmodel":3}', "--config takes .*'d_model'"),
            (train.main, "--fold -1", "--fold -1: expected 0 to 4"),
            (finetune.main, "--fold 7", "--fold 7: expected all, or some of .'0', '1'"),
            (finetune.main, "--model elastic", "elastic: expected some of .'resconn'"),
            (finetune.main, "--target latents", "synthetic world has no latents"),
            (finetune.main, "--labelled 99 --model lstm", "only 18 test sites and 42 others"),
            (finetune.main, "--test-period 1994-01-01/1996-01-01 --model lstm", "days within"),
            (finetune.main, "--warmup 400 --model lstm", "--warmup 400: fewer than the 365")):
        raises(ValueError, complaint, main, ["--quick", "--out", mkdtemp(), *options.split()])
    for script, options in (
            (train, "--data x:y"), (finetune, "--checkpoint x"), (evaluate, "--out x"),
            (train, "--stpes 5"), (train, "--steps -5"), (train, "--lr many"), (finetune, "--help"),
            (train, "--folds 1.5"), (finetune, "--dtype float8"), (train, "--data x:y --debug")):
        said, argv = io.StringIO(), [script.__file__, *options.split(), "--out", mkdtemp()]
        text = {"--help": "0", "--data x:y --debug": "x:y"}.get(options, "2")
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(said), \
                contextlib.redirect_stdout(said):
            raises(ValueError if text == "x:y" else SystemExit, text, data.command, script.main)
        shown = {"--help": "--labelled LABELLED   sites", "--folds 1.5": "invalid positive"}
        assert shown.get(options, "error: ") in said.getvalue() or "--debug" in options, options

# finetune.py

def tune(options, out=None):
    """Run finetune.py with the encoder of checkpoint(); what it printed, and {run's name: run}."""
    out = Path(out or mkdtemp())
    if not Path(out, "pretrained.pt").exists():
        Path(out, "pretrained.pt").write_bytes(checkpoint()[0].read_bytes())
    said = printed(finetune.main, f"--quick --steps 4 --out {out} {options}".split())
    return said, {path.stem: dict(np.load(path)) | {"path": path, "at": path.stat().st_mtime_ns}
                  for path in sorted(Path(out, "runs").glob("*.npz"))}

def patched(change, options, out=None):
    """tune() with the quick synthetic world changed before."""
    sites = change(data.load(quick=True))
    with mock.patch.object(data, "load", lambda *_: sites):
        return tune(options, out)

def test_variants_predict_flow_at_held_out_sites_and_are_saved():
    sites, (_, runs) = data.load(quick=True), tune("--dtype float32")
    test = np.flatnonzero(data.folds(sites, "pub", 5) == 0)
    for (name, run), mean in zip(runs.items(), (0.78527, 0.69190), strict=True):
        assert np.array_equal(run["ids"], sites.ids[test]) and run["overlap"] == 0, name
        days = slice(int(0.6 * len(sites.dates)), len(sites.dates))
        assert np.array_equal(run["obs"], sites.target[test, days])
        assert abs(run["sim"].mean() - mean) < 1e-3 and (run["sim"] >= 0).all()     # known
        model = finetune.load(run["path"].with_suffix(".pt"))
        again = finetune.Samples(model, sites, test, days).predict()
        assert np.array_equal(again, run["sim"])
        assert np.isfinite(model.predict(sites)).all()      # every day of every site
        assert model.settings["places"]["latlon"].shape == (36, 2)
    with mock.patch.dict(finetune.VARIANTS, clear=True):
        raises(ValueError, "import the application that defines resconn", finetune.load,
               run["path"].with_suffix(".pt"))

def test_a_run_is_repeated_only_if_its_settings_data_or_checkpoint_are_new():
    def made(options="", change=lambda sites: sites):
        """(model, setting) of what was trained in this round."""
        before = made.runs
        _, made.runs = patched(change, "--allow-overlap " + options, out)
        return {tuple(name.split(", ")[k] for k in (-3, 0)) for name, run in made.runs.items()
                if name not in before or before[name]["at"] != run["at"]}
    out, (path, saved), made.runs = mkdtemp(), checkpoint(), {}
    assert len(made()) == 2 and not made() and len(made.runs) == 2
    assert len(made("--lr 1e-3")) == 2 and len(made.runs) == 4  # beside the old
    flows = made("", lambda sites: data.replace(sites, target=3 * sites.target))
    assert len(flows) == 2 and len(made.runs) == 6          # settings name the data's digest
    torch.save(saved | {"ids": saved["ids"][1:]}, Path(out, "pretrained.pt"))   # trained anew
    assert [name[:7] for name, _ in made()] == ["resconn"] and len(made.runs) == 6
    torch.save(saved | {"step": 7}, Path(out, "pretrained.pt"))                 # for fewer steps
    assert [name[:7] for name, _ in made()] == ["resconn"] and len(made.runs) == 7
    found = evaluate.load_runs(out)
    assert len(found) == 3 and max(map(len, found.values())) == 3

def test_sites_are_chosen_by_fold_label_basin_list_and_observations():
    sites = data.load(quick=True)
    held, days = data.folds(sites, "pub", 5) == 1, (slice(0, 500), slice(500, 1096))

    def choose(held=held, labelled=0, basins="", holdout="pub", seed=0):
        o = Namespace(labelled=labelled, basins=basins, holdout=holdout, target="streamflow")
        return finetune.choose_sites(o, sites, held, days, np.random.default_rng(seed))
    training, validation, test = choose()
    assert sorted([*training, *validation, *test]) == [*range(60)] and held[test].all()
    assert len(validation) == (60 - len(test)) // 7
    assert [len(part) for part in choose(labelled=14)] == [12, 2, len(test)]
    assert len(choose(held & False, holdout="none")[2]) == 0
    path = Path(mkdtemp(), "list.txt")
    path.write_text("\n".join(np.char.add("camels_", sites.ids[::2])))          # a gauge's names
    assert sorted(np.concatenate(choose(basins=str(path)))) == [*range(0, 60, 2)]
    path.write_text("synthetic_0001 1 2 3 4")
    raises(ValueError, "4 unknown sites: .'1', '2', '3'.", choose, basins=str(path))
    sites.target[training[0], :500] = sites.target[test[0], 500:] = nan
    sites.forcing[training[1]] = nan
    assert {*range(60)} - {*np.concatenate(choose())} == {*training[:2], test[0]}
    assert "left out: 3 (" in printed(choose)
    sites.target[test] = nan
    raises(ValueError, "only 0 test sites", choose)

def test_periods_are_of_the_days_with_observations():
    sites, o = data.load(quick=True), Namespace(
        holdout="pub", train_period="", test_period="", target="streamflow")
    sites = data.replace(sites, target=np.where(sites.dates < sites.dates[731], sites.target, nan))
    assert [*finetune.periods(o, sites)] == [slice(0, 438), slice(438, 731)]
    o.holdout = "none"                                      # for use: all of them
    assert [*finetune.periods(o, sites)] == [slice(0, 731), slice(0, 731)]
    o.train_period = "1995-12-31/1997-12-30"
    assert [*finetune.periods(o, sites)] == [slice(364, 1095), slice(0, 731)]

def test_models_for_use_learn_from_all_sites_and_calibrate_on_the_same():
    _, runs = tune("--holdout none --model lstm --seeds 2 --fold all")
    one, two = runs.values()
    assert len(one["ids"]) == 0 and len(one["validation_ids"]) == 60 // 7
    assert np.array_equal(one["validation_ids"], two["validation_ids"])
    assert not np.array_equal(one["validation_sim"], two["validation_sim"])
    assert one["validation_sim"].shape == (8, 1096)

def test_what_a_test_site_observed_does_not_reach_a_model():
    def forge(sites):
        test = data.folds(sites, "pub", 5) == 0
        return data.replace(sites, target=np.where(test[:, None], 7 * sites.target, sites.target))
    for one, two in zip(tune("")[1].values(), patched(forge, "")[1].values(), strict=True):
        assert np.array_equal(one["sim"], two["sim"])

def test_a_checkpoint_that_has_seen_test_sites_is_refused_and_odd_ones_told():
    def rename(sites):                                      # the same gauges in another archive
        return data.replace(sites, ids=np.char.add("camels_", sites.ids))
    raises(ValueError, "has seen .* of the .* test sites; pretrain with --holdout pub",
           patched, rename, "--fold 1 --model resconn")
    said, runs = patched(rename, "--fold 1 --model resconn --allow-overlap")
    assert next(iter(runs.values()))["overlap"] > 0
    (_, saved), out = checkpoint(), mkdtemp()
    torch.save(saved | {"step": 7}, Path(out, "pretrained.pt"))
    said, _ = patched(lambda sites: data.replace(
        sites, static_names=("tea", *sites.static_names[1:])), "--target pet --model resconn", out)
    for text in ("stopped at step 7 of 8", "or only the sites have: 2 (elevation, tea)",
                 "was trained to reconstruct the target itself: 1 (pet)"):
        assert text in said, said

def samples(variant="resconn", embedding="frozen", length=365, warmup=300):
    """Windows of two sites, with an encoder of random weights."""
    sites = data.synthetic_world(0, 20, 3)
    torch.manual_seed(0)
    config = model.Config(sites.dynamic_names, sites.static_names, d_model=16)
    scaling = {key: train.fit_standardisation(getattr(sites, key)) for key in ("forcing", "static")}
    settings = dict(
        target="streamflow", variant=variant, width=16, dropout=0.0, length=length, warmup=warmup,
        centre=[0, 1], spread=[2, 4], dtype="float32", config=vars(config), encoder_scaling=scaling,
        scaling=scaling, forcing_names=sites.dynamic_names, static_names=sites.static_names)
    with mock.patch.dict(finetune.VARIANTS, {variant: finetune.Variant(embedding=embedding)}):
        predictor = finetune.Predictor(settings)
    return finetune.Samples(predictor, sites, np.array([3, 7]), slice(0, 1096))

def test_embeddings_are_cached_only_if_the_encoder_is_frozen():
    s = samples()
    windows = s.encoder_windows.get(s.site[7:8], s.start[7:8])
    before, after = s.encoded[7].float().chunk(2, -1)
    close(before, s.model.encoder.embed(*windows)[0], atol=1e-2)
    close(after, s.model.encoder.encode(*windows)[0], atol=1e-2)
    assert s.encoded.shape == (len(s.site), 366, 32)
    for embedding in ("frozen", "tuned", "random"):
        s = samples(embedding=embedding)
        s.outputs(np.arange(2)).sum().backward()
        learns = s.model.encoder.project.weight.grad is not None
        assert learns == (embedding != "frozen") == (s.encoded is None)

def test_predictions_are_put_together_from_windows_after_their_warm_up():
    s = samples()
    result = s.predict()
    for k in (0, 1, 4):                                     # windows of the first site
        days = slice(s.start[k] + (300 if k else 0), s.start[k] + 365)
        with torch.no_grad():
            y = s.outputs([k])[0, days.start - s.start[k]:].numpy() * [2, 4] + [0, 1]
        close(result[0, days], (np.maximum(y, 0) ** [2, 1]).mean(1))            # of root and flow
    assert result.shape == (2, 1096) and np.isfinite(result).all()
    assert finetune.Predictor.inverse(Namespace(powers=np.ones(1)), np.array([-3])) == -3   # °C

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
    constant = evaluate.site_metrics(np.full(9, 2.0), np.arange(9.0))           # undefined: NaN
    assert np.isnan(constant["nse"]) and np.isnan(constant["corr"]) and constant["rmse"] > 0
    assert all(np.isnan(v) for v in evaluate.site_metrics([nan, 1], [1, nan]).values())

def test_scores_of_series_are_medians_over_sites():
    rng = np.random.default_rng(0)
    obs = rng.gamma(1, 2, (9, 200))
    sim = obs + rng.normal(0, np.linspace(0.1, 2.5, 9)[:, None], obs.shape)
    nse = np.array([evaluate.site_metrics(o, s)["nse"] for o, s in zip(obs, sim)])
    scores = evaluate.series_scores(obs, sim)
    assert scores["nse"] == np.median(nse) and scores["below 0"] == (nse < 0).mean() > 0
    assert np.isclose(scores["clipped"], nse.mean()) and next(iter(scores)) == "clipped"
    assert scores["worst tenth"] == nse.min() > -1          # one of nine
    worst = evaluate.series_scores(*np.repeat([obs, sim], 4, 1))["worst tenth"]     # four of 36
    assert np.isclose(worst, nse.min()) and evaluate.series_scores(obs, -9 * sim)["clipped"] == -1

def test_the_table_scores_all_test_sites_at_once():
    runs = [dict(ids=np.arange(2) + 10 * fold, fold=fold, seed=seed, overlap=fold,
                 obs=(far := np.array([[0.0, top], [0, 2 * top]])), sim=far + 0.5)
            for fold, top in ((0, 1), (1, 10)) for seed in (0, 1)]
    text = printed(evaluate.table, {"a setting": {"lstm": runs}})
    nse = 1 - 0.5 / (np.array([[1, 2], [10, 20]]) ** 2 / 2)                     # of all four sites
    score = f"{np.median(nse):.3f} ± {np.median(nse, 1).std():.3f}"
    assert re.search(rf"lstm +4 sites, 2 folds, 2 seeds .* nse {score}", text), text
    assert "(has seen test sites)" in text
    assert "±" not in printed(evaluate.table, {"a setting": {"lstm": runs[:1]}})

def test_runs_without_test_sites_are_not_scored_and_foreign_files_told():
    out = mkdtemp()
    for arguments in ("--holdout none --model lstm", ""):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, "2", evaluate.main, ["--out", out])
        assert "start with python finetune.py" in said.getvalue()
        tune(arguments, out)
    np.savez(Path(out, "runs", "older.npz"), settings="{}")
    text = printed(evaluate.main, ["--out", out])
    assert "older.npz is no run of finetune.py, passed over" in text and text.count("lstm") == 1

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
    with (TemporaryDirectory() as os.environ["TMPDIR"],                         # of all tests
          ProcessPoolExecutor(min(os.cpu_count(), 8), get_context("spawn")) as pool):
        for failure, skip, text in pool.map(test_all.run_one, chosen):
            print(text, end="", flush=True)
            failed, skipped = failed + failure, skipped + skip
    print(f"{len(chosen) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)

"""`python benchmarks/architecture_study`: what it measures and concludes, and how the command behaves."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from architecture_study import __main__ as command
from architecture_study import plan, plots, results, speed, tables, training
from architecture_study.__main__ import Study, main
from architecture_study.plan import Settings
from architecture_study.results import Store

from model import GPT, GPTConfig, generate
from train.data import TokenDataset, load_data

TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 10
TINY = {
    "context-size": 8,
    "steps": 6,
    "tokens-per-step": 64,
    "n-layer": 2,
    "n-head": 2,
    "n-kv-head": 1,
    "d-model": 16,
    "copying-steps": 2,
}
SMALL = ["--quick", "--device", "cpu", *(word for name, value in TINY.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The directory of a finished study."""
    out = tmp_path_factory.mktemp("study")
    assert main([*SMALL, "--data", text, "--out", str(out)]) == 0
    return out


def document(directory):
    return json.loads((directory / "architecture-study" / "compare.json").read_text())


# What is measured


def test_a_run_gives_the_same_figures_every_time_and_others_with_another_seed(text):
    sizes = {name.replace("-", "_"): value for name, value in TINY.items()}
    study = Study(Settings(data=text, device="cpu", quick=True, out="never-written", **sizes))
    run = study.runs()[3]
    first, second = (training.train_and_measure(run, study.settings, study.data) for _ in range(2))
    assert first == second
    other = training.train_and_measure(run._replace(seed=1), study.settings, study.data)
    assert other["loss"] != first["loss"] and other["curve"] != first["curve"]
    assert len(first["sample"]) == training.SAMPLE_CHARACTERS


@pytest.mark.parametrize("context", [2, 8, 25, 256])
def test_bins_of_positions_leave_none_out_and_end_with_the_context(context):
    bins = training.position_bins(context)
    assert [position for first, last in bins for position in range(first, last + 1)] == [*range(1, 4 * context + 1)]
    assert context in [last for _, last in bins]


def test_loss_by_position_is_that_of_the_model_and_stops_where_learned_positions_do(text):
    data = load_data(text)
    config = dict(vocab_size=data.tokenizer.vocab_size, context_length=8, n_layer=1, n_head=2, d_model=16)
    for positions in ("learned", "rope"):
        model = GPT(GPTConfig(**config, positions=positions), seed=0).eval()
        found = training.loss_by_position(model, data, tokens=64)
        length = 8 if positions == "learned" else 32
        assert found[-1][1] == length
        # 64 characters are two texts of 32: the first and the last of the held-out part
        dataset = TokenDataset(data.held_out.tokens, 32, data.tokenizer)
        x, y = dataset.batch([0, len(dataset) - 1])
        with torch.no_grad():
            logits, _ = model(x[:, :length])
        for first, last, loss in found:
            part = torch.nn.functional.cross_entropy(
                logits[:, first - 1 : last].flatten(0, 1), y[:, first - 1 : last].flatten()
            )
            assert loss == pytest.approx(part.item(), rel=1e-5)


def test_the_original_sampler_writes_what_ours_writes():
    model = GPT(
        GPTConfig(vocab_size=17, context_length=8, n_layer=2, n_head=2, d_model=16, positions="learned"), seed=0
    )
    prompt = torch.arange(5)[None]
    theirs = [int(token) for token in speed.recomputing(model.eval(), prompt, 12)]
    assert theirs == [int(token) for token in generate(model, prompt, 12, temperature=0)]


def test_contestants_take_turns_and_every_round_has_another_order():
    called = []
    contestants = {name: (lambda name=name: called.append(name) or [0.001]) for name in "abcd"}
    times = speed.take_turns(contestants, 5, "test")
    rounds = [called[i : i + 4] for i in range(0, 20, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds) and len(set(map(tuple, rounds))) > 1
    assert times["a"] == {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "calls": 5}


def test_a_cache_grows_with_the_text_only_without_a_window():
    shape = dict(vocab_size=17, context_length=8, n_layer=2, n_head=2, n_kv_head=1, d_model=16)
    a_position = 2 * 2 * 8 * 4  # keys and values, layers, elements of the one KV head, bytes
    assert results.cache_bytes(GPTConfig(**shape, window=4), 4000) == 4 * a_position
    assert results.cache_bytes(GPTConfig(**shape), 4000) == 4000 * a_position
    assert results.cache_bytes(GPTConfig(**shape, positions="learned"), 4000) == 8 * a_position


# What a window cannot do


@pytest.mark.parametrize("kind", training.DISTANCES)
@pytest.mark.parametrize("architecture", training.COPY_ARCHITECTURES)
def test_the_letter_reaches_the_answer_unless_it_is_out_of_the_windows_reach(architecture, kind):
    run = training.CopyRun(architecture, training.DISTANCES[kind], steps=0)
    model = training.copy_model(run, Settings(device="cpu")).eval()
    texts = torch.stack([training.copying_texts(1, run.distance, seed=0)[0][0]] * training.LETTERS)
    texts[:, 0] = torch.arange(training.LETTERS)
    with torch.no_grad():
        answers = model(texts)[0][:, -1]
    same = bool((answers == answers[0]).all())
    assert same == (architecture == plan.MODIFIED and kind == "out of reach")


@pytest.mark.parametrize("architecture", training.COPY_ARCHITECTURES)
def test_within_a_window_every_architecture_learns_to_copy(architecture):
    run = training.CopyRun(architecture, distance=3, steps=120)
    assert training.copy_and_measure(run, Settings(device="cpu"))["accuracy"] > 0.95


# What is concluded


def test_an_interval_over_three_seeds_is_students():
    found = results.difference([2.0, 2.1, 2.3], [1.9, 2.1, 2.1])
    assert found.mean == pytest.approx(0.1) and found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3) and found.sign == 0
    assert results.difference([1.0, 1.1, 1.2], [2.0, 2.1, 2.21]).sign == -1
    assert results.difference([2.0, 2.1, 2.21], [1.0, 1.1, 1.2]).sign == 1
    one = results.estimate([2.0])
    assert one == (2.0, None, math.inf) and one.sign == 0  # one seed proves nothing


@pytest.mark.parametrize(
    ("ours", "cell"),
    [
        ([1.0, 1.1, 1.21], "**-0.997 ± 0.014**"),
        ([3.0, 3.1, 3.21], "**+1.003 ± 0.014**"),
        ([2.1, 2.0, 2.3], "+0.033 ± 0.287"),
    ],
)
def test_a_difference_is_bold_only_where_its_interval_leaves_0_out(ours, cell):
    assert tables.compared(ours, [2.0, 2.1, 2.2]) == cell
    assert tables.compared(ours[:1], [2.0]).endswith("(one seed)")


def test_a_time_is_shorter_only_where_the_spreads_do_not_overlap():
    quick, slow, vague = ({"p20_ms": a, "p80_ms": b} for a, b in ((1.0, 1.2), (1.3, 1.5), (1.1, 1.4)))
    assert [tables.shorter(*pair) for pair in ((quick, slow), (slow, quick), (quick, vague))] == [1, -1, 0]


def test_a_sampling_time_is_bold_only_where_it_is_shorter_than_the_originals(finished):
    changed = document(finished)
    times = {
        "original": (1.3, 1.4, 1.5),
        "rope": (1.0, 1.1, 1.2),
        "rope-window": (1.1, 1.2, 1.4),
        plan.MODIFIED: (2, 3, 4),
    }
    for row in changed["models"]:
        for time in row.get("token_ms", {}).get("cached", {}).values():
            time["p20_ms"], time["median_ms"], time["p80_ms"] = times.get(row["architecture"], (1, 1, 1))
    cells = {row[1]: row[2] for row in tables.sampling(changed, [8])["rows"]}
    assert [cells[name].startswith("**") for name in times] == [False, True, False, False]


def test_a_curve_is_read_between_its_points():
    curve = [(0, 4.0), (10, 2.0), (20, 1.0)]
    assert [tables.loss_at(curve, s) for s in (0, 5, 12, 99)] == pytest.approx([4.0, 3.0, 1.8, 1.0])


@pytest.mark.parametrize(("end", "cell"), [(2.0, "3.000"), (1.0, "**2.500**")])
def test_the_loss_after_the_same_time_is_that_of_the_curve_when_the_original_ends(finished, end, cell):
    changed = document(finished)
    for row in changed["models"]:
        original = row["architecture"] == "original"
        ms = 1 if original else 2
        row["step_ms"] = {path: {"median_ms": ms, "p20_ms": ms, "p80_ms": ms} for path in row["step_ms"]}
        row["curve"] = [[0, 4.0, 0.0], [row["tokens"], 3.0 if original else end, 0.0]]
        row["losses"] = [3.0, 3.1] if original else [2.0, 2.1]
    original, *others = tables.steps(changed)["rows"]
    assert original[-3:] == [f"{TINY['tokens-per-step'] * 1000:,}", "3.000", "3.000"]
    assert {cell for row in others for cell in row[-2:]} == {cell}  # half of the way from 4 to `end`


@pytest.mark.parametrize(("worse", "place"), [(-0.1, 0), (0.1, -1)])
def test_the_ranking_is_by_the_losses(finished, worse, place):
    changed = document(finished)
    for row in changed["models"]:
        added = worse if row["architecture"] == plan.MODIFIED else 0
        row["losses"] = [2.0 + added, 2.1 + added * 1.001]
    for where in tables.compared_at(changed):
        row = tables.ranking(changed, *where)["rows"][place]
        assert row[0] == plan.MODIFIED and row[-1].startswith(f"**{worse:+.3f}")


def test_the_loss_after_two_characters_stands_beside_that_of_the_whole_context(finished):
    """It shows a model that has not learned to look back: it predicts no better from its whole context."""
    table = tables.positions(document(finished), 8, TINY["steps"])
    for name, *cells in table["rows"]:
        shown = dict(zip(table["columns"][1:], cells, strict=True))
        losses = {last: loss for _, last, loss, _ in tables.find(document(finished), 8, name)["positions"]}
        assert shown["2"].startswith(f"{losses[2]:.3f}") and shown["5 to 8"].startswith(f"{losses[8]:.3f}")


# The command


def test_it_runs_as_a_folder_from_any_directory(tmp_path):
    folder = harness.ROOT / "benchmarks" / "architecture_study"
    done = subprocess.run([sys.executable, folder, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--only-tables" in done.stdout, done.stderr


def test_a_study_leaves_a_page_with_its_tables_and_plots(finished):
    page = (finished / "architecture-study.md").read_text()
    linked = re.findall(r"\]\((architecture-study/[^)]+)\)", page)
    assert len(linked) == len(plots.PLOTS) == 5
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in linked)
    for table in (table for some in tables.all_tables(document(finished)).values() for table in some):
        assert tables.markdown(table) in page and all(len(row) == len(table["columns"]) for row in table["rows"])
    assert "no positions left" in page and "recomputed" in page
    with open(finished / "architecture-study" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.NAMES) * 3  # short runs of both sizes, long ones
    for row in rows:
        loss = float(row["loss"])
        assert float(row["loss_standard_error"]) >= 0 and row["seeds"] == "2"
        assert float(row["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)
        assert float(row["bits_per_character"]) == pytest.approx(loss / math.log(2), rel=1e-5)


def test_the_figures_are_those_of_the_runs(finished):
    found = document(finished)
    for row in found["models"]:
        of_run = (row[name] for name in ("architecture", "context", "window", "width", "steps", "learning_rate"))
        run = plan.Run(*of_run, seed=1)
        files = [finished / "runs" / f"{run._replace(seed=seed).name}.json" for seed in (1, 2)]
        assert row["losses"] == [json.loads(file.read_text())["measured"]["loss"] for file in files]
        step = min(time["median_ms"] for time in row["step_ms"].values())
        assert tables.seconds_at(row, row["tokens"]) == pytest.approx(row["steps"] * step / 1e3)
        assert row["curve"][-1][0] == row["tokens"]


def test_the_rates_of_a_search_are_those_of_its_runs_and_the_best_is_compared_with_other_seeds(finished):
    found = document(finished)
    for row in found["rates"]:
        assert len(row["losses"]) == (2 if row["steps"] == TINY["steps"] else 1)
        assert row["best"] == min(row["losses"], key=row["losses"].get)
        best = tables.find(found, 8, row["architecture"], steps=row["steps"])
        assert f"{best['learning_rate']:g}" == row["best"] and row["losses"][row["best"]][0] not in best["losses"]


def test_the_chosen_rate_of_each_search_is_bold(finished):
    found = document(finished)
    for row, (context, steps, name, *cells) in zip(found["rates"], tables.rates(found)["rows"], strict=True):
        assert (context, steps, name) == ("8", str(row["steps"]), row["architecture"])
        bold = [cell for cell in cells if cell.startswith("**")]
        assert bold == [f"**{row['losses'][row['best']][0]:.3f}**"]


def test_sentences_on_a_page_stay_and_unknown_parts_are_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "architecture-study", tmp_path / "architecture-study")
    page = tmp_path / "architecture-study.md"
    page.write_text("# Title\n\nA sentence.\n\n<!-- changes -->\nold\n<!-- end -->\n\nAnother.\n")
    only_tables = [*SMALL, "--only-tables", "--docs", str(tmp_path)]
    assert main(only_tables) == 0
    written = page.read_text()
    assert "A sentence." in written and "Another." in written and "old" not in written and "+ window" in written
    page.write_text("<!-- charts -->\n<!-- end -->\n")
    assert main(only_tables) == 1
    assert "the page has a part 'charts', wanted some of: ranking, changes" in capsys.readouterr().err


def test_the_published_page_is_what_the_command_writes_from_its_results(tmp_path):
    docs = harness.ROOT / "docs"
    shutil.copytree(docs / "architecture-study", tmp_path / "architecture-study")
    shutil.copy(docs / "architecture-study.md", tmp_path)
    assert main(["--device", "cpu", "--only-tables", "--docs", str(tmp_path)]) == 0
    for name in ("architecture-study.md", "architecture-study/compare.csv"):
        assert (tmp_path / name).read_text() == (docs / name).read_text()


def forbid(monkeypatch, *names):
    def forbidden(*arguments):
        raise AssertionError("measured again what was there")

    for name in names:
        monkeypatch.setattr(command, name, forbidden)


def test_a_second_start_measures_nothing_and_writes_the_same_page(finished, text, tmp_path, monkeypatch, capsys):
    forbid(monkeypatch, "train_and_measure", "copy_and_measure", "measure_speed")
    arguments = [*SMALL, "--data", text, "--out", str(finished), "--docs", str(tmp_path)]
    pages = []
    for more in ([], ["--only-tables"]):
        assert main([*arguments, *more]) == 0
        pages.append((tmp_path / "architecture-study.md").read_text())
    assert pages[0] == pages[1]
    assert document(tmp_path) == document(finished)
    assert "Context 8, 6 steps, equal width" in capsys.readouterr().out


def test_only_tables_needs_neither_the_runs_nor_the_text(finished, tmp_path):
    shutil.copytree(finished / "architecture-study", tmp_path / "architecture-study")
    assert main([*SMALL, "--data", "no-such-text", "--out", str(tmp_path), "--only-tables"]) == 0
    assert (tmp_path / "architecture-study.md").read_text() == (finished / "architecture-study.md").read_text()


def test_retime_measures_the_times_and_nothing_else(finished, text, tmp_path, monkeypatch):
    forbid(monkeypatch, "train_and_measure", "copy_and_measure")
    before = json.loads((finished / "runs" / "speed.json").read_text())["measured"]
    taken = []
    monkeypatch.setattr(command, "measure_speed", lambda *arguments: taken.append(arguments) or before)
    assert main([*SMALL, "--data", text, "--out", str(finished), "--docs", str(tmp_path), "--retime"]) == 0
    assert len(taken) == 1


def test_an_interrupted_study_resumes_where_it_stopped(finished, text, tmp_path, monkeypatch):
    arguments = [*SMALL, "--data", text, "--out", str(tmp_path)]
    train, trained = command.train_and_measure, []

    def interrupt(run, settings, data):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run)
        return train(run, settings, data)

    monkeypatch.setattr(command, "train_and_measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert {path.stem for path in (tmp_path / "runs").iterdir()} == {run.name for run in trained}
    study = Study(Settings(**flags_of(arguments)))
    assert trained[0] not in study.missing() and len(study.missing()) == len(study.runs()) - 3
    name = trained[1].name
    assert Store(tmp_path, study.store.about).read(name) == Store(finished, study.store.about).read(name)


def flags_of(arguments):
    """The fields of Settings that a command line gives."""
    pairs = zip(arguments[1::2], arguments[2::2], strict=True)  # after --quick
    return {"quick": True} | {
        name[2:].replace("-", "_"): int(value) if value.isdigit() else value for name, value in pairs
    }


def test_a_finished_run_of_other_settings_is_not_taken_for_one_of_these(finished, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, "--data", text, "--out", str(finished), "--tokens-per-step", "65"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.count("\n") == 1
    assert "holds a study with tokens_per_step 64 and not 65: choose another --out" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0, wanted at least 1"),
        (["--window-fraction", "1.5"], "window_fraction is 1.5, wanted more than 0 and at most 1"),
        (["--retime", "--only-tables"], "retime and only_tables are both given"),
        (["--only-tables"], "compare.json is missing: leave out --only-tables to measure first"),
        (["--context-size", "1"], "context_size is 1, wanted at least 2"),
        (["--context-size", "500"], "context 500 needs 2,001: give a longer text or a smaller --context-size"),
        (["--n-head", "3"], "n_head=3 does not divide d_model=16"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(text, tmp_path, capsys, arguments, message):
    out = tmp_path / "study"
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, "--data", text, "--out", str(out), *arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1
    assert message in shown.err and not Path(out).exists()

"""`python -m train.compare`: what is compared, what is measured, what is concluded, and how the command behaves."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig, generate
from train import compare
from train.compare import CompareConfig, Study, main
from train.data import TokenDataset, load_data
from train.study import claims, copying, plan, results, speed, training, uncertainty
from train.study.store import Store

TEXT = "When are you going? I am going to the play.\nAnd you are coming to the play with me.\n" * 40
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
    """The directory of a study that has ended."""
    out = tmp_path_factory.mktemp("study")
    assert main([*SMALL, "--data", text, "--out", str(out)]) == 0
    return out


def settings_and_design(**changes):
    config = CompareConfig(device="cpu", **changes)
    return config.settings(), config.design()


def document(directory):
    return json.loads((directory / "architecture-study" / "compare.json").read_text())


# What is compared


def test_a_model_that_both_readings_ask_for_is_one_run():
    settings, design = settings_and_design()
    runs = plan.all_runs(settings, design, vocab_size=76)
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    for context in (25, 256):
        compared = plan.compared(settings, design, 76, context)
        assert compared["equal width", "original"] == compared["equal parameters", "original"]
        assert all(run._replace(seed=seed) in runs for run in compared.values() for seed in range(3))


@pytest.mark.parametrize("context", [25, 256])
def test_equal_parameters_are_nearly_equal_and_equal_widths_are_not(context):
    settings, design = settings_and_design()
    counts = {
        (reading, name): plan.count_parameters(
            plan.model_config(name, settings, vocab_size=76, context=context, window=run.window, width=run.width)
        )
        for (reading, name), run in plan.compared(settings, design, 76, context).items()
    }
    wanted = counts["equal width", "original"]
    for name in plan.NAMES:
        assert counts["equal parameters", name] == pytest.approx(wanted, rel=0.06)
    assert counts["equal width", "multi-query"] < 0.9 * wanted


def test_parameters_are_counted_as_a_model_has_them():
    settings, _ = settings_and_design()
    config = plan.model_config("multi-query", settings, vocab_size=76, context=25, window=10, width=68)
    assert plan.count_parameters(config) == GPT(config).num_parameters()
    assert config.n_kv_head == 1 and config.head_dim == 17 and config.rotated == 16


def test_windows_are_fractions_of_the_context():
    settings, design = settings_and_design()
    assert [run.window for run in plan.windows(settings, design, 25)] == [2, 5, 10, 25]
    assert [run.window for run in plan.windows(settings, design, 256)] == [26, 51, 102, 256]


# What is measured


def test_a_run_gives_the_same_figures_every_time_and_others_with_another_seed(text):
    sizes = {name.replace("-", "_"): value for name, value in TINY.items()}
    study = Study(CompareConfig(data=text, device="cpu", quick=True, out="never-written", **sizes), command="")
    run = study.runs[3]
    first, second = (training.train_and_measure(run, study.settings, study.data) for _ in range(2))
    assert first == second
    other = training.train_and_measure(run._replace(seed=1), study.settings, study.data)
    assert other["loss"] != first["loss"] and other["curve"] != first["curve"]
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert first["bits_per_character"] == pytest.approx(first["loss"] / math.log(2))
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
    assert times["a"] == {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "count": 5}


def test_a_cache_grows_with_the_text_only_without_a_window():
    shape = dict(vocab_size=17, context_length=8, n_layer=2, n_head=2, n_kv_head=1, d_model=16)
    a_position = 2 * 2 * 8 * 4  # keys and values, layers, elements of the one KV head, bytes
    assert results.cache_bytes(GPTConfig(**shape, window=4), 4000) == 4 * a_position
    assert results.cache_bytes(GPTConfig(**shape), 4000) == 4000 * a_position
    assert results.cache_bytes(GPTConfig(**shape, positions="learned"), 4000) == 8 * a_position


# What a window cannot do


@pytest.mark.parametrize("kind", copying.DISTANCES)
@pytest.mark.parametrize("architecture", copying.ARCHITECTURES)
def test_the_letter_reaches_the_answer_unless_it_is_out_of_the_windows_reach(architecture, kind):
    distance = copying.DISTANCES[kind]
    model = GPT(copying.model_config(architecture, distance), seed=0).eval()
    texts = torch.stack([copying.CopyingTexts(1, distance, seed=0).x[0]] * copying.LETTERS)
    texts[:, 0] = torch.arange(copying.LETTERS)
    with torch.no_grad():
        answers = model(texts)[0][:, -1]
    same = bool((answers == answers[0]).all())
    assert same == (architecture == plan.MODIFIED and kind == "out of reach")


@pytest.mark.parametrize("architecture", copying.ARCHITECTURES)
def test_within_a_window_every_architecture_learns_to_copy(architecture):
    settings, _ = settings_and_design()
    run = copying.CopyRun(architecture, distance=3, seed=0)
    assert copying.copy_and_measure(run, settings, steps=120)["accuracy"] > 0.95


# What is concluded


def test_an_interval_over_three_seeds_is_students():
    found = uncertainty.difference([2.0, 2.1, 2.3], [1.9, 2.1, 2.1])
    assert found.mean == pytest.approx(0.1) and found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3) and found.sign == 0
    assert uncertainty.difference([1.0, 1.1, 1.2], [2.0, 2.1, 2.21]).sign == -1
    assert uncertainty.estimate([2.0]).sign == 0  # one seed proves nothing
    assert uncertainty.estimate([2.0]).as_dict() == {
        "mean": 2.0, "standard_error": None, "margin": None, "sign": 0, "seeds": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [
        ({"a": 1, "b": 1}, "holds"),
        ({"a": -1}, "does not hold"),
        ({"a": 0, "b": 0}, "cannot be told"),
        ({"a": 1, "b": -1}, "depends: a yes, b no"),
        ({"a": 1, "b": 0}, "depends: a yes, b not told apart"),
    ],
)
def test_a_verdict_is_as_clear_as_what_was_found(signs, verdict):
    assert claims.verdict(signs) == verdict


def test_a_time_is_shorter_only_where_the_spreads_do_not_overlap():
    quick, slow, vague = ({"p20_ms": a, "p80_ms": b} for a, b in ((1.0, 1.2), (1.3, 1.5), (1.1, 1.4)))
    assert claims.faster(quick, slow) == 1 and claims.faster(slow, quick) == -1 and claims.faster(quick, vague) == 0


def test_a_curve_is_read_between_its_points():
    curve = [{"seconds": s, "loss": {"mean": loss}} for s, loss in ((0, 4.0), (10, 2.0), (20, 1.0))]
    assert [claims.loss_at(curve, s) for s in (0, 5, 12, 99)] == pytest.approx([4.0, 3.0, 1.8, 1.0])


@pytest.mark.parametrize(("worse", "verdict"), [(-0.1, "holds"), (0.1, "does not hold")])
def test_the_first_claim_is_judged_by_the_losses(finished, worse, verdict):
    changed = document(finished)
    for row in changed["models"]:
        if row["architecture"] == plan.MODIFIED:
            losses = [loss + worse for loss in (2.0, 2.1)]
            row["minus_original"] = uncertainty.difference(losses, [2.0, 2.1]).as_dict()
    assert claims.better_loss(changed, 8)["verdict"] == verdict


@pytest.mark.parametrize(("whole", "remarks"), [(2.3, 0), (2.5, 1)])
def test_a_model_that_does_not_look_back_yet_is_remarked_on(whole, remarks):
    bins = [{"first": 2, "last": 2, "loss": {"mean": 2.4}}, {"first": 3, "last": 8, "loss": {"mean": whole}}]
    found = claims.not_looking_back({"architecture": "original", "loss_by_position": bins}, context=8)
    assert len(found) == remarks and all("has not begun to look back" in remark for remark in found)


# The command


def test_a_study_leaves_a_page_with_its_tables_and_plots(finished):
    page = (finished / "architecture-study.md").read_text()
    linked = re.findall(r"\]\((architecture-study/[^)]+)\)", page)
    assert len([name for name in linked if name.endswith(".png")]) == 5 and len(linked) == 7
    assert all((finished / name).stat().st_size > 0 for name in linked)
    for claim in document(finished)["claims"]:
        assert f"| {claim['claim']} | **{claim['verdict']}** | {claim['found']} |" in page
    assert "no positions left" in page and "recomputed" in page
    with open(finished / "architecture-study" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.NAMES) * len(plan.READINGS)
    assert all(float(row["loss_standard_error"]) >= 0 and row["seeds"] == "2" for row in rows)


def test_the_figures_are_those_of_the_runs(finished):
    for row in document(finished)["models"]:
        run = plan.Run(row["architecture"], 8, row["window"], row["width"], 4e-3, 0)
        losses = []
        for seed in range(2):
            kept = json.loads((finished / "runs" / f"{run._replace(seed=seed).name}.json").read_text())
            losses.append(kept["measured"]["loss"])
        assert row["loss_by_seed"] == losses and row["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        step = row["step_ms"][row["path"]]["median_ms"]
        assert row["seconds"] == pytest.approx(TINY["steps"] * step / 1e3)
        assert row["curve"][-1]["seconds"] == pytest.approx(row["seconds"])


def forbid(monkeypatch, *names):
    def forbidden(*arguments):
        raise AssertionError("measured what was there")

    for name in names:
        monkeypatch.setattr(compare, name, forbidden)


def test_a_second_start_measures_nothing_and_writes_the_same_page(finished, text, tmp_path, monkeypatch, capsys):
    forbid(monkeypatch, "train_and_measure", "copy_and_measure", "measure_speed")
    command = [*SMALL, "--data", text, "--out", str(finished)]
    pages = []
    for more in ([], ["--page-only"]):
        assert main([*command, "--docs", str(tmp_path), *more]) == 0
        pages.append((tmp_path / "architecture-study.md").read_text())
    assert pages[0] == pages[1]
    assert (tmp_path / "architecture-study" / "compare.json").exists()
    assert "It costs little size: HOLDS" in capsys.readouterr().out


def test_retime_measures_the_times_and_nothing_else(finished, text, tmp_path, monkeypatch):
    forbid(monkeypatch, "train_and_measure", "copy_and_measure")
    before = json.loads((finished / "runs" / "speed.json").read_text())["measured"]
    taken = []
    monkeypatch.setattr(compare, "measure_speed", lambda *arguments: taken.append(arguments) or before)
    assert main([*SMALL, "--data", text, "--out", str(finished), "--docs", str(tmp_path), "--retime"]) == 0
    assert len(taken) == 1


def test_an_interrupted_study_goes_on_where_it_stopped(finished, text, tmp_path, monkeypatch):
    command = [*SMALL, "--data", text, "--out", str(tmp_path)]
    train, trained = compare.train_and_measure, []

    def interrupt(run, settings, data):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run)
        return train(run, settings, data)

    monkeypatch.setattr(compare, "train_and_measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert {path.stem for path in (tmp_path / "runs").iterdir()} == {run.name for run in trained}
    study = Study(CompareConfig(**flags_of(command)), "")
    assert trained[0] not in study.missing and len(study.missing) == len(study.runs) - 3
    name = trained[1].name
    assert Store(tmp_path, study.store.about).read(name) == Store(finished, study.store.about).read(name)


def flags_of(command):
    """The fields of CompareConfig that a command states."""
    pairs = zip(command[1::2], command[2::2], strict=True)  # after --quick
    return {"quick": True} | {
        name[2:].replace("-", "_"): int(value) if value.isdigit() else value for name, value in pairs
    }


def test_a_finished_run_of_other_settings_is_not_taken_for_one_of_these(finished, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SMALL, "--data", text, "--out", str(finished), "--steps", "7"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.count("\n") == 1
    assert "holds a study with steps 6 and not 7: choose another --out" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0, wanted at least 1"),
        (["--window-fraction", "1.5"], "window_fraction is 1.5, wanted more than 0 and at most 1"),
        (["--retime", "--page-only"], "retime and page_only are both given"),
        (["--page-only"], "lacks 21 of 21 runs or the times: leave out --page-only"),
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

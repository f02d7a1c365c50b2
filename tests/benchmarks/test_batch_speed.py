"""The ways to write many prompts must agree before they are timed."""

import contextlib
import json

import batch_speed
import pytest

from model import GPT, GPTConfig

CONFIG = GPTConfig(**{**batch_speed.MODEL["cpu"], "n_layer": 1, "d_model": 32, "n_head": 4, "window": 8})
WORK = batch_speed.Work([[1, 2, 3], [4], [5] * 20, [6, 7]], [6, 12, 3, 9])


@pytest.mark.parametrize("name", batch_speed.CONTESTANTS)
def test_every_way_writes_the_same_texts(name):
    if name == "transformers":
        pytest.importorskip("transformers", minversion="5.4")
    with contextlib.ExitStack() as stack:
        write, reason = batch_speed.checked(
            name, batch_speed.CONTESTANTS[name], GPT(CONFIG, seed=0).eval(), WORK, 1e-4, stack
        )
    assert reason is None and write is not None


@pytest.mark.parametrize(
    "change, wanted",
    [
        (lambda texts: texts[1].pop(), "text 1 has 11 tokens, expected 12"),
        (lambda texts: texts[2].__setitem__(1, (texts[2][1] + 1) % 65), "token 1 of text 2 is"),
    ],
)
def test_a_way_that_writes_another_text_is_not_timed(change, wanted):
    def wrong(model, work, batch):
        texts = batch_speed.ours(model, work, batch)
        change(texts)
        return texts

    write, reason = batch_speed.checked("wrong", wrong, GPT(CONFIG, seed=0).eval(), WORK, 1e-4, None)
    assert write is None and wanted in reason


def test_lengths_are_mixed_and_the_same_every_time():
    work = batch_speed.make_work(CONFIG, 256)
    assert work == batch_speed.make_work(CONFIG, 256)
    for lengths in (sorted(map(len, work.prompts)), sorted(work.counts)):
        assert lengths[0] < 20 < 30 < lengths[128] < 80 < 250 < lengths[-1] <= batch_speed.LONGEST


def test_after_the_deadline_nothing_begins_and_what_is_missing_is_named(capsys, tmp_path):
    file = tmp_path / "document.json"
    flags = ["--prompts", "3", "--batch-sizes", "2", "--n-layer", "1", "--d-model", "32", "--device", "cpu"]
    flags += ["--only", "one by one", "ours", "--plot", "none", "--json", str(file)]
    assert batch_speed.main([*flags, "--deadline", "1e-9"]) == 0
    document = json.loads(file.read_text())
    assert document["rows"] == [] and document["left_out"] == [
        "one by one, all (no time was left)",
        "ours, batch 2 (no time was left)",
    ]
    assert batch_speed.main([*flags, "--deadline", "60", "--seconds", "0.1"]) == 0
    document = json.loads(file.read_text())
    assert document["left_out"] == [] and all(row["x_one_by_one"] > 0 for row in document["rows"])


@pytest.mark.parametrize("flags", [["--prompts", "0"], ["--batch-sizes", "0"]])
def test_a_number_below_one_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        batch_speed.main([*flags, "--device", "cpu"])
    assert "--prompts and --batch-sizes must be at least 1" in capsys.readouterr().err

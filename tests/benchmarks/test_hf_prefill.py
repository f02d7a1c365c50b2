import json

import pytest

pytest.importorskip("transformers")

import hf_prefill

from model.huggingface import attention


@pytest.fixture
def run(capsys, tmp_path):
    def run(*arguments):
        file = tmp_path / "document.json"
        common = ["--device", "cpu", "--plot", "none", "--seconds", "0.1", "--json", str(file)]
        status = hf_prefill.main([*arguments, *common])
        return status, json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_every_attention_is_checked_and_timed(run):
    status, document, shown = run("--lengths", "80", "300", "--window", "9", "--batch-size", "2")
    assert status == 0 and "window 9" in shown
    assert [row["contestant"] for row in document["rows"]] == list(hf_prefill.CONTESTANTS) * 2
    for row in document["rows"]:
        assert row["error"] <= 2e-4 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["peak_mb"] > 0
        assert row["tokens"] == 2 * row["length"]
    ours, _, eager = (row["peak_mb"] for row in document["rows"][3:])
    assert ours < eager  # which makes scores and a mask of T x T


def test_an_attention_that_is_wrong_is_not_timed(run, monkeypatch):
    right = attention.sliding_gqa_attention
    monkeypatch.setattr(
        attention, "sliding_gqa_attention", lambda q, k, v, window, **o: right(q, k, v, window - 1, **o)
    )
    status, document, shown = run("--lengths", "40", "--window", "9")
    assert status == 1 and "FAILED: ours (sliding_gqa) at 1 x 40: failed the check: results differ by" in shown
    assert "median_ms" not in document["rows"][0] and "median_ms" in document["rows"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--window", "0"], "--window is 0, wanted at least 1"), (["--only", "flash"], "--only names 'flash'")],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        hf_prefill.main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1

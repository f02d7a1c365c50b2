import json

import pytest

pytest.importorskip("transformers")

import hf_encoder

from model.huggingface import attention


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    for name, value in {"hidden_size": 48, "intermediate_size": 64, "initializer_range": 0.2}.items():
        monkeypatch.setitem(hf_encoder.SIZES, name, value)

    def run(*arguments):
        file = tmp_path / "document.json"
        common = ["--device", "cpu", "--plot", "none", "--seconds", "0.1", "--json", str(file)]
        status = hf_encoder.main([*arguments, *common])
        return status, json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_both_passes_are_checked_and_timed(run):
    status, document, shown = run("--lengths", "40", "90", "--local-attention", "16", "--batch-size", "2")
    assert status == 0 and "ModernBERT of 3 layers, local attention 16, fwd+bwd" in shown
    assert [row["contestant"] for row in document["rows"]] == list(hf_encoder.CONTESTANTS) * 4
    assert [row["pass"] for row in document["rows"]] == ["fwd"] * 4 + ["fwd+bwd"] * 4
    for row in document["rows"]:
        assert row["error"] <= 2e-4 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["peak_mb"] > 0
        assert row["tokens"] == 2 * row["length"]


@pytest.mark.parametrize("passes", ["fwd", "fwd+bwd"])
def test_a_window_that_is_wrong_is_not_timed(run, monkeypatch, passes):
    monkeypatch.setitem(attention.ENCODERS, "modernbert", 1)
    status, document, shown = run("--lengths", "40", "--local-attention", "16", "--passes", passes)
    assert status == 1 and f"FAILED: ours (sliding_gqa) at 1 x 40, {passes}: failed the check: results differ" in shown
    assert "median_ms" not in document["rows"][0] and "median_ms" in document["rows"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "--layers is 0, wanted at least 1"),
        (["--local-attention", "0"], "--local-attention is 0, wanted at least 1"),
        (["--only", "flash"], "--only names 'flash'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        hf_encoder.main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1

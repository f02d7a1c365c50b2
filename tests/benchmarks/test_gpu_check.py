import json
import subprocess
import sys

import gpu_check
import harness
import pytest
import torch
from gpu_check import Step

FACTS = {"device": "cuda", "name": "Some Card 80GB"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    command = [sys.executable, "benchmarks/gpu_check.py", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: no GPU") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"torch": "2.10.1", "triton": "3.7.1"}, "torch >= 2.11 is needed, this is 2.10.1"),
        ({"torch": "2.11.0+cu128", "triton": "3.5.0"}, "triton >= 3.6 is needed, this is 3.5.0"),
        ({"torch": "2.13.0", "triton": None}, "triton >= 3.6 is needed, and it is not installed"),
    ],
)
def test_packages_that_are_too_old_are_named(monkeypatch, found, message):
    monkeypatch.setattr(harness, "version", found.get)
    assert gpu_check.why_not() == message


def python(code):
    return ["-c", code]


DOCUMENT = '{"benchmark": "a", "machine": {"name": "b"}, "rows": [{"median_ms": 1}, {"not_timed": "x"}], "failed": []}'


def test_every_step_is_written_down(tmp_path, capsys):
    steps = [
        Step("good", python("print('3 passed in 1 s')"), 1),
        Step("bad", python("print('1 failed'); raise SystemExit(1)"), 1),
        Step("measured", python(f"import sys; print('head'); open(sys.argv[-1], 'w').write({DOCUMENT!r})"), 1, True),
        Step("no document", python("print('oh')"), 1, True),
    ]
    path = tmp_path / "results" / "some-card.json"
    assert gpu_check.check(FACTS, steps, path, limit=60) == 1
    result = json.loads(path.read_text())
    assert result["machine"] == FACTS
    assert [(step["name"], step["status"]) for step in result["steps"]] == [
        ("good", "passed"), ("bad", "failed"), ("measured", "passed"), ("no document", "failed"),
    ]  # fmt: skip
    assert result["documents"] == {"measured": json.loads(DOCUMENT)}
    assert result["steps"][0]["summary"] == "3 passed in 1 s"
    assert result["steps"][2]["summary"] == "1 of 2 rows timed; 0 failed"
    assert result["steps"][1]["tail"] == ["1 failed"] and "tail" not in result["steps"][0]
    assert "bad" in capsys.readouterr().out


def test_a_step_that_hangs_is_stopped_and_the_next_one_runs(tmp_path):
    steps = [
        Step("hangs", python("import time; print('so far', flush=True); time.sleep(60)"), 1),
        Step("good", python("print('fine')"), 100),
    ]
    path = tmp_path / "card.json"
    assert gpu_check.check(FACTS, steps, path, limit=60) == 1
    hangs, good = json.loads(path.read_text())["steps"]
    assert hangs["status"] == "timed out" and hangs["seconds"] < 20 and hangs["tail"] == ["so far"]
    assert good["status"] == "passed"


def test_all_is_well_when_all_steps_pass(tmp_path):
    assert gpu_check.check(FACTS, [Step("good", python("pass"), 1)], tmp_path / "card.json", 60) == 0


def test_the_interpreter_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done, _ = gpu_check.run_step(Step("s", python("import os; print(os.environ.get('TRITON_INTERPRET'))"), 1), 60)
    assert done["summary"] == "None"


def test_steps_run_what_exists_and_fit_into_ten_minutes():
    assert gpu_check.LIMIT_SECONDS < 600
    for step in gpu_check.STEPS:
        assert step.arguments[0] == "-m" or (harness.ROOT / step.arguments[0]).is_file()


def test_cards_have_file_names():
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"

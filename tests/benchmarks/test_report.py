import copy
import json

import pytest
import report

MACHINE = {
    "device": "cpu",
    "name": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "abc1234",
    "date": "2030-01-01",
}
DOCUMENT = {
    "benchmark": "attn_speed",
    "command": "python benchmarks/attn_speed.py --quick",
    "machine": MACHINE,
    "settings": {"dtype": "fp32", "model": {"n_layer": 1}},
    "rows": [],
    "tables": [
        {
            "title": "Attention, fwd",
            "columns": ["shape", "contestant", "ms"],
            "rows": [["64, W 8", "ours", "1.00 (0.9-1.1)"], ["64, W 8", "a|b", "3.00 (2.9-3.1)"]],
            "notes": ["flash-attn was not timed: flash-attn is not installed"],
        }
    ],
    "plots": [{"title": "t", "x": "T", "y": "ms", "series": {"ours": [[64, 1.0], [128, 2.0]]}}],
    "failed": [],
}


def page_of(tmp_path, **files):
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    for name, content in files.items():
        (results / f"{name}.json").write_text(json.dumps(content))
    assert report.main(["--docs", str(tmp_path)]) == 0
    return (tmp_path / "benchmarks.md").read_text()


def on_a_gpu(document, **changes):
    return {**copy.deepcopy(document), "machine": {**MACHINE, "device": "cuda", "name": "Some Card"}, **changes}


def test_the_page_has_tables_plots_and_commands(tmp_path):
    page = page_of(tmp_path, cpu=DOCUMENT)
    assert "## Some CPU (CPU: no figure below is a GPU's)" in page
    assert "`python benchmarks/attn_speed.py --quick`" in page and "commit abc1234" in page and "dtype fp32" in page
    assert "| 64, W 8 | ours | 1.00 (0.9-1.1) |" in page and "|---|---|---:|" in page
    assert "|  | a\\|b | 3.00 (2.9-3.1) |" in page
    assert "- flash-attn was not timed" in page
    assert "![Attention](results/cpu.png)" in page
    assert (tmp_path / "results" / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_result_there_is_no_gpu_row(tmp_path):
    page = page_of(tmp_path, cpu=DOCUMENT)
    gpus = page[page.index("## GPUs") : page.index("## Some CPU")]
    assert "There is no result of a GPU yet" in gpus and "|" not in gpus


def test_rows_stand_under_the_device_they_were_measured_on(tmp_path):
    page = page_of(tmp_path, cpu=DOCUMENT, card=on_a_gpu(DOCUMENT, command="python on the card"))
    assert "There is no result of a GPU yet" not in page
    card = page[page.index("## Some Card (GPU)") : page.index("## Some CPU")]
    assert "python on the card" in card and "attn_speed.py --quick" not in card


def test_a_check_of_a_card_shows_its_steps_and_its_documents(tmp_path):
    steps = [{"name": "tests that need a GPU", "status": "failed", "seconds": 12.3, "summary": "1 failed"}]
    check = {"benchmark": "gpu_check", "command": "c", "machine": on_a_gpu(DOCUMENT)["machine"], "steps": steps}
    page = page_of(tmp_path, card={**check, "documents": {"attn_speed": on_a_gpu(DOCUMENT)}})
    assert page.count("| tests that need a GPU | failed | 12 | 1 failed |") == 1
    assert "![Attention](results/card-attn_speed.png)" in page


def test_modelled_figures_have_their_own_page_and_are_said_to_be_a_models(tmp_path):
    modelled = on_a_gpu(DOCUMENT, benchmark="kernel_report", modelled=True)
    page = page_of(tmp_path, kernels=modelled, cpu=DOCUMENT)
    assert "## Some Card (GPU)" not in page and "There is no result of a GPU yet" in page
    assert "kernel_report" not in page and "(kernel-report.md)" in page
    modelled_page = (tmp_path / "kernel-report.md").read_text()
    assert "nothing on this page was run on a GPU" in modelled_page and "kernel_report" in modelled_page
    assert "    registers   of a thread\n" in modelled_page  # the meaning of the columns


def test_what_failed_is_on_the_page(tmp_path):
    assert "**Failed: ours at 64: wrong**" in page_of(tmp_path, cpu={**DOCUMENT, "failed": ["ours at 64: wrong"]})


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "x"}', '{"benchmark": "gpu_check"}'])
def test_a_file_that_is_not_a_result_is_named(tmp_path, capsys, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "odd.json").write_text(content)
    assert report.main(["--docs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "odd.json is not a result of a benchmark" in error and error.count("\n") == 1


def test_nothing_to_report_says_how_to_get_something(tmp_path, capsys):
    assert report.main(["--docs", str(tmp_path)]) == 2
    assert "run a benchmark with --json" in capsys.readouterr().err

"""One clear line for wrong input, closed pipes, full outputs and an early Ctrl-C; help that a newcomer can read."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from kill_and_resume import TEXT

from model import GPT, GPTConfig, from_pretrained, save_pretrained
from model.command import Parser, command_output
from train import CharDataset, Trainer, TrainerConfig
from train.__main__ import main
from train.config import GROUPS, RENAMED, RunConfig, add_flags
from train.metrics import ProgressBar, sample_text

ROOT = Path(__file__).parents[2]
SIZES = "--context-size 16 --window 8 --n-layer 1 --n-head 2 --n-kv-head 1 --d-model 16 --batch-size 2 --device cpu"
FAST = [*SIZES.split(), "--eval-examples", "4", "--max-steps", "2"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "seed is -1, wanted at least 0"),
        (["--seed", str(2**64)], "seed is 18446744073709551616, wanted at most 2**63 - 1"),
        (["--learning-rate", "inf"], "learning_rate is inf, wanted a finite number"),
        (["--weight-decay", "nan"], "weight_decay is nan, wanted a finite number"),
        (["--betas", "nan", "0.9"], "betas is nan, wanted a finite number"),
        (["--data", ""], "data is an empty text"),
        (["--val-data", ""], "val_data is an empty text"),
        (["--out-dir", ""], "out_dir is an empty text"),
        (["--init-from="], "init_from is an empty text"),
        (["--tokenizer", __file__], "test_rough_edges.py is no .json file: give a tokenizer.json"),
        (["--no-fused-kernels", "--backend", "banded"], "leave out --no-fused-kernels"),
        (["--n-embd", "8"], "--n-embd is called --d-model here"),
        (["--block_size=8"], "--block-size is called --context-size here"),
        (["--grad-norm-clip", "1"], "--grad-norm-clip is called --grad-clip here"),
        (["--batch-size", str(10**9)], "take a smaller batch_size (with grad_accumulation"),
        (["--n-layer", str(10**9)], "left: take a smaller model"),
        (["--d-model", str(10**7)], "left: take a smaller model"),
    ],
)
def test_wrong_input_is_one_line(text, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main([*FAST, "--data", text, "--out-dir", str(tmp_path / "run"), *flags])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_the_words_of_mingpt_and_nanogpt_name_ours():
    fields = {*RunConfig.__dataclass_fields__, *TrainerConfig.__dataclass_fields__}
    assert set(RENAMED.values()) <= fields and not fields & RENAMED.keys()
    for old, new in (("grad_norm_clip", "grad_clip"), ("ckpt_path", "out_dir"), ("max_iters", "max_steps")):
        with pytest.raises(TypeError, match=f"^TrainerConfig has no {old}: it is called {new} here$"):
            TrainerConfig(**{old: 1})
    with pytest.raises(ValueError, match="max_steps is '9', expected int"):
        TrainerConfig(max_steps="9")


def test_help_shows_the_flags_to_begin_with_first_and_each_flag_once():
    parser = Parser(prog="train")
    add_flags(parser, (RunConfig, TrainerConfig), GROUPS)
    shown = parser.format_help()
    flags = re.findall(r"^  --([a-z-]+)", shown, re.MULTILINE)
    fields = [*RunConfig.__dataclass_fields__, *TrainerConfig.__dataclass_fields__]
    assert sorted(flags) == sorted(name.replace("_", "-") for name in fields)
    assert flags[:3] == ["data", "out-dir", "resume"] and len(next(iter(GROUPS.values())).split()) == 10
    assert not re.search(r"\(none: [^)]*\)\s+\(default:\s+none\)", shown)


def test_window_none_sees_all_keys(text, tmp_path):
    assert main([*FAST, "--data", text, "--window", "none", "--out-dir", str(tmp_path / "run")]) == 0
    config = from_pretrained(tmp_path / "run" / "best")[0].config
    assert config.window is None and config.n_kv_head == 1


def test_a_vocabulary_that_lacks_a_character_names_the_text(text, tmp_path, capsys):
    assert main([*FAST, "--data", text, "--out-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "other.txt").write_text(TEXT + "Z" * 400)
    for flags in (["--init-from", str(tmp_path / "run")], ["--tokenizer", str(tmp_path / "run" / "best")]):
        with pytest.raises(SystemExit):
            main(["--data", str(tmp_path / "other.txt"), "--context-size", "16", *flags])
        assert f"data {tmp_path / 'other.txt'}: 'Z' not in the vocabulary" in capsys.readouterr().err


def test_a_sample_draws_only_what_the_tokenizer_can_decode(monkeypatch):
    """A model may have more tokens: people pad the vocabulary to a multiple of 64."""
    dataset, given = CharDataset(TEXT, 16), {}
    monkeypatch.setattr("train.metrics.generate", lambda *arguments, **named: given.update(named) or [])
    sizes = {"context_length": 16, "n_layer": 1, "n_head": 1, "d_model": 8}
    list(sample_text(GPT(GPTConfig(vocab_size=64, **sizes)), dataset.tokenizer, 5, 0))
    assert given["tokenizer"] is dataset.tokenizer


def test_no_sample_is_written_where_none_is_wanted(text, tmp_path, capsys):
    assert main([*FAST, "--data", text, "--sample-tokens", "0", "--out-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "characters by" not in shown and "---" not in shown and "python -m model.sample" in shown


def test_the_first_lines_say_what_dropout_does_and_the_memory_is_that_of_a_resumed_run(text, tmp_path, capsys):
    dropout = ["--dropout", "0.1", "--data", text, "--out-dir", str(tmp_path / "run")]
    assert main([*FAST, *dropout]) == 0
    first = capsys.readouterr()
    assert "plain PyTorch in training, which --dropout needs" in first.out and "warning" not in first.err
    assert "cpu, 1 thread, " in first.out
    assert main(["--resume", "--max-steps", "3", "--out-dir", str(tmp_path / "run")]) == 0
    memory = [re.search(r"^memory .*$", shown, re.MULTILINE)[0] for shown in (first.out, capsys.readouterr().out)]
    assert memory[0] == memory[1]


def test_a_warning_is_one_line_and_comes_once(text, tmp_path, capsys):
    assert main([*FAST, "--data", text, "--save-every", "1", "--out-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "last" / "training_state.pt").write_bytes(b"")
    capsys.readouterr()
    assert main(["--resume", "--max-steps", "3", "--out-dir", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "training_state.pt" in line]
    assert len(lines) == 1 and lines[0].strip().startswith("python -m train: warning: ")
    with command_output("program"):
        for _ in range(2):
            warnings.warn("one\ntwo", stacklevel=1)
    assert capsys.readouterr().err.strip() == "program: warning: one two"


def shell(line, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **settings)


@pytest.mark.parametrize(
    "ending", ["| head -3", "2>&1 | head -1", "> /dev/full", "2> /dev/full", ">&-", "<&- >&- 2>&-"]
)
def test_a_run_goes_on_when_nobody_can_read_what_it_prints(text, tmp_path, ending):
    flags = " ".join([*FAST, "--data", text, "--out-dir", str(tmp_path / "run")])
    done = shell(f"$PYTHON -m train {flags} {ending}")
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "run" / "last" / "SHA256SUMS").exists()
    assert ("standard output cannot be written: No space left" in done.stderr) == (ending == "> /dev/full")


def test_a_result_that_nobody_reads_ends_quietly_and_one_that_is_lost_with_status_1(text, tmp_path):
    assert main([*FAST, "--data", text, "--out-dir", str(tmp_path / "run")]) == 0
    command = f"$PYTHON -m train.evaluate --checkpoint {tmp_path / 'run'}"
    for ending, status in (("| head -c 10", 0), (">&-", 0), ("2>&-", 0), ("> /dev/full", 1)):
        done = shell(f"{command} {ending}")
        assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr
        assert ("held-out part" in done.stdout) == (ending == "2>&-")
    assert "python -m train.evaluate: standard output cannot be written: No space left on device" in done.stderr


def test_the_file_that_is_opened_next_does_not_get_the_messages_of_a_closed_stream():
    code = (
        "import os; from model.command import command_output as o; o('x').__enter__(); os.write(3, b'%d' % os.dup(0))"
    )
    done = shell(f'exec 3>&1 <&- >&- 2>&-; "$PYTHON" -c "{code}"')
    assert int(done.stdout) > 3


@pytest.mark.parametrize(
    ("ending", "status"), [("> /dev/full", 1), ("2> /dev/full", 0), (">&-", 0), ("| head -c 1", 1)]
)
def test_an_export_is_whole_when_nobody_can_read_what_it_prints(text, tmp_path, ending, status):
    assert main([*FAST, "--data", text, "--out-dir", str(tmp_path / "run")]) == 0
    done = shell(f"$PYTHON -m model.huggingface export {tmp_path / 'run'} {tmp_path / 'theirs'} {ending}")
    assert done.returncode in (0, status) and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "theirs" / "model.safetensors").exists()
    assert "standard output cannot be written" in done.stderr or ending != "> /dev/full"


@pytest.mark.parametrize("module", ["train", "train.evaluate", "model.huggingface"])
@pytest.mark.parametrize("seconds", [0.2, 0.7])
def test_ctrl_c_in_the_first_second_shows_no_traceback(text, module, seconds, tmp_path):
    flags = ["export", ".", "out"] if module == "model.huggingface" else ["--checkpoint", "."]
    flags = [*FAST, "--data", text, "--out-dir", str(tmp_path / "run")] if module == "train" else flags
    process = subprocess.Popen([sys.executable, "-m", module, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]


def test_the_time_that_is_left_counts_steps_and_evaluations(capsys):
    with ProgressBar(100, eval_every=30) as bar:
        bar.evaluation_seconds = 4.0
        bar.add_step(50.0)  # compiles
        bar.forecast(False)
        assert not bar.seconds_left and capsys.readouterr().out == ""
        for _ in range(3):
            bar.add_step(1.0)
            bar.forecast(False)
        assert bar.seconds_left == 96 * 1.0 + 4 * 4.0
        bar.evaluation_seconds = 5.0
        for _ in range(3):
            bar.forecast(True)
        left = (bar.total - bar.n) / bar.format_dict["rate"]
    assert left == pytest.approx(96 * 1.0 + 4 * 5.0)
    assert re.findall("about .* evaluation", capsys.readouterr().out) == [
        "about 1 min 53 s left: 1,000 ms a step, 4.0 s an evaluation",
        "about 1 min 56 s left: 1,000 ms a step, 5.0 s an evaluation",
    ]


def test_the_weights_of_a_padded_vocabulary_train(tmp_path):
    dataset = CharDataset(TEXT, 16)
    model = GPT(GPTConfig(vocab_size=64, context_length=16, n_layer=1, n_head=1, d_model=8), seed=0)
    settings = TrainerConfig(max_steps=2, out_dir=tmp_path / "run", sample_tokens=0, device="cpu")
    Trainer(model, dataset, dataset, settings).train()
    loaded, tokenizer = from_pretrained(tmp_path / "run" / "best")
    assert loaded.config.vocab_size == 64 > tokenizer.vocab_size
    save_pretrained(loaded, tmp_path / "copy", tokenizer)

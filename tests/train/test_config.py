"""Flags come from dataclasses: names, types, defaults and help agree, errors are one line; random configs are valid."""

from dataclasses import dataclass
from typing import Literal

import pytest

from kernels import resolve_backend
from model import ARCHITECTURES
from model.command import Parser
from train.config import DRAWN_FIELDS, RunConfig, TrainerConfig, add_flags, from_flags, option, random_config


@dataclass(frozen=True)
class Settings:
    batch_size: int = option(12, "examples in 50 % of a batch")
    rate: float = option(1e-3, "steps/s")
    window: int | None = option(32, "keys")
    name: str | None = option(None, "a name")
    fast: bool = option(False, "or slow")
    betas: tuple[float, float] = option((0.9, 0.99), "two of them")
    precision: Literal["fp32", "bf16"] = option("fp32", "arithmetic")


def parse(*arguments):
    parser = Parser(prog="program")
    add_flags(parser, Settings)
    return from_flags(Settings, parser.parse_args(list(arguments)))


def test_no_flags_give_the_defaults():
    assert parse() == Settings()


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_hyphens_and_underscores_are_the_same(flag):
    assert parse(flag, "7").batch_size == parse(f"{flag}=7").batch_size == 7


def test_values_keep_their_underscores():
    assert parse("--name", "a_b").name == parse("--name=a_b").name == "a_b"


def test_each_type_has_its_flag():
    settings = parse("--rate", "2e-4", "--window", "none", "--fast", "--betas", "0.8", "0.95", "--precision", "bf16")
    assert settings == Settings(rate=2e-4, window=None, fast=True, betas=(0.8, 0.95), precision="bf16")
    assert not parse("--fast", "--no-fast").fast


def test_help_shows_meaning_and_default_of_every_field_once():
    parser = Parser(prog="program")
    add_flags(parser, Settings)
    shown = " ".join(parser.format_help().split())
    assert shown.count("(default: ") == 7
    for text in (
        "examples in 50 % of a batch (default: 12)",
        "two of them (default: 0.9 0.99)",
        "slow (default: false)",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "3"], "unrecognized arguments: --windows 3"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--window", "wide"], "argument --window: invalid int value: 'wide'"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert shown.startswith("program: error: ") and message in shown and shown.count("\n") == 1


def test_every_field_of_a_run_says_what_it_means():
    for config_class in (RunConfig, TrainerConfig):
        for field in config_class.__dataclass_fields__.values():
            assert len(field.metadata["meaning"]) > 5


def test_a_run_is_counted_in_steps_or_epochs_whichever_ends_first():
    assert TrainerConfig(max_steps=7).total_steps(100) == 7
    assert TrainerConfig(max_epochs=2, batch_size=3).total_steps(100) == 67
    assert TrainerConfig(max_epochs=2, batch_size=3, grad_accumulation=2).total_steps(100) == 34
    assert TrainerConfig(max_epochs=2, batch_size=3, max_steps=5).total_steps(100) == 5
    assert TrainerConfig().total_steps(10**9) == TrainerConfig().total_steps(10) > 100


def test_the_schedule_is_in_tokens_however_the_warm_up_is_given():
    assert TrainerConfig(warmup_steps=3).learning_rates(50, 10)["warmup_tokens"] == 30
    assert TrainerConfig(warmup_tokens=512).learning_rates(50, 10)["warmup_tokens"] == 512
    assert TrainerConfig().learning_rates(50, 10)["warmup_tokens"] == 50
    assert TrainerConfig().learning_rates(5000, 10)["warmup_tokens"] == 1000
    assert TrainerConfig().learning_rates(50, 10)["final_tokens"] == 500
    assert TrainerConfig(final_tokens=123).learning_rates(50, 10)["final_tokens"] == 123


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "batch_size is 0, wanted at least 1"),
        ("max_steps", 0, "max_steps is 0, wanted at least 1"),
        ("eval_every", -1, "eval_every is -1, wanted at least 1"),
        ("learning_rate", 0.0, "learning_rate is 0.0, wanted a number above 0"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("grad_clip", 0.0, "grad_clip is 0.0, wanted a norm above 0, or None"),
        ("betas", (0.9, 1.0), "betas is .*, wanted two numbers from 0 to below 1"),
        ("precision", "fp8", "precision is 'fp8', expected one of 'auto', 'fp32', 'bf16', 'fp16'"),
        ("weight_decay", -0.1, "weight_decay is -0.1, wanted at least 0"),
        ("optimizer", "sgd", "optimizer is 'sgd', expected one of 'muon', 'adamw'"),
        ("schedule", "step", "schedule is 'step', expected one of 'cosine', 'linear', 'wsd'"),
        ("ema_decay", 1.0, "ema_decay is 1.0, wanted a number between 0 and 1, or None"),
        ("sample_tokens", -1, "sample_tokens is -1, wanted at least 0"),
        ("final_fraction", 1.5, "final_fraction is 1.5, wanted 0 to 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{field: value})


def test_two_lengths_of_the_warm_up_are_refused():
    with pytest.raises(ValueError, match="warmup_steps and warmup_tokens are both given"):
        TrainerConfig(warmup_steps=1, warmup_tokens=1)


def test_an_unknown_backend_is_refused_with_the_message_of_kernels():
    with pytest.raises(ValueError) as expected:
        resolve_backend("cutlass", "cpu")
    for fused_kernels in (True, False):
        with pytest.raises(ValueError, match=r"^backend is 'cutlass', expected one of ") as refused:
            RunConfig(fused_kernels=fused_kernels, backend="cutlass")
        assert str(refused.value) == str(expected.value)


def test_a_backend_without_the_fused_kernels_is_refused():
    with pytest.raises(ValueError, match="backend banded is one of the fused kernels: leave out --no-fused"):
        RunConfig(fused_kernels=False, backend="banded")
    assert RunConfig(backend="banded").fused_kernels


def test_a_drawn_model_is_valid_and_the_same_for_the_same_seed():
    drawn = [random_config(RunConfig(), seed) for seed in range(300)]
    assert drawn == [random_config(RunConfig(), seed) for seed in range(300)]
    assert {run.model_config(65).architecture for run in drawn} >= set(ARCHITECTURES)
    for name in DRAWN_FIELDS:
        assert len({getattr(run, name) for run in drawn}) > 2
    assert max(run.n_layer * 12 * run.d_model**2 for run in drawn) < 10**6  # parameters: minutes on a CPU


@pytest.mark.parametrize(
    "stated",
    [
        {"n_head": 12},
        {"d_model": 100},
        {"n_kv_head": 3},
        {"context_size": 25, "window": 3},
        {"n_kv_head": 4, "d_model": 256},
    ],
)
def test_stated_flags_stay_and_the_others_fit_them(stated):
    for seed in range(100):
        run = random_config(RunConfig(**stated), seed, set(stated))
        assert {name: getattr(run, name) for name in stated} == stated
        run.model_config(65)


def test_stating_a_flag_changes_no_other_that_need_not_fit():
    drawn = random_config(RunConfig(), 7)
    again = random_config(RunConfig(n_layer=9, window=5), 7, {"n_layer", "window"})
    assert {name for name in DRAWN_FIELDS if getattr(drawn, name) != getattr(again, name)} == {"n_layer", "window"}


def test_stated_sizes_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="does not divide d_model=97"):
        random_config(RunConfig(d_model=97), 1, {"d_model"}).model_config(65)
    with pytest.raises(ValueError, match="random_config draws the sizes of a new model: not with --init-from"):
        RunConfig(random_config=True, init_from="somewhere")

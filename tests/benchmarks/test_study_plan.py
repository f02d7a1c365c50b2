"""What the architecture study compares: sizes, windows, and the search for each architecture's learning rate."""

import math

import pytest
from architecture_study import plan
from architecture_study.plan import Settings

from model import GPT


def full_plan(loss_of=lambda run: 2.0 + abs(math.log2(run.learning_rate / 8e-3))):
    """The plan of a full study in which every run has a loss: by default 8e-3 is everyone's best learning rate."""
    return plan.Plan(Settings(device="cpu"), 76, loss_of)


def test_a_model_that_has_both_sizes_is_one_run():
    of_all = full_plan()
    runs = of_all.runs()
    assert len(runs) == len(set(runs)) == len({run.name for run in runs})
    assert [tuple(place) for place in of_all.settings.places] == [(25, 600), (256, 600), (256, 2400)]
    for place in of_all.settings.places:
        compared = of_all.compared(place)
        assert all(run._replace(seed=seed) in runs for run in compared.values() for seed in (2, 3, 4))
        assert all((run.context, run.steps, run.learning_rate) == (*place, 8e-3) for run in compared.values())
        sizes = {size for size, name in compared if name == "original"}
        assert len({compared[size, "original"] for size in sizes}) == 1
        assert sizes == set(plan.SIZES if place == (256, 600) else plan.SIZES[:1])


def test_equal_parameters_are_nearly_equal_and_equal_widths_are_not():
    settings = Settings(device="cpu")
    counts = {
        where: plan.count_parameters(plan.model_config(run, settings, 76))
        for where, run in full_plan().compared(plan.Place(256, 600)).items()
    }
    wanted = counts["equal width", "original"]
    for name in plan.NAMES:
        assert counts["equal parameters", name] == pytest.approx(wanted, rel=0.06)
    assert counts["equal width", "multi-query"] < 0.9 * wanted


def test_parameters_are_counted_as_a_model_has_them():
    run = plan.Run("multi-query", 25, 10, 68, 600, 4e-3, 0)
    config = plan.model_config(run, Settings(device="cpu"), vocab_size=76)
    assert plan.count_parameters(config) == GPT(config).num_parameters()
    assert config.n_kv_head == 1 and config.head_dim == 17 and config.rotated == 16


def test_windows_are_fractions_of_the_context_at_the_rate_of_the_comparison():
    for context, sizes in ((25, [2, 5, 10, 25]), (256, [26, 51, 102, 256])):
        runs = full_plan().windows(context)
        assert [run.window for run in runs] == sizes and {run.learning_rate for run in runs} == {8e-3}


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3, 1.6e-2]),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
        (3.2e-2, [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]),
        (9.0, [2e-3 * 2**i for i in range(9)]),  # a loss that falls without end: five more rates, then no more
    ],
)
def test_a_search_goes_on_until_the_best_rate_has_a_worse_one_on_either_side(best, tried):
    trained = {}
    of_all = full_plan(trained.get)
    place = plan.Place(256, 600)
    while missing := [run for run in of_all.search("rope", place) if run not in trained]:
        assert of_all.best("rope", place) is None and not of_all.search("rope", plan.Place(256, 2400))
        trained |= {run: abs(math.log(run.learning_rate / best)) for run in missing}
    assert sorted(run.learning_rate for run in trained if run.seed == 0) == pytest.approx(tried)
    found = of_all.best("rope", place)
    assert found.learning_rate == pytest.approx(min(best, tried[-1])) and (found.seed, found.width) == (0, 64)
    longer = of_all.search("rope", plan.Place(256, 2400))
    assert [run.learning_rate for run in longer] == pytest.approx([found.learning_rate * f for f in (0.25, 0.5, 1, 2)])


@pytest.mark.parametrize(("second_seed", "best"), [({8e-3: 2.02, 4e-3: 2.04}, 8e-3), ({8e-3: 2.06, 4e-3: 2.04}, 4e-3)])
def test_the_two_best_rates_are_tried_again_and_the_lower_mean_wins(second_seed, best):
    losses = [{2e-3: 2.2, 4e-3: 2.01, 8e-3: 2.0, 1.6e-2: 2.1}, second_seed]
    of_all = full_plan(lambda run: losses[run.seed][run.learning_rate])
    place = plan.Place(25, 600)
    assert [run.learning_rate for run in of_all.search("rope", place) if run.seed == 1] == [8e-3, 4e-3]
    assert of_all.best("rope", place).learning_rate == best


def test_every_architecture_is_compared_at_its_own_best_rate():
    own = dict(zip(plan.NAMES, (8e-3, 4e-3, 1.6e-2, 8e-3, 2e-3), strict=False))
    of_all = full_plan(lambda run: abs(math.log(run.learning_rate / own.get(run.architecture, 8e-3))))
    for (_, name), run in of_all.compared(plan.Place(25, 600)).items():
        assert run.learning_rate == own.get(name, 8e-3)

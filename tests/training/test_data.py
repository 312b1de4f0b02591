from dataclasses import replace

import pytest

from torchtune_fused.training.data import Schedule

ONE = Schedule(
    rows=23,
    batch_size=4,
    accumulation=1,
    processes=1,
    epochs=3,
    max_steps_per_epoch=None,
    seed=5,
    shuffle=True,
)


def rows_of_steps(schedule, first_step=0):
    """The rows that all processes together train on, step by step."""
    steps = [set() for _ in range(schedule.steps - first_step)]
    for rank in range(schedule.processes):
        batches = list(schedule.batches(rank, first_step))
        assert len(batches) == len(steps) * schedule.accumulation
        for number, batch in enumerate(batches):
            assert len(batch) == schedule.batch_size
            assert steps[number // schedule.accumulation].isdisjoint(batch)
            steps[number // schedule.accumulation].update(batch)
    return steps


def test_each_epoch_has_its_own_order_in_which_no_row_comes_twice():
    steps = rows_of_steps(ONE)
    assert ONE.steps_per_epoch == 5
    epochs = [steps[start : start + 5] for start in (0, 5, 10)]
    for epoch in epochs:
        assert len(set.union(*epoch)) == 20
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows_of_steps(replace(ONE, seed=6)) != steps


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(2, 1, 2), (1, 2, 2), (1, 1, 4), (2, 2, 1)]
)
def test_processes_and_accumulation_share_the_rows_of_a_step(batch_size, accumulation, processes):
    shared = replace(ONE, batch_size=batch_size, accumulation=accumulation, processes=processes)
    assert rows_of_steps(shared) == rows_of_steps(ONE)


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 6, 14, 15])
def test_any_step_can_be_the_first(first_step):
    schedule = replace(ONE, batch_size=2, processes=2)
    assert rows_of_steps(schedule, first_step) == rows_of_steps(schedule)[first_step:]


def test_an_epoch_can_end_early_and_order_can_be_kept():
    schedule = replace(ONE, max_steps_per_epoch=2, shuffle=False)
    assert schedule.steps == 6
    assert rows_of_steps(schedule) == [{0, 1, 2, 3}, {4, 5, 6, 7}] * 3
    assert replace(ONE, max_steps_per_epoch=9).steps_per_epoch == 5


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="23 rows, but one step takes 24"):
        replace(ONE, batch_size=6, processes=4)

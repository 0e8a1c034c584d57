"""The final round: the best trial and those that cannot be told apart from it, once more on fresh seeds.

A difference of one seed's run to the next is often as large as that between settings. After the round, the
means over seeds decide, and the interval says how much they are worth.
"""

from sweeps.ledger import read_sweep
from sweeps.ties import tied_with_best
from sweeps.trial_queue import TrialQueue
from sweeps.waiting import SEED_ATTR, SEED_OF_ATTR, further_seed, seeds_of

_LEADERS_ATTR = "final_round"
"""Of the study: numbers of the trials in the final round, so that a later start goes on with the same."""


def queue_final_round(queue: TrialQueue, num_seeds: int) -> int:
    """Queues the leaders with fresh seeds.

    Args:
        queue: whose other trials have ended.
        num_seeds: fresh seeds for each leader.

    Returns:
        How many trials are to be trained now, unfinished ones of an earlier start among them.
    """
    with queue.alone():
        return _queue_final_round(queue, num_seeds)


def _queue_final_round(queue: TrialQueue, num_seeds: int) -> int:
    record = read_sweep(queue.paths.root)
    if not any(trial.loss is not None for trial in record.finished):
        return 0
    trials = queue.study.get_trials(deepcopy=False)
    numbers: list[int] = queue.study.user_attrs.get(_LEADERS_ATTR, [])
    is_open = any(
        trial.user_attrs.get(SEED_OF_ATTR) in numbers and not trial.state.is_finished()
        for trial in trials
    )
    if not is_open:  # a later start may have found others
        leaders = [trial.number for trial in tied_with_best(record)]
        numbers = list(dict.fromkeys([*numbers, *leaders]))
        queue.study.set_user_attr(_LEADERS_ATTR, numbers)
    queue.console.print(
        f"final round: {num_seeds} fresh seeds for trial{'s' * (len(numbers) > 1)} "
        + ", ".join(map(str, numbers))
    )
    num_queued = 0
    for number in numbers:
        own = record.trial(number).config.seed
        fresh = [
            t for t in seeds_of(trials, number) if t.user_attrs[SEED_ATTR] >= own + queue.num_seeds
        ]
        for index in range(len(fresh), num_seeds):
            seed = own + queue.num_seeds + index
            queue.study.add_trial(further_seed(trials[number], seed))
            num_queued += 1
    queue.has_nothing = False
    return num_queued + sum(not trial.state.is_finished() for trial in trials)

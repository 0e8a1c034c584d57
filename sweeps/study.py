"""Builds the Optuna study of a sweep: sampler and pruner from the definition, results in SQLite.

`open_study(definition, paths)` -> the sweep's study, new or continued. `one_factor` is what a
definition's `scheduler: {engine: optuna, source: sweeps/study.py, optimizer: one_factor}` names (or `gp`,
`cmaes`, `qmc`, or a function in a file of your own):
W&B's scheduler and our runner call the same function with a `SweepInfo`; ours takes the sampler and
pruner of the in-memory study that it returns. W&B's own mapping makes Optuna's distributions.
"""

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from sqlalchemy import URL, make_url
from wandb.sdk.sweeps.scheduler.client import load_optimizer_config
from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config
from wandb.sdk.sweeps.sweep_info import SweepInfo

# `wandb sweep-scheduler` loads this file by its path, without the application's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps.one_factor import OneFactorSampler
from sweeps.parameters import listed_values
from sweeps.pruning import build_pruner, stored_losses
from sweeps.shared import GRACE_S, HEARTBEAT_S
from sweeps.spec import SweepDefinition, check_definition
from training.exceptions import ConfigError, SweepError
from training.paths import SweepPaths

_ROOT = Path(__file__).resolve().parents[1]

_DEFINITION_ATTR = "definition"
"""Of a study in a database: the YAML of the sweep that it belongs to."""

Point = dict[str, Any]


def one_factor(sweep: SweepInfo) -> optuna.Study:
    """Study of the one-factor design over the parameters that have several `values`.

    Raises:
        ConfigError: a parameter varies without listing its values, or none varies.
    """
    where = f"{sweep.name}: parameters"
    parameters = sweep.config.get("parameters", {})
    factors = {}
    for name, spec in parameters.items():
        if "value" in spec:
            continue
        if "values" not in spec:
            raise ConfigError(f"{where}.{name} must list values for the one-factor design")
        factors[name] = _choices(spec["values"])
    if not any(len(values) > 1 for values in factors.values()):
        raise ConfigError(f"{where} vary nothing, but the one-factor design needs a factor")
    # Optuna's own default is its median pruner: it would end trials of a design that needs them all.
    return optuna.create_study(
        direction="minimize", sampler=OneFactorSampler(factors), pruner=NopPruner()
    )


def gp(sweep: SweepInfo) -> optuna.Study:
    """Study of a Gaussian process, for tens of costly trials; it takes those in flight into account."""
    return _study(optuna.samplers.GPSampler(n_startup_trials=8))


def cmaes(sweep: SweepInfo) -> optuna.Study:
    """Study of CMA-ES, for ranges and hundreds of trials; settings with listed values are drawn at random."""
    return _study(optuna.samplers.CmaEsSampler(warn_independent_sampling=False))


def qmc(sweep: SweepInfo) -> optuna.Study:
    """Study of a scrambled Sobol sequence: ranges covered more evenly than at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # its interface may change
        return _study(
            optuna.samplers.QMCSampler(scramble=True, seed=0, warn_independent_sampling=False)
        )


def _study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(direction="minimize", sampler=sampler, pruner=NopPruner())


def search_space(definition: SweepDefinition) -> dict[str, BaseDistribution]:
    """Distribution of every varied setting, as W&B maps it."""
    parameters = {
        name: {**spec, "values": _choices(spec["values"])} if "values" in spec else spec
        for name, spec in definition.varied.items()
    }
    return search_space_from_sweep_config(parameters)


def open_study(
    definition: SweepDefinition, paths: SweepPaths, storage_url: str | None = None
) -> optuna.Study:
    """The sweep's study, created in `paths.study` unless it is there.

    Args:
        definition: the sweep.
        paths: its directory.
        storage_url: SQLAlchemy's URL of a database for a study that several runners share; it bears the
            sweep's name there.

    Raises:
        ConfigError: the definition's scheduler cannot build a study.
        SweepError: the file is there and is no study, the database cannot be had, or its study is of
            another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = build_sampler(definition)
    pruner = build_pruner(definition, stored_losses(paths))
    if definition.config.get("scheduler"):
        built = scheduler_study(definition)
        sampler, pruner = built.sampler, built.pruner
    if storage_url is not None:
        return _open_shared(definition, paths, storage_url, sampler, pruner)
    url = URL.create("sqlite", database=str(paths.study.resolve())).render_as_string()
    try:
        storage = optuna.storages.RDBStorage(url)
        # One study a file: a renamed directory or definition still finds its own.
        names = [*optuna.get_all_study_names(storage), definition.name]
        return optuna.create_study(
            storage=storage,
            study_name=names[0],
            load_if_exists=True,
            direction="minimize",
            sampler=sampler,
            pruner=pruner,
        )
    except Exception as error:
        # SQLAlchemy raises its own errors and Optuna wraps some of them: all mean the same here.
        reason = str(error).splitlines()[0]
        raise SweepError(f"{paths.study}: cannot be opened as a study: {reason}") from error


def _open_shared(
    definition: SweepDefinition,
    paths: SweepPaths,
    storage_url: str,
    sampler: BaseSampler | None,
    pruner: BasePruner,
) -> optuna.Study:
    where = "--storage"
    try:
        url = make_url(storage_url)
        if (
            url.drivername == "postgresql"
        ):  # SQLAlchemy takes this for psycopg2, which is not installed
            url = url.set(drivername="postgresql+psycopg")
        where = f"--storage is {url.render_as_string(hide_password=True)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            storage = optuna.storages.RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={
                    "pool_pre_ping": True
                },  # a server that was started again is no error
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
            )
        study = optuna.create_study(
            storage=storage,
            study_name=definition.name,
            load_if_exists=True,
            direction="minimize",
            sampler=sampler,
            pruner=pruner,
        )
    except Exception as error:
        # SQLAlchemy, its drivers and Optuna raise their own errors: all mean the same here.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise SweepError(f"{where}, which cannot be opened: {reason}") from error
    problem = _shared_problem(study, definition, paths)
    if problem:
        close_study(study)
        raise SweepError(f"{where}, where study {definition.name} {problem}")
    return study


def _shared_problem(
    study: optuna.Study, definition: SweepDefinition, paths: SweepPaths
) -> str | None:
    """Why this study is not the sweep's, or its files are not here; None if all is well."""
    known = study.user_attrs.get(_DEFINITION_ATTR)
    if known is None:
        study.set_user_attr(_DEFINITION_ATTR, definition.text)
    else:
        config = yaml.safe_load(known)
        difference = check_definition(config, known, definition.path).difference(definition)
        if difference:
            return (
                f"is another sweep's: {difference} is not as in {definition.path}; give this one "
                "another name"
            )
    if study.get_trials(deepcopy=False) and not paths.definition.is_file():
        return (
            f"has trials, but their files are not in {paths.root}: all machines must see the same "
            "--output_dir"
        )
    return None


def close_study(study: optuna.Study) -> None:
    """Closes the study's connections to its database."""
    backend = getattr(study._storage, "_backend", study._storage)
    if isinstance(backend, optuna.storages.RDBStorage):
        backend.remove_session()
        backend.engine.dispose()


def scheduler_study(definition: SweepDefinition) -> optuna.Study:
    """The in-memory study that the function named by the definition's `scheduler` returns."""
    scheduler = definition.config["scheduler"]
    where = f"{definition.path}: scheduler"
    source = Path(scheduler["source"])
    if not source.is_file():
        source = _ROOT / source
    if not source.is_file():
        raise ConfigError(f"{where}.source is {scheduler['source']!r}, but that file is not there")
    sweep = SweepInfo(
        id=definition.name,
        name=str(definition.path),
        entity=definition.config.get("entity", ""),
        project=definition.config.get("project", ""),
        config=definition.config,
        controller_run_name="",
    )
    own = {function.__name__: function for function in (one_factor, gp, cmaes, qmc)}
    if source.resolve() == Path(__file__).resolve() and scheduler["optimizer"] in own:
        # The very same classes, not a second copy of this module.
        return own[scheduler["optimizer"]](sweep)
    try:
        study, terminator = load_optimizer_config(
            str(source), scheduler["optimizer"], optuna.Study, sweep
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if terminator is not None:
        raise ConfigError(f"{where}.optimizer returns a terminator, which is not supported here")
    return study


def build_sampler(definition: SweepDefinition, number: int = 0) -> BaseSampler | None:
    """Optuna's sampler for the definition's method; None where its scheduler builds the study.

    Args:
        number: of the trial to be asked for. It seeds random and bayes, so that a sweep that was
            interrupted asks for the same points as one that was not, and never for one twice.
    """
    match definition.method:
        case "grid":
            return GridSampler(_grid(search_space(definition)), seed=0)
        case "random":
            return RandomSampler(seed=number)
        case "bayes":
            # Trials in the same pack have no result yet: counted as bad ones, they are not proposed again.
            return TPESampler(constant_liar=True, seed=number)
        case _:
            return None


def planned_points(study: optuna.Study, definition: SweepDefinition) -> list[Point] | None:
    """Every point that the sweep is going to try, where that is known before it starts."""
    sampler = study.sampler
    if isinstance(sampler, OneFactorSampler):
        # The combination is not known yet; the largest values stand for its cost.
        largest = {name: max(values, key=_size) for name, values in sampler.factors.items()}
        return [*sampler.design.values(), largest]
    if isinstance(sampler, GridSampler):
        grid = _grid(search_space(definition))
        return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return None


def _grid(distributions: dict[str, BaseDistribution]) -> dict[str, list[Any]]:
    values = {name: listed_values(distribution) for name, distribution in distributions.items()}
    assert all(values.values()), "read_definition lets no continuous range into a grid"
    return values


def _choices(values: list[Any]) -> list[Any]:
    # Optuna stores texts, numbers and booleans only; TrialConfig reads a list from its JSON.
    return [json.dumps(value) if isinstance(value, list) else value for value in values]


def _size(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0

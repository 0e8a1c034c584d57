"""A sweep on W&B's server: its definition, its state, and the directory that is its here.

`connect()` -> W&B's API or one clear line; `read_wandb_sweep(path)` -> `WandbSweep`, checked as a definition
in a file is. Its directory is NAME-SWEEP_ID, for two sweeps may be made of one YAML.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweeps.directory import check_owner
from sweeps.environment import describe_environment
from sweeps.spec import SweepDefinition, check_definition
from sweeps.terminal import first_line
from training.exceptions import ConfigError
from training.paths import SweepPaths, write_json, write_text

ENDED = ("FINISHED", "CANCELED", "CANCELLED", "STOPPED", "FAILED", "CRASHED")


@dataclass(frozen=True)
class WandbSweep:
    """A sweep on W&B's server."""

    entity: str
    project: str
    id: str
    state: str
    definition: SweepDefinition

    @property
    def path(self) -> str:
        return f"{self.entity}/{self.project}/{self.id}"


def connect() -> Any:
    """`wandb.Api()`.

    Raises:
        ConfigError: nobody has logged in, or the key is not valid.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    auth = wbauth.authenticate_session(
        host=host, source="loraloom", prompt=False, update_session=False
    )
    if not auth:
        raise ConfigError(f"W&B has no API key for {host}: run `wandb login`, or set WANDB_API_KEY")
    # Its errors are ours to print: in one line, and once.
    for name in ("wandb.apis.public.sweeps", "wandb"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    logging.getLogger("wandb").propagate = False
    try:
        return wandb.Api()
    except Exception as error:
        raise ConfigError(f"W&B refuses the login on {host}: {first_line(error)}") from error


def read_wandb_sweep(path: str, api: Any = None) -> WandbSweep:
    """Reads a sweep's definition and state.

    Args:
        path: `ENTITY/PROJECT/SWEEP_ID`, or the last one or two of these where W&B's settings have the rest.
        api: `connect()`'s, if there is one already.

    Raises:
        ConfigError: no login, no such sweep, or one whose parameters are not settings of ours.
    """
    api = api or connect()
    parts = path.strip("/").split("/")
    if not all(parts) or len(parts) > 3:
        raise ConfigError(f"the sweep is {path!r}, but must be ENTITY/PROJECT/SWEEP_ID")
    if len(parts) == 1 and not api.settings["project"]:
        raise ConfigError(
            f"the sweep is {path!r}, but must be ENTITY/PROJECT/SWEEP_ID (no project)"
        )
    try:
        sweep = api.sweep("/".join(parts))
        config, state = sweep.config, sweep.state
    except Exception as error:
        raise ConfigError(f"{path}: W&B cannot give the sweep: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: the sweep has no definition")
    text = yaml.safe_dump(config, sort_keys=False)
    name = f"{sweep.entity}/{sweep.project}/{sweep.id}"
    definition = check_definition(config, text, Path(name))
    return WandbSweep(sweep.entity, sweep.project, sweep.id, str(state).upper(), definition)


def open_directory(sweep: WandbSweep, output_dir: Path) -> SweepPaths:
    """Makes the sweep's directory; several agents may, as what it writes is the same for all.

    Raises:
        SweepError: the directory is another sweep's.
    """
    paths = SweepPaths(output_dir / f"{sweep.definition.name}-{sweep.id}")
    check_owner(sweep.definition, paths)
    paths.trials.mkdir(parents=True, exist_ok=True)
    if not paths.definition.is_file():
        write_text(paths.definition, sweep.definition.text)
    if not paths.environment.is_file():
        write_json(paths.environment, {**describe_environment(), "wandb_sweep": sweep.path})
    return paths

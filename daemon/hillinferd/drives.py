"""What the configuration says of drives, as the service wants to know it."""

from __future__ import annotations

import os

from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import PAGE

from . import config, records
from .driver.settings import DriverSettings
from .service.drive import DriveSettings


def drive_settings(drive: config.DriveConfig, settings: config.Config) -> DriveSettings:
    """Return how to open ``drive``; raises :class:`ConfigError` if there is no place for its pool."""
    path, catalogue = drive.pool, None
    state_dir = settings.state_dir or settings.pool_dir
    if path is None:
        try:
            settings.pool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"pool_dir: cannot make {settings.pool_dir}: {error.strerror}; name a file with --pool"
            ) from None
        path = settings.pool_dir / f"pool-{os.getpid()}-{drive.name}"
    else:
        catalogue = records.catalogue_path(path, settings.state_dir)
        state_dir = catalogue.parent
    return DriveSettings(
        drive.name,
        DriverSettings(
            drive.driver,
            str(path),
            drive.pool_capacity // PAGE * PAGE,
            drive.pool is not None,
            drive.evaluation_keys_dram,
            drive.profile,
            drive.card,
            str(drive.bitstream or ""),
            str(drive.configurations or ""),
            str(state_dir),
        ),
        catalogue,
        settings.request_timeout,
    )

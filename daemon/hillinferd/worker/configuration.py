"""The bitstream of the worker's card: proved when the worker starts, and changed when it is asked to."""

from __future__ import annotations

from pathlib import Path

from hillinfer_core.errors import ConfigError, HillInferError, InvalidInput

from ..cec.catalogue import MANIFEST, Catalogue, read_catalogue
from ..cec.configurable import Configurable
from ..cec.loader import Loader, Status
from ..driver.settings import DriverSettings
from ..logs import get_logger
from . import messages

log = get_logger(__name__)


class Configuration:
    """The card of ``settings``. Blocks while a bitstream is loaded and proved; one thread only.

    The catalogue is read for each request, so that a bitstream can be added while the daemon runs.
    """

    def __init__(self, card: Configurable, settings: DriverSettings) -> None:
        self._card = card
        self._catalogue = Path(settings.configurations) if settings.configurations else None
        self._state = Path(settings.state_dir, settings.card)

    def restore(self) -> None:
        """Load the last good bitstream and prove it, if the drive has a catalogue; raises nothing typed.

        If that fails the card is not used, and the drive serves what needs no card: a call that needs it is
        told so, and another bitstream can be loaded.
        """
        if self._catalogue is None:
            return
        try:
            # What was good is in the state directory: a catalogue that cannot be read does no harm here.
            status = Loader(self._card, Catalogue(self._catalogue, ()), self._state).restore()
        except (HillInferError, OSError) as error:
            log.error("the last good bitstream is not in use", error=error)
        else:
            if status.good is None:
                log.warning("the card has no proved bitstream; load one with hillinferctl cec load")
            else:
                log.info("bitstream verified", file=status.good.file, uuid=status.loaded)

    def carry_out(self, request: messages.CecRequest) -> Status:
        """Ask the card, or change its bitstream; raises as :class:`~hillinferd.cec.loader.Loader` does."""
        if self._catalogue is None:
            raise InvalidInput(
                "this drive has no catalogue of bitstreams; name its directory with configurations"
            )
        loader = Loader(self._card, read_catalogue(self._catalogue / MANIFEST), self._state)
        try:
            match request:
                case messages.CecStatus():
                    return loader.status()
                case messages.CecLoad():
                    return loader.load(request.name, request.contexts)
                case messages.CecRollback():
                    return loader.rollback(request.contexts)
        except OSError as error:
            if error.filename is None:
                raise  # of the drive
            raise ConfigError(
                f"cannot keep the state of the card in {error.filename}: {error.strerror}; "
                "let the daemon write there, or name another state_dir"
            ) from None

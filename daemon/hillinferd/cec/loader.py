"""Loads bitstreams onto a card, proves them, and goes back to the last good one when one fails."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from hillinfer_core.errors import BadBitstream, ContextInUse, DeviceUnavailable, HillInferError

from .catalogue import Catalogue, Entry, check_bitstream, verified
from .configurable import Configurable
from .selftest import self_test
from .state import State, StateDirectory
from .xclbin import read_xclbin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """``loaded`` is what the card reports, ``good_loaded`` whether that is ``good``; see :class:`State`."""

    interface_uuids: tuple[UUID, ...]
    loaded: UUID | None
    good: Entry | None
    good_loaded: bool
    previous: Entry | None
    catalogue: tuple[Entry, ...]


class Loader:
    """The bitstream of one card. Its state is in ``directory``, and outlives the process.

    Calls block, for as long as loading takes, and are made by the thread that uses the card. ``contexts`` is
    how many open contexts need the bitstream that is loaded: while there are any it is not changed.
    """

    def __init__(self, card: Configurable, catalogue: Catalogue, directory: Path) -> None:
        self._card = card
        self._catalogue = catalogue
        self._directory = StateDirectory(directory)
        self._state = self._directory.read()

    def status(self) -> Status:
        """Ask the card, and return what is known."""
        loaded = self._card.loaded_uuid()
        good = self._state.good
        return Status(
            interface_uuids=tuple(self._card.interface_uuids()),
            loaded=loaded,
            good=good,
            good_loaded=good is not None and loaded is not None and self._uuid_of(good) == loaded,
            previous=self._state.previous,
            catalogue=self._catalogue.entries,
        )

    def load(self, name: str, contexts: int) -> Status:
        """Load the catalogue's bitstream called ``name``, a kernel or a file, and prove it by its self-test.

        Raises :class:`ContextInUse`; :class:`BadBitstream` if there is none for the card's shell, or it is
        not what the catalogue says, or fails, the last good one being loaded again; and
        :class:`DeviceUnavailable` if that fails too. The card has then no bitstream that is used.
        """
        entry = self._find(name)
        verified(self._catalogue, entry, self._card.interface_uuids())
        status = self.status()
        if entry == status.good and status.good_loaded:
            return status
        _refuse(contexts)
        copy = self._directory.keep(self._catalogue.directory / entry.file, entry)
        self._change(entry, copy)
        good = self._state.good
        return self._remember(State(entry, good if good != entry else self._state.previous))

    def rollback(self, contexts: int) -> Status:
        """Go back to the bitstream that was good before this one; a second time returns to this one.

        Raises as :meth:`load` does, and :class:`BadBitstream` if there is none to go back to.
        """
        previous = self._state.previous
        if previous is None:
            raise BadBitstream("no bitstream was good before this one; load one with hillinferctl cec load")
        _refuse(contexts)
        self._change(previous, self._directory.copy_of(previous))
        return self._remember(State(previous, self._state.good))

    def restore(self) -> Status:
        """After a start: see that the card has the last good bitstream, and prove it. Raises as :meth:`load`.

        Without a state the card is left as it is.
        """
        good = self._state.good
        if good is not None:
            self._apply(good, self._directory.copy_of(good))
        return self.status()

    def _change(self, entry: Entry, path: Path) -> None:
        """Make ``entry`` the loaded bitstream, or the last good one again."""
        good = self._state.good
        try:
            self._apply(entry, path)
            return
        except HillInferError as error:
            # Copies are named by their content, which several entries may share.
            kept = {held.sha256 for held in (good, self._state.previous) if held}
            if entry.sha256 not in kept:
                self._directory.forget(entry)
            if good is None:
                raise
            fault = str(error)
        # Only now: the error's traceback may hold runs, whose kernels keep the card from another bitstream.
        self._return_to(good, entry, fault)
        raise BadBitstream(f"{fault}; {good.file} is loaded again")

    def _return_to(self, good: Entry, failed: Entry, fault: str) -> None:
        log.warning("%s failed (%s); loading %s again", failed.file, fault, good.file)
        try:
            self._apply(good, self._directory.copy_of(good))
        except HillInferError as second:
            raise DeviceUnavailable(
                f"{failed.file} failed ({fault}), and the last good one, {good.file}, cannot be loaded again "
                f"({second}); reset the card (xbutil reset), then hillinferctl cec load {good.kernel.name}"
            ) from None

    def _apply(self, entry: Entry, path: Path) -> None:
        xclbin = read_xclbin(path)
        check_bitstream(xclbin, entry, self._card.interface_uuids())
        try:
            self._card.configure(path)
            found = self._card.loaded_uuid()
            if found != xclbin.uuid:
                raise BadBitstream(
                    f"the card reports bitstream {found} after {entry.file}, which is {xclbin.uuid}"
                )
            self_test(self._card, entry.kernel, entry.head_dims)
        except BaseException:
            self._card.release()
            raise

    def _find(self, name: str) -> Entry:
        named = [entry for entry in self._catalogue.entries if name in (entry.file, entry.kernel.name)]
        if not named:
            known = ", ".join(f"{entry.kernel.name} ({entry.file})" for entry in self._catalogue.entries)
            raise BadBitstream(
                f"{self._catalogue.directory} has no bitstream {name!r:.80}; it has {known or 'none'}"
            )
        shells = self._card.interface_uuids()
        # One for another shell is taken too, so that the check can name both.
        return next((entry for entry in named if entry.interface_uuid in shells), named[0])

    def _uuid_of(self, entry: Entry) -> UUID | None:
        try:
            return read_xclbin(self._directory.copy_of(entry)).uuid
        except BadBitstream:
            return None

    def _remember(self, state: State) -> Status:
        self._directory.write(state)
        self._state = state
        return self.status()


def _refuse(contexts: int) -> None:
    if contexts:
        raise ContextInUse(
            f"{contexts} open context{'s need' if contexts > 1 else ' needs'} the loaded bitstream; "
            "close them, then ask again"
        )

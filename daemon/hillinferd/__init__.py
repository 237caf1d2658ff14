"""The daemon that owns the cold pool: sessions, contexts and the device worker.

Layers, each knowing only those after it: ``rpc`` (sockets and gRPC), ``service`` (sessions, queue,
supervision), ``worker`` (the device process), ``domain`` (extents and contexts), ``driver`` (the drive).
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hillinfer")
except PackageNotFoundError:  # run from a source tree without an install
    __version__ = "0+unknown"

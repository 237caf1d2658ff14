"""Builds the guest's disk: Debian's cloud kernel and udev, and this machine's Python with what tests import.

The kernel has NVMe and ext4 built in but neither 9p nor a way to use a directory of the host without a daemon
that runs as root, so the guest boots from an image. Nothing here needs root.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KERNEL_PACKAGE = "linux-image-cloud-amd64"
PACKAGES = ["busybox-static", "dmsetup", "kmod", "libdevmapper1.02.1", "libkmod2", "udev"]

DISK_SIGNATURE = 0x68696C6C
"""Of the image's partition table: the kernel finds its root by PARTUUID, in whatever order drives appear."""

_PARTITION = 1 << 20
_FREE_BYTES = 256 << 20
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
# What the daemon imports, what the tests import, and what is imported where it is installed.
_WANTED = ["hillinfer[daemon]", "pytest", "pytest-timeout", "hypothesis", "pyudev", "setuptools"]
_MODULES = ["block", "char", "md", "virtio"]
_NOT_PYTHON = ("site-packages", "dist-packages", "test", "idlelib", "tkinter", "ensurepip")


class Unavailable(Exception):  # noqa: N818 -- as all errors of the project
    """What the run needs is not there; the message says what to do."""


@dataclass(frozen=True)
class Image:
    """A bootable disk and the kernel for it."""

    disk: Path
    kernel: Path


def build(folder: Path, arguments: list[str]) -> Image:
    """Make the image under ``folder``; its pytest gets ``arguments``. Packages are downloaded once."""
    for tool, package in {"apt-get": "apt", "dpkg-deb": "dpkg", "mke2fs": "e2fsprogs"}.items():
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            raise Unavailable(f"{tool} is needed, of Debian's package {package}")
    packages = _packages(folder / "packages")
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    tree = _Tree(root)
    version = next((packages / "lib/modules").iterdir()).name
    tree.merge(packages, skip=("lib/modules", "usr/share", "boot"))
    for part in _MODULES:
        tree.merge(packages, only=f"lib/modules/{version}/kernel/drivers/{part}")
    for part in ("fs/overlayfs", "lib", "crypto"):
        tree.merge(packages, only=f"lib/modules/{version}/kernel/{part}")
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        tree.merge(packages, only=f"lib/modules/{version}/{name}")
    depmod = ["depmod", "-b", root, version]
    subprocess.run(depmod, executable=packages / "bin/kmod", env=_library_path(packages), check=True)
    for path in _python_files():
        tree.add(path)
    for path in ("mke2fs", "mkfs.ext4", "ldconfig"):
        tree.add(Path("/usr/sbin") / path if Path("/usr/sbin", path).exists() else Path("/sbin") / path)
    for path in ("/etc/ld.so.cache", "/etc/mke2fs.conf", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"):
        if Path(path).exists():
            tree.add(Path(path))
    tree.add_libraries(packages)
    tree.add_init(arguments)
    disk = folder / "root.img"
    _format(root, disk)
    return Image(disk, packages / f"boot/vmlinuz-{version}")


class _Tree:
    """A root directory with a merged /usr, filled with files of this machine at their own paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.binaries: list[Path] = []
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for name in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/lib", "var/tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def merge(self, source: Path, *, skip: tuple[str, ...] = (), only: str = "") -> None:
        """Copy an unpacked package, or a part of it."""
        start = source / only
        for path in [start] if start.is_file() else start.rglob("*"):
            name = path.relative_to(source).as_posix()
            if not path.is_dir() and not name.startswith(skip):
                self._copy(path, Path("/", name))

    def add(self, path: Path) -> None:
        """Copy one file; a link comes with what it names."""
        path = Path(os.path.realpath(path.parent), path.name)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(path)
        self._copy(path, path)
        if path.is_symlink():
            target = path.parent / path.readlink()
            if not target.is_dir():
                self.add(target)

    def add_libraries(self, packages: Path) -> None:
        """Copy the shared libraries that the files copied so far are linked with."""
        listed = subprocess.run(
            ["ldd", *self.binaries], env=_library_path(packages), capture_output=True, text=True, check=False
        ).stdout
        for name in set(re.findall(r"(/\S+) \(0x", listed)):
            path = Path(name)
            if packages not in path.parents and self.root not in path.parents and path.exists():
                self.add(path)

    def add_init(self, arguments: list[str]) -> None:
        """Add the script that the kernel starts, which hands ``arguments`` to pytest."""
        target = self.root / "usr/sbin/guest-init"
        script = (Path(__file__).parent / "guest-init").read_text()
        script = script.replace("@repository@", shlex.quote(str(REPOSITORY)))
        target.write_text(script.replace("@arguments@", shlex.join(arguments)))
        target.chmod(0o755)

    def _copy(self, source: Path, name: Path) -> None:
        target = self.root / name.relative_to("/")
        if target.is_symlink() or target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
        if not source.is_symlink() and (os.access(source, os.X_OK) or ".so" in source.name):
            with source.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    self.binaries.append(source)


def _packages(folder: Path) -> Path:
    """Download and unpack the packages; they stay until the folder is removed."""
    unpacked = folder / "unpacked"
    if unpacked.exists():
        return unpacked
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    depends = subprocess.run(
        ["apt-cache", "depends", KERNEL_PACKAGE], capture_output=True, text=True, check=False
    )
    kernels = re.findall(r"Depends: (linux-image-\S+)", depends.stdout)
    command = ["apt-get", "download", "-q", *kernels, *PACKAGES]
    if not kernels or subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL).returncode:
        raise Unavailable(
            f"apt cannot download {KERNEL_PACKAGE} and {', '.join(PACKAGES)}: try apt-get update, on Debian"
        )
    part = folder / "part"
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, part], check=True)
    return part.rename(unpacked)


def _python_files() -> Iterable[Path]:
    """Return the interpreter, its library, the distributions that tests need, and the repository."""
    binary = Path(sys.executable)
    yield binary
    yield REPOSITORY / ".venv/pyvenv.cfg"
    standard = Path(sysconfig.get_path("stdlib"))
    for path in standard.rglob("*"):
        if path.is_file() and not set(path.relative_to(standard).parts) & set(_NOT_PYTHON):
            yield path
    for distribution in _closure():
        for file in distribution.files or ():
            path = Path(distribution.locate_file(file)).resolve()  # type: ignore[arg-type]
            if path.is_file():
                yield path
    for path in Path(sysconfig.get_path("purelib")).glob("*.pth"):
        yield path
    for part in ("core/hillinfer_core", "daemon", "client/hillinfer", "tests"):
        for path in (REPOSITORY / part).rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                yield path
    yield REPOSITORY / "pyproject.toml"


def _closure() -> list[importlib.metadata.Distribution]:
    """Return the installed distributions that :data:`_WANTED` need; of markers only extras count."""
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    todo = list(_WANTED)
    while todo:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", todo.pop()).groups()  # type: ignore[union-attr]
        if (name, extras) in found:
            continue
        try:
            found[name, extras] = distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in distribution.requires or ():
            extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
            if extra is None or extra[1] in (extras or "").split(","):
                todo.append(re.match(r"[\w.-]+(?:\[[\w,-]+\])?", requirement)[0])  # type: ignore[index]
    return list(found.values())


def _library_path(packages: Path) -> dict[str, str]:
    folders = [packages / _LIBRARIES, packages / "lib/x86_64-linux-gnu"]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}


def _format(root: Path, disk: Path) -> None:
    """Make a partition table with one partition, and in it ext4 with the content of ``root``."""
    used = sum(path.lstat().st_blocks * 512 + 512 for path in root.rglob("*"))
    size = (int(used * 1.15) + _FREE_BYTES) // _PARTITION * _PARTITION
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(_PARTITION + size)
        entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, _PARTITION // 512, size // 512)
        file.write(struct.pack("<440xIH", DISK_SIGNATURE, 0) + entry + b"\0" * 48 + b"\x55\xaa")
    mke2fs = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    subprocess.run(
        [
            *(mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-N", "65536", "-O", "^has_journal"),
            *("-d", root, "-E", f"offset={_PARTITION}", disk, f"{size // 1024}k"),
        ],
        check=True,
    )

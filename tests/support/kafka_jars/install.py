"""Gets Kafka's jars with Maven, once, and all else that every cluster of the tests shares."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
CACHE = Path(__file__).parents[3] / ".cache" / "kafka"

LEAST_JAVA = 17
DOWNLOAD_SECONDS = 300
STORE_PASSWORD = "for-tests"  # noqa: S105 - guards the key of a host named localhost

_NODE_NAMES = "san=dns:localhost,ip:127.0.0.1"
_KEY = ("-keyalg", "EC", "-groupname", "secp256r1", "-validity", "3650")


@dataclass(frozen=True)
class Installation:
    """Kafka as installed under *folder*."""

    java: Path
    folder: Path

    @property
    def archive(self) -> Path:
        """Class data of a running broker: takes a third off its start. Made last, so it says: ready."""
        return self.folder / "classes.jsa"

    @property
    def ca_file(self) -> Path:
        """The certificate (PEM) of the authority that signed the nodes' one."""
        return self.folder / "ca.pem"

    @property
    def keystore(self) -> Path:
        """The nodes' key and certificate, for localhost and 127.0.0.1 (PKCS 12)."""
        return self.folder / "node.p12"

    @property
    def classpath(self) -> str:
        """Sorted, since the class data is good for this very list only."""
        return ":".join(sorted(map(str, (self.folder / "libs").glob("*.jar"))))


def available() -> str | None:
    """Why Kafka cannot run here, in a sentence; None: it can."""
    version = _java_version()
    if version is None:
        return "Kafka needs Java, and there is none on the PATH"
    if version < LEAST_JAVA:
        return f"Kafka needs Java {LEAST_JAVA} or newer, and the one on the PATH is {version}"
    if not _here().archive.exists() and shutil.which("mvn") is None:
        return "Kafka's jars are got with Maven, and there is no mvn on the PATH"
    return None


def install(train: Callable[[Installation, Path], None]) -> Installation:
    """
    Kafka, installed; at once when it was before, else after some 15 s. Safe in many processes.

    *train* is given an installation that still lacks its archive, and writes it to the path.
    Raises RuntimeError with the output of the tool that failed.
    """
    found = _here()
    if found.archive.exists():
        return found
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.archive.exists():
            shutil.rmtree(found.folder, ignore_errors=True)
            found.folder.mkdir()
            _get_jars(found)
            _make_certificates(found)
            unfinished = found.folder / "unfinished.jsa"
            train(found, unfinished)
            unfinished.rename(found.archive)
    return found


def run(*command: str | Path, seconds: float = 60) -> None:
    """Run a tool to its end. Raises RuntimeError with all that it printed when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name} failed:\n{done.stdout.decode(errors='replace')}")


def _here() -> Installation:
    """Where Kafka is or will be: elsewhere for another pom, another Java, another way to install."""
    found = shutil.which("java")
    assert found is not None, available()
    java = Path(found).resolve()
    told = hashlib.sha256(f"{java} {java.stat().st_mtime_ns}".encode())
    for source in (HERE / "pom.xml", Path(__file__)):
        told.update(source.read_bytes())
    return Installation(java, CACHE / told.hexdigest()[:16])


@functools.cache
def _java_version() -> int | None:
    java = shutil.which("java")
    if java is None:
        return None
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', told)  # macOS has a `java` that only says: install one.
    return int(found[1]) if found else None


def _get_jars(found: Installation) -> None:
    libs = f"-DoutputDirectory={found.folder / 'libs'}"
    goal = "dependency:copy-dependencies"
    checked = "--strict-checksums"
    command = ("mvn", "--batch-mode", "--quiet", checked, "--file", HERE / "pom.xml", goal, libs)
    run(*command, seconds=DOWNLOAD_SECONDS)


def _make_certificates(found: Installation) -> None:
    """An authority of our own, and one certificate for all nodes; keytool comes with Java."""

    def keytool(do: str, alias: str, *more: str | Path) -> None:
        store = ("-keystore", found.keystore, "-storepass", STORE_PASSWORD)
        run(found.java.with_name("keytool"), do, "-alias", alias, *store, *more)

    authority = ("-dname", "CN=authority-of-the-tests", "-ext", "bc:c=ca:true")
    node = ("-dname", "CN=localhost", "-ext", _NODE_NAMES, "-ext", "eku=serverAuth")
    keytool("-genkeypair", "ca", *authority, "-ext", "ku:c=keyCertSign", *_KEY)
    keytool("-genkeypair", "node", *node, "-signer", "ca", *_KEY)
    keytool("-exportcert", "ca", "-rfc", "-file", found.ca_file)
    # A store with two keys would leave it to chance which one a node shows.
    keytool("-delete", "ca")

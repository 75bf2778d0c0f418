"""Debian as tar files: what the guests of these tests boot.

They are kept in ~/.cache/lpechod, and made anew each month and when what goes into them changes.
MIRROR names another Debian mirror than mmdebstrap's own choice.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_SYSTEMD = "systemd-sysv,dbus"


def trixie(package: Path) -> Path:
    """Return Debian 13 with, in apt's cache but not installed, what a package depends on.

    So apt resolves its dependencies for real, in a guest that has no network.

    Args:
        package: the package that is going to be installed.
    """
    depends = subprocess.run(
        ["dpkg-deb", "--field", package, "Depends"], capture_output=True, text=True, check=True
    ).stdout
    fetch = "apt-get --quiet --yes --no-install-recommends --download-only install /package.deb"
    options = [
        f"--include={_SYSTEMD}",
        "--skip=cleanup/apt",
        f"--customize-hook=upload {package} /package.deb",
        f'--customize-hook=chroot "$1" {fetch}',
        '--customize-hook=rm "$1/package.deb"',
    ]
    return _image("trixie", options, depends)


def bookworm() -> Path:
    """Return Debian 12 with what it takes to make a virtual environment."""
    return _image("bookworm", [f"--include={_SYSTEMD},procps,python3-venv"])


def _image(suite: str, options: Sequence[str], made_from: str = "") -> Path:
    """Return an image, which is made if it is not there.

    Args:
        suite: the release of Debian.
        options: of mmdebstrap(1).
        made_from: what makes another image of it.
    """
    key = hashlib.sha256(Path(__file__).read_bytes() + made_from.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpechod"
    image = cache / f"boot-{suite}-{time.strftime('%Y%m')}-{key}.tar"
    if not image.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"boot-{suite}-*"):
            old.unlink()
        part = cache / f"part-{suite}.tar"
        mirror = os.environ.get("MIRROR")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", *options, suite, str(part)]
        subprocess.run([*command, *([mirror] if mirror else [])], check=True)
        part.rename(image)
    return image

"""Make the environment: ``python3 scripts/bootstrap.py [--venv .venv] [--extras dev]``.

Standard library only, and syntax that old Pythons parse, so that they get a remedy and not a traceback. It
makes the virtual environment, chooses a build of torch, and installs the package in editable form. A stamp in
the environment remembers what was installed, so a second call does nothing.

``NYBBLE_TORCH`` overrides the choice of torch: ``auto`` (default: ``cuda`` where an NVIDIA driver is found,
else ``cpu``), ``cpu``, ``cuda``. ``TORCH_INDEX`` names one more package index to look for torch in.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MIN_PYTHON = (3, 11)
SOURCES = ("pyproject.toml", "scripts/bootstrap.py")
CHOICES = ("auto", "cpu", "cuda")


def fail(message):
    """End with exit code 2 and one line."""
    sys.stderr.write(f"bootstrap: {message}\n")
    raise SystemExit(2)


def say(message):
    """One line of progress."""
    sys.stdout.write(f"bootstrap: {message}\n")
    sys.stdout.flush()


def check_python():
    """Refuse an interpreter that is too old, or that cannot make environments."""
    version = ".".join(str(part) for part in sys.version_info[:2])
    if sys.version_info < MIN_PYTHON:
        fail(
            f"Python {version} is too old: Nybble needs 3.11 or newer; install one (Debian: apt install "
            "python3.11 python3.11-venv) and run make PYTHON=python3.11"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail(
            f"{sys.executable} cannot make environments (no venv or ensurepip); on Debian and Ubuntu: "
            f"apt install python{version}-venv"
        )


def has_nvidia_driver():
    """True where the kernel's NVIDIA driver is loaded, or nvidia-smi lists a GPU."""
    if os.path.exists("/proc/driver/nvidia/version"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def wanted_torch(environ, driver):
    """``cpu`` or ``cuda``, from ``NYBBLE_TORCH`` and whether a driver was found."""
    choice = environ.get("NYBBLE_TORCH", "") or "auto"
    if choice not in CHOICES:
        fail(f"NYBBLE_TORCH={choice}: use auto, cpu or cuda")
    if choice == "auto":
        return "cuda" if driver else "cpu"
    return choice


def requirements():
    """The dependencies in pyproject.toml."""
    import tomllib

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        return tomllib.load(file)["project"]["dependencies"]


def torch_requirement():
    """The one on torch, such as ``torch>=2.11,<2.14``."""
    return next(r for r in requirements() if re.match(r"torch\s*[<>=!~]", r))


def image_requirements(wanted):
    """What a container image needs: all but Triton, which a CPU never reaches and which is large."""
    return [r for r in requirements() if wanted == "cuda" or not r.startswith("triton")]


def release(version):
    """``2.13.0+cpu`` -> (2, 13, 0); None for pre-releases."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+[\w.]+)?", version)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def in_range(version, requirement):
    """Whether a version satisfies the ``>=``/``<`` bounds of a requirement."""
    number = release(version)
    if number is None:
        return False
    for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", requirement):
        limit = release(bound)
        width = max(len(number), len(limit))
        left = number + (0,) * (width - len(number))
        right = limit + (0,) * (width - len(limit))
        if (operator == ">=" and left < right) or (operator == "<" and left >= right):
            return False
    return True


def choose_version(versions, requirement, wanted):
    """The newest version in range that is marked as the wanted build, or None.

    A CPU build carries the local version ``+cpu``. For ``cuda`` a version without that mark is taken.
    """
    fitting = [v for v in versions if in_range(v, requirement)]
    if wanted == "cpu":
        fitting = [v for v in fitting if v.endswith("+cpu")]
    else:
        fitting = [v for v in fitting if not v.endswith("+cpu")]
    return max(fitting, key=lambda v: (release(v), "+" in v), default=None)


class Installer:
    """pip of one environment, with the extra index if one was named."""

    def __init__(self, venv, extra_index):
        self.python = os.path.join(venv, "bin", "python")
        self.index = ["--extra-index-url", extra_index] if extra_index else []

    def _pip(self, *arguments, **keywords):
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, cwd=ROOT, text=True, check=False, **keywords)

    def install(self, *arguments):
        """Install, or end with pip's exit code (pip has told why)."""
        done = self._pip("install", "--quiet", *arguments)
        if done.returncode:
            raise SystemExit(done.returncode)

    def versions(self, name):
        """Every release that the configured indexes and find-links hold for this interpreter."""
        listing = self._pip(
            "index", "versions", name, *self.index, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        found = re.search(r"^Available versions: (.+)$", listing.stdout, re.MULTILINE)
        return [version.strip() for version in found.group(1).split(",")] if found else []

    def pulls_cuda(self, requirement):
        """Whether what pip would take depends on CUDA wheels here (asks for metadata only)."""
        done = self._pip(
            "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:",
            "--report", "-", *self.index, requirement, stdout=subprocess.PIPE,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.returncode)
        metadata = json.loads(done.stdout)["install"][0]["metadata"]
        needs = [r for r in metadata.get("requires_dist", ()) if re.match(r"(nvidia|cuda)-", r)]
        return bool(needs) and sys.platform == "linux"

    def install_torch(self, wanted):
        """Install the wanted build of torch, or the next best with a warning that names the remedy."""
        requirement = torch_requirement()
        version = choose_version(self.versions("torch"), requirement, wanted)
        if wanted == "cuda" and version is None:
            say(f"warning: only CPU builds of {requirement} are offered; TORCH_INDEX may name another index")
        elif wanted == "cpu" and version is None and self.pulls_cuda(requirement):
            say(
                "warning: no NVIDIA driver found, but the package index offers only a CUDA build of torch "
                "(gigabytes); to avoid that, interrupt and set TORCH_INDEX to an index with CPU builds"
            )
        say(f"installing torch ({wanted}): {version or requirement}")
        self.install(*self.index, f"torch==={version}" if version else requirement)


def fingerprint(environ):
    """A digest of everything, but the extras, that decides what is installed."""
    digest = hashlib.sha256(repr((sys.version_info[:2], ROOT)).encode())
    for name in ("NYBBLE_TORCH", "TORCH_INDEX"):
        digest.update(f"{name}={environ.get(name, '')}\n".encode())
    for source in SOURCES:
        with open(os.path.join(ROOT, source), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


class Stamp:
    """What was installed into an environment, remembered in a file of it."""

    def __init__(self, venv, digest):
        self.path = os.path.join(venv, ".nybble-installed.json")
        self.digest = digest
        self.extras = set()
        self.valid = False
        if os.path.exists(self.path):
            with open(self.path) as file:
                stored = json.load(file)
            self.valid = stored["digest"] == digest
            self.extras = set(stored["extras"]) if self.valid else set()

    def write(self, extras):
        """Remember that these extras are in."""
        with open(self.path, "w") as file:
            json.dump({"digest": self.digest, "extras": sorted(extras)}, file)


def make_venv(venv):
    """Create the environment if it is not there; a half-made one is made anew."""
    if os.path.exists(os.path.join(venv, "bin", "pip")):
        return
    say(f"making {os.path.relpath(venv)} with {sys.executable}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=False)
    if done.returncode:
        version = ".".join(str(part) for part in sys.version_info[:2])
        fail(
            f"could not make {os.path.relpath(venv)}; on Debian and Ubuntu: apt install python{version}-venv"
        )


def main(arguments=None):
    """Make or complete the environment."""
    parser = argparse.ArgumentParser(description="Make Nybble's environment.")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, comma separated")
    parser.add_argument("--image", action="store_true", help="for a container: dependencies, not the package")
    options = parser.parse_args(arguments)
    check_python()
    venv = os.path.abspath(options.venv)
    extras = {extra for extra in options.extras.split(",") if extra}
    wanted = wanted_torch(os.environ, has_nvidia_driver())
    stamp = Stamp(venv, fingerprint(os.environ))
    if stamp.valid and extras <= stamp.extras:
        return
    extras |= stamp.extras
    suffix = "[" + ",".join(sorted(extras)) + "]" if extras else ""
    make_venv(venv)
    installer = Installer(venv, os.environ.get("TORCH_INDEX", ""))
    installer.install_torch(wanted)
    if options.image:
        installer.install(*image_requirements(wanted))
        return
    say(f"installing nybble{suffix}")
    installer.install("--editable", ROOT + suffix)
    stamp.write(extras)


if __name__ == "__main__":
    main()

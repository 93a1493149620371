#!/usr/bin/env bash
# The front door: sets up, trains, repeats, judges, tests. ./run.sh --help says how.
set -euo pipefail

usage() {
    cat <<'END'
./run.sh                          the main job: with GPUs the medium preset on FineWeb; without, four runs of the
                                  nano preset on the embedded corpus, and the t-test's verdict on them
./run.sh --repeats N [flags]      a series of runs in records/, seeds 0..N-1, and its verdict; the same command
                                  again continues it. Flags: --preset --name --nproc --sequential --launcher
                                  --retry-crashed ... (./run.sh series --help); all others go to train_gpt.py
./run.sh test [pytest flags]      the test suite, two processes
./run.sh lint                     style, form and types: ruff and mypy; exit 3 where they are not installed
./run.sh study FILE.toml [flags]  what is each technique worth? (records/study_plan.py describes the file)
./run.sh sample | evaluate | export CHECKPOINT ...   text from it | its loss | a folder for transformers
./run.sh lab | studio             the tour of small models | train, watch and talk in the browser
./run.sh bench first|step|...     measure what a GPU can tell, in four commands; one JSON, one table (--cpu: small)
./run.sh setup [lab]              install only; with 'lab' also what the lab and the studio need
./run.sh python ...               the Python that all of this uses

Python: an active environment (or any python on the PATH) that has torch is used as it is, and so is the one that
PYTHON names; otherwise .venv is made and requirements.txt installed there, once. DRY_RUN=1 prints the last command
in place of running it.

Exit status of the main job and of --repeats: 0 the mean loss is below the threshold (or a single run finished),
1 it is not shown to be, 2 usage, 3 the runs cannot be judged, 4 the sequential test wants more runs, 5 input or
output failed (disk full, no rights), 6 a run crashed, 130 and 143 stopped; the same command continues.
END
}

say() { printf '%s\n' "run.sh: $*" >&2; }
die() { say "$@"; exit 2; }

# True if Python "$1" runs and is 3.10 or newer (a pyenv shim may exist and not run).
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# True if Python "$1" can import module "$2", without importing it (torch takes seconds).
has() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$2" 2>/dev/null; }

# Sets PY to the Python to use, and OWN to 1 if it is the one of our .venv (which may be installed into).
choose_python() {
    OWN=0
    if [ -n "${PYTHON:-}" ]; then
        PY=$PYTHON
        recent "$PY" || die "PYTHON=$PY does not run, or is older than Python 3.10"
        has "$PY" torch || die "PYTHON=$PY has no torch; install requirements.txt there, or leave PYTHON unset"
        return
    fi
    local candidate
    for candidate in python python3; do
        if command -v "$candidate" >/dev/null && recent "$candidate" && has "$candidate" torch; then
            PY=$candidate
            return
        fi
    done
    OWN=1
    PY=${PLACE}.venv/bin/python
    [ -x "$PY" ] && recent "$PY" && return
    make_venv
}

make_venv() {
    local candidate found=""
    for candidate in python3 python3.12 python3.13 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && recent "$candidate"; then
            found=${found:-$candidate}
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                say "making ${PLACE}.venv with $("$candidate" --version)"
                "$candidate" -m venv --clear "${PLACE}.venv"
                return
            fi
        fi
    done
    [ -n "$found" ] && die "$found cannot make environments: install its venv module (Debian: python3-venv)"
    die "Python 3.10 or newer is needed, and none is on the PATH"
}

# Installs requirements file "$1" into our .venv unless that very file was installed before.
install() {
    if [ "$OWN" = 0 ]; then
        return
    fi
    local stamp wanted
    stamp=${PLACE}.venv/.installed-$(basename "$1")
    wanted=$("$PY" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version)' "$1")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "installing $1 into .venv (once)"
    "$PY" -m pip install --disable-pip-version-check -q -r "$1" ||
        die "pip could not install $1; without a network, name a Python that has torch in PYTHON"
    printf '%s\n' "$wanted" >"$stamp"
}

# In an environment that is not ours, says what is missing rather than changing it.
need() {
    local module missing=""
    for module in "$@"; do
        has "$PY" "$module" || missing="$missing $module"
    done
    [ -z "$missing" ] && return
    say "$PY lacks$missing. It has torch, so it is used as it is: install them there (pip install -r requirements.txt),"
    die "or deactivate that environment and run.sh makes its own"
}

# Style, form and types; everything that is wrong is told before the exit.
lint() {
    [ -z "$ROOT" ] || cd "$ROOT"
    if ! has "$PY" ruff || ! has "$PY" mypy; then
        say "lint: skipped: $PY has no ruff or no mypy (./run.sh setup lab installs them; requirements-lab.txt)"
        exit 3
    fi
    local wrong=0
    "$PY" -m ruff check . || wrong=1
    "$PY" -m ruff format --check . || wrong=1
    "$PY" -m mypy || wrong=1
    exit "$wrong"
}

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s\n' "$*"
        exit 0
    fi
    exec "$@"
}

gpus() { "$PY" -c 'import torch; print(torch.cuda.device_count())'; }

# FineWeb is fetched before a series that trains on it by default; 30 shards are the medium run's 3 billion tokens.
fetch_fineweb() {
    local word preset=""
    for word in "$@"; do
        case $word in
        --train_files* | --preset=nano*) return ;;
        --preset=*) preset=${word#--preset=} ;;
        medium | small) preset=$word ;;
        nano | nano-plain | nano-frontier) return ;;
        esac
    done
    if [ -z "$preset" ] && [ "$(gpus)" = 0 ]; then
        return
    fi
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$PY -m data.fineweb --shards 30"
        return
    fi
    "$PY" -m data.fineweb --shards 30
}

main_job() {
    local count
    count=$(gpus)
    if [ "$count" -gt 0 ]; then
        say "$count GPU(s): one run of the medium preset (many of them: ./run.sh --repeats 19)"
        fetch_fineweb --preset=medium
        run "$PY" -m records.series --repeats 1 --preset medium --name auto --root "${PLACE}local/records" --checkpoint_every=500
    fi
    say "no GPU: four runs of the nano preset and their verdict, some minutes"
    run "$PY" -m records.series --repeats 4 --preset nano --name auto --root "${PLACE}local/records"
}

# Sets ROOT to the checkout that this file lies in, through symbolic links, as a prefix: empty if we stand in it.
# Elsewhere the caller's folder stays ours, so that relative paths mean what the caller means.
find_root() {
    local file=${BASH_SOURCE[0]} folder link
    while [ -L "$file" ]; do
        link=$(readlink "$file")
        case $link in
        /*) file=$link ;;
        *) file=$(dirname "$file")/$link ;;
        esac
    done
    folder=$(cd "$(dirname "$file")" && pwd -P)
    ROOT=""
    [ "$folder" = "$(pwd -P)" ] && return
    ROOT=$folder/
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
}

# Where .venv and the main job's runs are made: the checkout, or the cache folder if that may not be written to.
writable() {
    if [ -w "${ROOT:-.}" ]; then printf '%s' "$ROOT"; else printf '%s' "${XDG_CACHE_HOME:-$HOME/.cache}/speedrun/"; fi
}

find_root
PLACE=$(writable)
case ${1:-} in
-h | --help | help)
    usage
    exit 0
    ;;
esac
choose_python
install "${ROOT}requirements.txt"
training="numpy scipy matplotlib safetensors tqdm"
case ${1:-} in
"")
    need $training
    main_job
    ;;
test)
    shift
    need pytest xdist pytest_timeout hypothesis $training
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two test processes already fill two cores
    [ -z "$ROOT" ] || cd "$ROOT"
    run "$PY" -m pytest -n 2 "$@"
    ;;
lint) lint ;;
setup)
    [ "${2:-}" != lab ] || install "${ROOT}requirements-lab.txt"
    "$PY" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")'
    ;;
python) shift && run "$PY" "$@" ;;
series) shift && run "$PY" -m records.series "$@" ;;
study)
    shift
    need $training
    run "$PY" -m records.study "$@"
    ;;
sample | evaluate | export) run "$PY" "${ROOT}train_gpt.py" "$@" ;;
lab | studio)
    verb=$1
    shift
    [ ! -f "${ROOT}requirements-lab.txt" ] || install "${ROOT}requirements-lab.txt"
    if [ "$verb" = lab ]; then run "$PY" -m lab.tour "$@"; fi
    run "$PY" -m lab.studio "$@"
    ;;
bench) shift && run "$PY" -m bench.gpu "$@" ;;
--*)
    need $training
    fetch_fineweb "$@"
    run "$PY" -m records.series "$@"
    ;;
*) die "unknown word '$1'; see ./run.sh --help" ;;
esac

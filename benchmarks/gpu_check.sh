#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most ten minutes:
#
#     bash benchmarks/gpu_check.sh OUT_DIR
#
# correctness before times: tests compiled, engines against the reference after training,
# compute-sanitizer, timings (the torch.compile control last), profile. OUT_DIR receives seven files:
# summary.txt, a log per group of steps and rows.jsonl, a row per timed case; a row has a time only if
# what it times gave the right results. A step that fails or runs out of time does not stop the later
# ones; a test that is skipped though there is a GPU, or a missing row of engine "triton", fails. Exit
# code 0: all passed; 1: a step failed; 2: nothing could run (no GPU, no commit, a package is missing).
#
# The package needs no installation: a temporary folder on PYTHONPATH holds links to polygrad_fast/
# with kernels/ inside it, as setup.py lays them out. The checkout stays as it is.
#
# Environment: PYTHON (python3); TIME_LIMIT in seconds (540); WHEELS: a folder of wheels to install
# into the temporary folder first, within the limit; POLYGRAD_COMMIT: the commit written into the
# rows, "-dirty" appended for a changed tree, where the checkout is no git repository.
set -uo pipefail

if (( $# != 1 )); then
    echo "usage: bash benchmarks/gpu_check.sh OUT_DIR, got $# arguments" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
time_limit=${TIME_LIMIT:-540}
commit=${POLYGRAD_COMMIT:-$(git -C "$root" describe --always --abbrev=40 --exclude='*' --dirty \
    2>/dev/null)}
if [[ -z $commit ]]; then
    echo "POLYGRAD_COMMIT must name the commit: $root is no git repository" >&2
    exit 2
fi

packages=$(mktemp -d)
trap 'rm -rf "$packages" "$out/.tmp-rows.jsonl"' EXIT
mkdir "$packages/polygrad_fast"
ln -s "$root"/polygrad_fast/* "$packages/polygrad_fast/"
ln -s "$root/kernels" "$packages/polygrad_fast/kernels"
export PYTHONPATH="$packages:$packages/installed${PYTHONPATH:+:$PYTHONPATH}"
# The checkout's own polygrad_fast/, without kernels/, must not come first on sys.path.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET
cd "$root" || exit 2

summary=$out/summary.txt
rm -f "$out"/{tests,training,sanitizer,timings,profile}.log "$out/rows.jsonl"
echo "commit $commit, package from links in a temporary folder" >"$summary"
exit_code=0
if [[ -n ${WHEELS:-} ]] && ! "$python" -m pip install -q --no-index --no-deps --no-compile \
    --no-cache-dir --target "$packages/installed" "$WHEELS"/*.whl >>"$summary" 2>&1; then
    cat "$summary"
    exit 2
fi

left() {
    echo $((time_limit - SECONDS))
}

note() {
    printf '%-22s %s\n' "$1" "$2" | tee -a "$summary"
}

# step NAME SECONDS KIND LOG COMMAND...: run it, note how it ended, return 0 if it passed. KIND:
# required; optional, may run out of time or not run at all; informative, may fail too.
step() {
    local name=$1 limit=$2 kind=$3 log=$out/$4 begin=$SECONDS code result
    shift 4
    (( limit <= $(left) )) || limit=$(left)
    if (( limit < 5 )); then
        note "$name" "not run: no time left"
        [[ $kind != required ]] || exit_code=1
        return 1
    fi
    echo "==== $name, at most $limit s: $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case $code in
        0) result=passed ;;
        124 | 137) result="out of time" ;;
        *) result="FAILED ($code)" ;;
    esac
    note "$name" "$result, $((SECONDS - begin)) s, $(basename "$log")"
    if (( $(stat -c %s "$log") > 15000000 )); then
        tail -c 15000000 "$log" >"$packages/tail" && mv "$packages/tail" "$log"
    fi
    (( code == 0 )) && return 0
    if [[ $kind == required || ($kind == optional && $result == FAILED*) ]]; then
        exit_code=1
        tail -n 15 "$log"
    fi
    return 1
}

# tests NAME SECONDS LOG COMMAND...: a required step of pytest, whose tests must not be skipped. Those
# may be that need the interpreter, or that there is no GPU.
tests() {
    local name=$1 limit=$2 log=$3 skipped from=1
    shift 3
    [[ ! -e $out/$log ]] || from=$(($(wc -l <"$out/$log") + 1))
    step "$name" "$limit" required "$log" "$@" || return 1
    skipped=$(tail -n "+$from" "$out/$log" | grep -e '^SKIPPED' |
        grep -v -e 'what happens without a GPU' -e 'the kernels are compiled here')
    [[ -n $skipped ]] || return 0
    note "$name" "FAILED: skipped on a GPU"
    tee -a "$summary" <<<"$skipped"
    exit_code=1
    return 1
}

# 1. Versions, GPU, driver.
if ! timeout --kill-after=5 90 "$python" - >>"$summary" 2>&1 <<'PYTHON'
import importlib, platform, sys

missing = []
for name in ("torch", "triton", "numpy", "gymnasium", "safetensors", "tqdm", "pytest",
             "pytest_benchmark", "hypothesis", "mujoco"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError:
        missing.append(name)
if missing:
    sys.exit(f"missing packages: {' '.join(missing)}")
import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA GPU")
import polygrad_fast.kernels.guided_step
from polygrad_fast.kernels import residual_mlp

properties = torch.cuda.get_device_properties(0)
print("python", platform.python_version(), "CUDA", torch.version.cuda)
print(properties.name, f"sm_{properties.major}{properties.minor}",
      f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 1e9:.0f} GB")
print("kernels from", residual_mlp.__file__, "interpreted:", residual_mlp.is_interpreted())
PYTHON
then
    cat "$summary"
    exit 2
fi
nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.limit \
    --format=csv >>"$summary" 2>&1
cat "$summary"

# 2. Tests, compiled. Those that compile without a GPU run in CI. The kernels of the timed samples are
# compiled meanwhile, in processes of their own: triton finds them on disk.
cores=$(nproc)
sm=$(sed -n 's/.*sm_\([0-9]*\) .*/\1/p' "$summary" | head -n 1)
PYTHONPATH="$root/tests:$root/tests/kernels:$root/benchmarks:$PYTHONPATH" "$python" \
    tests/kernels/compile_sample.py "$sm" --timed --jobs "$cores" >"$packages/compiled" 2>&1 &
compiling=$!
pytest=("$python" -m pytest -q -rs -p no:cacheprovider)
parallel=()
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$((cores < 12 ? cores : 12))")
fi
without_gpu=(--ignore=tests/kernels/test_compiled.py --ignore=tests/kernels/test_compiled_sample.py
    --ignore=tests/kernels/test_recorded.py)
tests "kernels, parity" 170 tests.log env OMP_NUM_THREADS=1 "${pytest[@]}" "${parallel[@]}" \
    tests/kernels tests/parity "${without_gpu[@]}"
mapfile -t marked < <(grep -rl --include='test_*.py' 'mark\.gpu' tests |
    grep -v -e '^tests/kernels/' -e test_gpu_training)
tests "other gpu tests" 60 tests.log "${pytest[@]}" -m gpu "${marked[@]}"

# 3. Engines against the reference, and graph against eager, after 1,000 optimizer steps.
tests "after training" 90 training.log "${pytest[@]}" -m gpu tests/training/test_gpu_training.py

# 4. compute-sanitizer: single launches, each tensor an allocation of its own; then a captured chain.
once=("$python" benchmarks/profile_sampler.py --engine triton --dtype float16 --warmup 1 --samples 1)
small=("${once[@]}" --batch 5 --horizon 3 --num-steps 13 --hidden-dim 32 --policy-dim 16)
if command -v compute-sanitizer >/dev/null; then
    sanitizer=(compute-sanitizer --target-processes application-only --error-exitcode 86)
    step "memcheck, launches" 60 optional sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "${sanitizer[@]}" --tool memcheck "${pytest[@]}" tests/kernels/test_guided_step.py \
        tests/kernels/test_residual_mlp.py -k "odd_sizes or every_shipped_tile"
    for tool in memcheck racecheck initcheck; do
        if (( $(left) > 300 )); then # the timings need the rest
            step "$tool, chain" 45 optional sanitizer.log "${sanitizer[@]}" --tool "$tool" \
                "${small[@]}"
        else
            note "$tool, chain" "not run: no time left"
        fi
    done
else
    note "compute-sanitizer" "not run: not installed"
fi

# 5. Timings, most important first; 60 s are kept for the profile. A lost device (exit code 75) needs
# a new process, which goes on with the next case.
wait "$compiling" || note "compiled before" "FAILED, $(tail -n 1 "$packages/compiled")"
tests=passed
(( exit_code == 0 )) || tests=failed
seconds=$(($(left) - 60))
begin_again='
end=$(($(date +%s) + $1)); shift
while true; do
    "$@" --time-budget "$((end - $(date +%s)))"; code=$?
    (( code == 75 )) || exit "$code"
done'
step "timings" "$seconds" optional timings.log bash -c "$begin_again" timings "$((seconds - 25))" \
    "${pytest[@]}" -vv benchmarks --benchmark-only --rows "$out/rows.jsonl" --resume \
    --commit "$commit" --tests "$tests"
PYTHONPATH="$root/benchmarks:$PYTHONPATH" "$python" - "$out/rows.jsonl" >>"$summary" 2>&1 \
    <<'PYTHON' || exit_code=1
import sys

from harness.report import listing
from harness.rows import read_rows

rows = read_rows(sys.argv[1])
print(listing(rows))
wanted = {"engine": "triton", "denoiser": "residual_mlp", "batch": 1024, "horizon": 10}
timed = [
    row for row in rows
    if row.benchmark == "sample" and row.ms and wanted.items() <= row.case.items()
]
if not timed:
    sys.exit("FAILED: no time of engine triton at B = 1024, H = 10")
PYTHON

# 6. Where the time goes: kernel times of one sample, then counters of one diffusion step.
step "kernel times" 30 informative profile.log "${once[@]}" --kernel-times
if command -v ncu >/dev/null; then
    # a step is 8 layers and the guided step: three steps skipped, one measured
    step "ncu" 30 informative profile.log ncu --clock-control none \
        --target-processes application-only --launch-skip 27 --launch-count 9 \
        --kernel-name 'regex:residual_mlp_layer|guided_step' --section SpeedOfLight \
        --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis \
        "${once[@]}"
else
    note "ncu" "not run: not installed"
fi

echo
cat "$summary"
exit "$exit_code"

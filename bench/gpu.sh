#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one command, under 9 minutes in all:
#
#     bench/gpu.sh              real sizes on a GPU
#     bench/gpu.sh --dry        the same steps at toy sizes, also without a GPU
#
# Each step has a time limit and may fail: the rest goes on, and the end says which did. Reports
# (JSON) and the log go to $OUT, else bench/results; a short table comes last. No plots: draw them
# later with `python -m bench.plots FILE.json`. $PYTHON names an interpreter, $SECONDS_IN_ALL a
# deadline (530), $STEPS the steps to run (all).
set -u
cd "$(dirname "$0")/.."

SIZE=gpu
[ "${1:-}" = --dry ] && SIZE=tiny
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${SECONDS_IN_ALL:-530}))
STEPS=${STEPS:-ceilings speed parts tests precision memory memcheck racecheck step}
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
LOG=$OUT/gpu.log
: >"$LOG"
outcomes=()

# step NAME LIMIT COMMAND…: at most LIMIT seconds, and never past the deadline.
step() {
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) start=$SECONDS code outcome
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return 0
    if ((left < 15)); then
        outcomes+=("$name: not run, no time left")
        return 0
    fi
    ((limit > left)) && limit=$left
    printf '\n== %s: %s\n' "$name" "$*" >>"$LOG"
    timeout --kill-after=5 "$limit" "$@" >>"$LOG" 2>&1
    code=$?
    case $code in
    0) outcome=ok ;;
    124 | 137) outcome="stopped after its $limit s" ;;
    *) outcome="failed with $code: $(tail -n 1 "$LOG" | cut -c1-100)" ;;
    esac
    outcomes+=("$name: $outcome ($((SECONDS - start)) s)")
    echo "${outcomes[-1]}"
}

# bench NAME LIMIT MODULE OPTION…: a bench told to stop measuring in time to write its report.
bench() {
    local name=$1 limit=$2 module=$3
    shift 3
    step "$name" "$limit" "$PYTHON" -m "bench.$module" --size "$SIZE" \
        --seconds $((limit > 40 ? limit - 25 : limit / 2)) "$@"
}

bench ceilings 40 ceilings --repeats 3
bench speed 200 loss_speed --repeats 5 --no-plot
bench parts 40 parts --repeats 3
if compgen -G 'tests/gpu/test_*.py' >/dev/null; then
    step tests 150 "$PYTHON" -m pytest -q --maxfail=5 -p no:cacheprovider -p no:xdist tests/gpu
else
    outcomes+=("tests: there is no tests/gpu")
fi
bench precision 50 loss_precision --no-plot
bench memory 80 loss_memory --no-plot
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
            "$PYTHON" -m tests.gpu.sanitize
    done
elif [[ $STEPS == *memcheck* || $STEPS == *racecheck* ]]; then
    outcomes+=("memcheck, racecheck: there is no compute-sanitizer")
fi
if [ -f bench/step.py ]; then
    step step 90 "$PYTHON" -m bench.step --size "$SIZE" --steps 1 --seconds 25
fi

echo
"$PYTHON" -m bench.summary "$OUT" 2>>"$LOG" | tee -a "$LOG"
printf '%s\n' "${outcomes[@]}" | tee -a "$LOG"
echo "$SECONDS s; log: $(basename "$LOG")"

#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in calls of under 9 minutes; each goes on where the
# earlier ones ended. Correctness first:
#
#     bench/gpu.sh tests precision                    the kernels on a GPU, and how exact they are
#     bench/gpu.sh ceilings parts speed               the contract's times, then the rivals
#     bench/gpu.sh memory memcheck racecheck step     peaks, compute-sanitizer, a training step
#     bench/gpu.sh                                    whatever is not done yet, in this order
#     bench/gpu.sh --dry …                            the same at toy sizes, also without a GPU
#     bench/gpu.sh --again …                          forget what earlier calls did
#
# Each step has a time limit and may fail: the rest goes on, and the end says which did. A step that
# failed is run again when it is named. Reports (JSON), the list of what is done and the log go to
# $OUT, else bench/results; with another $OUT, what bench/results holds counts as done too. A short
# table comes last. No plots: draw them later with `python -m bench.plots FILE.json`. $PYTHON names
# an interpreter, $SECONDS_IN_ALL a deadline (530), $STEPS the steps where no argument does.
set -u
cd "$(dirname "$0")/.."

SIZE=gpu AGAIN=
while [[ "${1:-}" == --* ]]; do
    case $1 in
    --dry) SIZE=tiny ;;
    --again) AGAIN=1 ;;
    *) echo "$1: got an unknown option, expected --dry or --again" >&2 && exit 2 ;;
    esac
    shift
done
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${SECONDS_IN_ALL:-530}))
ALL="tests precision ceilings parts speed memory memcheck racecheck step"
NAMED=${*:-${STEPS:-}}
for name in $NAMED; do
    [[ " $ALL " == *" $name "* ]] || { echo "$name: expected one of: $ALL" >&2 && exit 2; }
done
export OUT=${OUT:-$PWD/bench/results}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
LOG=$OUT/gpu.log
DONE=$OUT/gpu-$SIZE.done # a line for each finished step: its name, then ok or failed
if [ -n "$AGAIN" ]; then
    rm -f "$DONE" "$OUT"/*-"$SIZE".json
elif ! [ "$OUT" -ef bench/results ]; then
    for file in bench/results/*-"$SIZE".json bench/results/gpu-"$SIZE".done; do
        [ -e "$file" ] && ! [ -e "$OUT/${file##*/}" ] && cp "$file" "$OUT"
    done
fi
touch "$DONE"
: >"$LOG"
outcomes=()

say() {
    outcomes+=("$1")
    echo "$1"
}

# wanted NAME: is this step asked for and not done? NAME may be STEP:PART.
wanted() {
    [[ " ${NAMED:-$ALL} " == *" ${1%%:*} "* ]] || return 1
    if grep -qx "$1 ok" "$DONE"; then
        say "$1: ok in an earlier call"
        return 1
    elif [ -z "$NAMED" ] && grep -qx "$1 failed" "$DONE"; then
        say "$1: failed in an earlier call; name it to run it again"
        return 1
    elif ((DEADLINE - SECONDS < 15)); then
        say "$1: not run, no time left"
        return 1
    fi
}

# capped LIMIT: LIMIT seconds, or what is left of the deadline.
capped() {
    local left=$((DEADLINE - SECONDS))
    echo $(($1 < left ? $1 : left))
}

# run NAME LIMIT COMMAND…: at most LIMIT seconds, and never past the deadline.
run() {
    local name=$1 limit start=$SECONDS code outcome state=
    limit=$(capped "$2")
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" >>"$LOG"
    timeout --kill-after=5 "$limit" "$@" >>"$LOG" 2>&1
    code=$?
    case $code in
    0) outcome=ok state=ok ;;
    75) outcome="not complete, the next call goes on" ;; # bench.resume.UNFINISHED
    124 | 137) outcome="stopped after its $limit s, the next call goes on" ;;
    *) outcome="failed with $code: $(tail -n 1 "$LOG" | cut -c1-100)" state=failed ;;
    esac
    if [ -n "$state" ]; then
        sed -i "/^$name /d" "$DONE"
        echo "$name $state" >>"$DONE"
    fi
    say "$name: $outcome ($((SECONDS - start)) s)"
}

# bench NAME LIMIT MODULE OPTION…: a bench told to stop measuring in time to write its report.
bench() {
    local name=$1 limit module=$3
    wanted "$name" || return 0
    limit=$(capped "$2")
    shift 3
    run "$name" "$limit" "$PYTHON" -m "bench.$module" --size "$SIZE" --resume "$@" \
        --seconds $((limit > 40 ? limit - 25 : limit / 2))
}

for file in tests/gpu/test_*.py; do
    part=$(basename "$file" .py)
    wanted "tests:$part" && run "tests:$part" 400 \
        "$PYTHON" -m pytest -q --maxfail=5 -p no:cacheprovider -p no:xdist "$file"
done
bench precision 60 loss_precision --no-plot
bench ceilings 50 ceilings --repeats 3
bench parts 60 parts --repeats 3
bench speed 400 loss_speed --no-plot
bench memory 120 loss_memory --no-plot
if ! command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        wanted $tool && say "$tool: there is no compute-sanitizer"
    done
else
    warm=
    for tool in memcheck racecheck; do
        wanted $tool || continue
        # Compiling under the sanitizer would take its time limit: fill Triton's cache without it.
        [ -n "$warm" ] || run warm 90 "$PYTHON" -m tests.gpu.sanitize
        warm=1
        run $tool 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
            --error-exitcode 9 --print-limit 5 "$PYTHON" -m tests.gpu.sanitize
    done
fi
# It has a limit for each trainer.
wanted step && run step 120 \
    "$PYTHON" -m bench.step --size "$SIZE" --steps 1 --seconds 35 --resume

echo
"$PYTHON" -m bench.summary "$OUT" 2>>"$LOG" | tee -a "$LOG"
printf '%s\n' "${outcomes[@]}" | tee -a "$LOG"
echo "$SECONDS s; log: $(basename "$LOG")"

#!/usr/bin/env bash
# Runs kvkernels_sanitizer under each of compute-sanitizer's tools: bash run.sh PROGRAM OUT_DIR
#
# OUT_DIR/<step>.txt holds all that a step said; printed is a line a step. `plain` is the program alone. `control` is a
# read past the end of an allocation, which memcheck must report: a tool that is blind finds nothing anywhere.
#
# Exit status: 0 where every byte is right and no tool reports anything, 1 where that is not so, 2 where nothing could be
# run. Whether racecheck follows bulk copies and their mbarriers is not known: what it says of them has to be read.
set -uo pipefail

readonly REPORTED=86  # compute-sanitizer's exit status where it reports an error; the program itself never has it
readonly LIMIT_S=60   # of a step: a tool that hangs must not hold up the others

cannot() {
  echo "sanitizer: $1" >&2
  exit 2
}

[ $# -eq 2 ] || cannot "usage: bash run.sh PROGRAM OUT_DIR"
program=$1
out=$2
[ -x "$program" ] || cannot "PROGRAM must be an executable file, got '$program'"
PATH=$PATH:${CUDA_HOME:+$CUDA_HOME/bin:}/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null ||
  cannot "compute-sanitizer, which is part of the CUDA toolkit, is neither on the PATH nor in /usr/local/cuda/bin"
mkdir -p "$out" || cannot "OUT_DIR must be a folder that can be written, got '$out'"

failed=0
child=""
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; exit 1' INT TERM

# What a step's output comes to: the tool's summary and the program's, or else its last line.
summary() {
  grep -E 'SUMMARY: |wrong bytes$' "$1" | tail -n 2 | sed 's/^=* *//' | paste -sd ';' | sed 's/;/; /' | grep . ||
    tail -n 1 "$1"
}

# Runs a command and says what came of it: name, exit status that is wanted, command.
step() {
  local name=$1 wanted=$2 began=$SECONDS status word=ok
  shift 2
  # In a group of its own, which whoever ends this script does not reach.
  timeout "$LIMIT_S" "$@" >"$out/$name.txt" 2>&1 &
  child=$!
  wait "$child"
  status=$?
  if [ "$name" = plain ] && [ "$status" -eq 2 ]; then
    cat "$out/$name.txt" >&2
    exit 2
  fi
  if [ "$status" -ne "$wanted" ]; then
    word=FAILED
    failed=1
  fi
  printf '%-10s %-6s exit status %d, %d s: %s\n' "$name" "$word" "$status" $((SECONDS - began)) \
    "$(summary "$out/$name.txt")"
}

step plain 0 "$program"
step control "$REPORTED" compute-sanitizer --tool memcheck --error-exitcode "$REPORTED" "$program" --plant bounds
for tool in memcheck racecheck synccheck; do
  step "$tool" 0 compute-sanitizer --tool "$tool" --error-exitcode "$REPORTED" "$program"
done
exit "$failed"

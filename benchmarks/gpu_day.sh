#!/usr/bin/env bash
# One command for a machine with a GPU and neither pip nor a network: is every byte right there, and how fast is it.
#
#     bash benchmarks/gpu_day.sh OUT [SECONDS]
#
# Takes python3 (or $PYTHON) as it is, with the torch that it has, and runs these parts, each under a limit of its own:
#
#     library    takes the library and _host from kvkernels/, or builds what is missing for this card alone
#     tests      everything marked `cuda`
#     sanitizer  every kernel once under memcheck, racecheck and synccheck
#     figures    benchmarks/gpu.py
#     report     tables and charts, and at the end the closing table
#
# It ends within SECONDS (540) by its own clock. Where that is too short, parts are dropped in this order: of the figures
# the last ones of gpu.py's own order, then the sanitizer, then the rest of the figures; the tests are cut at 30 of 100
# seconds, and the report always runs. Everything is written to OUT as it happens, so that a kill loses only the part
# that runs: log.txt, parts.tsv, tests.xml, gpu.jsonl, gpu-<card>.md, gpu-<card>.png. The exit status is 0 where every
# part that ran succeeded.
#
# Settings, as environment variables. KVKERNELS_DAY_FIGURES goes to gpu.py (the rivals' files, say), KVKERNELS_DAY_TESTS
# to pytest, KVKERNELS_DAY_CMAKE to CMake, KVKERNELS_DAY_BUILD is the build's folder. KVKERNELS_DAY_PACKAGE is the folder
# of the package where that is not the source tree, and KVKERNELS_DAY_SANITIZER a program that is built already.
set -uo pipefail # not -e: a part that fails must not end the others
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || {
  echo "usage: bash benchmarks/gpu_day.sh OUT [SECONDS]" >&2
  exit 2
}
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
total_s=${2:-540}
python=${PYTHON:-python3}
package=${KVKERNELS_DAY_PACKAGE:-$PWD/kvkernels}
build=${KVKERNELS_DAY_BUILD:-build/gpu-day}
sanitizer=${KVKERNELS_DAY_SANITIZER:-$build/kvkernels_sanitizer}
report_s=$((total_s * 5 / 100))
failed=0
export PYTHONPATH="${package%/*}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: >"$out/log.txt"
printf 'part\tstatus\tseconds\n' >"$out/parts.tsv"

left_s() {
  echo $((total_s - SECONDS - report_s))
}

# part NAME LIMIT_S COMMAND...: runs a part, adds what it says to the log, and notes how it ended; 124 is its limit.
part() {
  local name=$1 limit_s=$2 began_s=$SECONDS status
  shift 2
  printf '== %s: from second %d, for at most %d\n' "$name" "$SECONDS" "$limit_s" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$limit_s" "$@" >>"$out/log.txt" 2>&1
  status=$?
  printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - began_s)) >>"$out/parts.tsv"
  tail -n 1 "$out/log.txt"
  [ "$status" -eq 0 ] || failed=1
  return "$status"
}

drop() {
  printf '== %s: dropped, %s\n' "$1" "$2" | tee -a "$out/log.txt"
  printf '%s\tdropped\t0\n' "$1" >>"$out/parts.tsv"
}

# This card's compute capability as CMake writes it: 90 for 9.0.
architecture() {
  "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))'
}

is_built() {
  [ -e "$package/libkvkernels_ops.so" ] && (cd / && "$python" -c 'import kvkernels._host')
}

# Builds what is not there: the library, _host for this Python, and the sanitizer's program.
library() {
  local targets=()
  is_built || targets+=(kvkernels_ops kvkernels_host)
  [ -x "$sanitizer" ] || targets+=(kvkernels_sanitizer)
  [ ${#targets[@]} -eq 0 ] || build "${targets[@]}" || return
  (cd / && "$python" -m kvkernels info)
}

build() {
  # shellcheck disable=SC2086  # several options in one variable
  cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DKVKERNELS_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$(architecture)-real" ${KVKERNELS_DAY_CMAKE:-} &&
    cmake --build "$build" --target "$@" || return
  [ "$1" = kvkernels_sanitizer ] || cmake --install "$build" --prefix "$package" || return
  [ -x "$sanitizer" ] || sanitizer=$build/tests/sanitizer/kvkernels_sanitizer
}

sanitize() {
  local folder status
  folder=$(mktemp -d)
  bash tests/sanitizer/run.sh "$sanitizer" "$folder"
  status=$?
  tail -n 40 "$folder"/*.txt
  rm -rf "$folder"
  return "$status"
}

export -f architecture is_built library build sanitize
export python package build sanitizer
in_shell() {
  bash -c "set -uo pipefail; $1"
}
export -f in_shell

printf 'torch %s, %s\n' "$("$python" -c 'import torch; print(torch.__version__)')" \
  "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi')" |
  tee -a "$out/log.txt"

if part library $((total_s * 20 / 100)) in_shell library; then
  # shellcheck disable=SC2086
  part tests $((total_s * 30 / 100)) env KVKERNELS_REQUIRE_CUDA=1 "$python" -m pytest -m cuda -n auto --maxprocesses=8 \
    --dist loadfile -p no:cacheprovider --junitxml="$out/tests.xml" ${KVKERNELS_DAY_TESTS:-}
  if [ "$(left_s)" -ge $((total_s * 55 / 100)) ]; then
    part sanitizer $((total_s * 10 / 100)) in_shell sanitize
  else
    drop sanitizer "for the figures' sake: $(left_s) s are left"
  fi
  if [ "$(left_s)" -gt 10 ]; then
    # shellcheck disable=SC2086
    part figures "$(left_s)" "$python" benchmarks/gpu.py --seconds $(($(left_s) - 10)) --out "$out/gpu.jsonl" \
      ${KVKERNELS_DAY_FIGURES:-}
  else
    drop figures "$(left_s) s are left"
  fi
  part report "$report_s" "$python" benchmarks/gpu_report.py "$out/gpu.jsonl" --out "$out"
fi
cat "$out/parts.tsv"
"$python" benchmarks/gpu_report.py --closing "$out/gpu.jsonl"
exit "$failed"

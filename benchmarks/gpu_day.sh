#!/usr/bin/env bash
# One command for a machine with a GPU and neither pip nor a network: is every byte right there, and how fast is it.
#
#     bash benchmarks/gpu_day.sh OUT [SECONDS]
#
# Takes python3 (or $PYTHON) as it is, with the torch that it has, and runs these parts, each under a limit of its own:
#
#     library    takes the library and _host from kvkernels/, or builds what is missing for this card alone
#     program    the same with the sanitizer's program; without it the sanitizer is not run
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
rm -f "$out/gpu.jsonl" "$out/tests.xml"
: >"$out/log.txt"
printf 'part\tstatus\tseconds\n' >"$out/parts.tsv"

left_s() {
  echo $((total_s - SECONDS - report_s))
}

# part NAME LIMIT_S COMMAND...: runs a part, adds what it says to the log, and notes how it ended. Status 124 is its
# limit, and 2 of the sanitizer that the tool or the program is not there. A part is interrupted first, so that pytest
# says what it has.
part() {
  local name=$1 limit_s=$2 began_s=$SECONDS status
  shift 2
  printf '== %s: from second %d on, at most %d\n' "$name" "$SECONDS" "$limit_s" | tee -a "$out/log.txt"
  timeout --signal=INT --kill-after=10 "$limit_s" "$@" >>"$out/log.txt" 2>&1
  status=$?
  printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - began_s)) >>"$out/parts.tsv"
  tail -n 1 "$out/log.txt"
  [ "$status" -eq 0 ] || [ "$name" = program ] || [ "$name $status" = "sanitizer 2" ] || failed=1
  return "$status"
}

drop() {
  printf '== %s: dropped, %d s are left\n' "$1" "$(left_s)" | tee -a "$out/log.txt"
  printf '%s\tdropped\t0\n' "$1" >>"$out/parts.tsv"
}

# Builds what is not there, and leaves what is.
library() {
  local targets=()
  [ -e "$package/libkvkernels_ops.so" ] || targets+=(kvkernels_ops)
  has_host || targets+=(kvkernels_host)
  if [ ${#targets[@]} -gt 0 ]; then
    compile "${targets[@]}" || return
    [ -e "$package/libkvkernels_ops.so" ] || cp "$build/libkvkernels_ops.so" "$package/" || return
    has_host || cp "$build"/_host*.so "$package/" || return
  fi
  (cd / && "$python" -m kvkernels info)
}

# For this Python; it is a module of its own, which needs nothing of the package.
has_host() {
  local suffix
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  [ -e "$package/_host$suffix" ]
}

program() {
  [ -x "$sanitizer" ] || compile kvkernels_sanitizer
}

# For this card's architecture alone: a fraction of the time of all.
compile() {
  local architecture
  architecture=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability(0))') || return
  # shellcheck disable=SC2086  # several options in one variable
  cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DKVKERNELS_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$architecture" ${KVKERNELS_DAY_CMAKE:-} || return
  cmake --build "$build" --target "$@"
}

sanitize() {
  local folder status
  folder=$(mktemp -d)
  bash tests/sanitizer/run.sh "$sanitizer" "$folder" | tee "$folder/summary"
  status=${PIPESTATUS[0]}
  for step in "$folder"/*.txt; do
    [ -e "$step" ] && printf -- '-- %s\n' "$(basename "$step")" && tail -n 40 "$step"
  done
  cat "$folder/summary"
  rm -rf "$folder"
  return "$status"
}

# `timeout` starts programs, not functions.
export -f library has_host program compile sanitize
export python package build sanitizer

{
  nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max --format=csv,noheader
  "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
} 2>&1 | tee -a "$out/log.txt"

if part library $((total_s * 15 / 100)) bash -c library; then
  # Not `-m pytest`, which would find the tree's package before one that lies elsewhere.
  # shellcheck disable=SC2086
  part tests $((total_s * 30 / 100)) env KVKERNELS_REQUIRE_CUDA=1 \
    "$python" -c 'import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    -m cuda -n auto --maxprocesses=8 --dist loadfile -p no:cacheprovider --junitxml="$out/tests.xml" \
    ${KVKERNELS_DAY_TESTS:-}
  if [ "$(left_s)" -ge $((total_s * 55 / 100)) ]; then
    part program $((total_s * 5 / 100)) bash -c program
    part sanitizer $((total_s * 10 / 100)) bash -c sanitize
  else
    drop sanitizer
  fi
  if [ "$(left_s)" -gt 20 ]; then
    # shellcheck disable=SC2086
    part figures "$(left_s)" "$python" benchmarks/gpu.py --seconds $(($(left_s) - 10)) --out "$out/gpu.jsonl" \
      ${KVKERNELS_DAY_FIGURES:-}
  else
    drop figures
  fi
fi
if [ -e "$out/gpu.jsonl" ]; then
  part report "$report_s" "$python" benchmarks/gpu_report.py "$out/gpu.jsonl" --out "$out"
  "$python" benchmarks/gpu_report.py --closing "$out/gpu.jsonl"
fi
cat "$out/parts.tsv"
exit "$failed"

#!/usr/bin/env bash
# One command on a machine with a GPU, with neither pip nor a network: is every byte right there, and how fast is it.
#
#     bash benchmarks/gpu_day.sh OUT [SECONDS]
#
# Uses python3 (or $PYTHON) as it is, with the torch that it has. Runs, in this order, and each under a limit of its own:
#
#     library    the files that lie in kvkernels/, or a build for this card's architecture alone
#     tests      everything marked `cuda`
#     sanitizer  memcheck, racecheck and synccheck over a program that launches each kernel
#     figures    benchmarks/gpu.py, which drops its parts from the end of its own order
#     report     tables and plots from what the figures left, and the closing table
#
# It ends within SECONDS (540) by its own clock. What there is no time for is dropped from the end, the report never: the
# figures get what is left after it, and the sanitizer is left out where less than three quarters of the time is left
# for them. Everything is written to OUT as it happens, so a kill loses only what was running. The exit status is 0 where
# every part that ran succeeded.
#
# For the dry run on the stand-in for CUDA (`make gpu-dry-run`): KVKERNELS_DAY_SCALE makes all of it small,
# KVKERNELS_DAY_PYTEST and KVKERNELS_DAY_CMAKE go to pytest and CMake, KVKERNELS_DAY_BUILD is the build's folder and
# KVKERNELS_DAY_PACKAGE the folder that has or gets the package.

#!/bin/sh
# Every line of stdin under every preference, some at a time, in order, with GNU parallel: parallel.sh < things.txt
set -eu
parallel --jobs "${JOBS:-2}" --keep-order --tag \
    metaalign-edge chat --no-stdin --temp 0 --pref '{2}' -- '"What is "{1}"?"' :::: - ::: @child @expert

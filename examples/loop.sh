#!/bin/sh
# Answer lines of "preference|question" one by one; a line that fails is reported, and the loop goes on.
set -eu
while IFS='|' read -r pref query; do
    printf '[%s] ' "${pref:-no preference}"
    metaalign-edge chat --no-stdin --temp 0 ${pref:+--pref "$pref"} -- "$query" || echo "exit code $?"
done

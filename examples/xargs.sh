#!/bin/sh
# Ask about every line of stdin, some at a time, an answer a file: xargs.sh FOLDER < things.txt
set -eu
mkdir -p -- "${1:?name a folder for the answers}"
# NUL between lines, so that quotes and blanks are text; -- before the query, as it may begin with a hyphen.
# shellcheck disable=SC2016  # the inner shell expands them
tr '\n' '\0' | xargs -0 -n 1 -P "${JOBS:-2}" sh -c '
    name=$(printf %s "$2" | tr -c "[:alnum:]\n" -)
    metaalign-edge chat --no-stdin --temp 0 -- "What is $2?" > "$1/$name.txt"
' sh "$1"

#!/bin/sh
# Answer a file of questions every night, as cron does: no terminal, no home, one at a time, with a log.
# crontab: 15 3 * * *  PATH=/srv/venv/bin:/usr/bin:/bin /srv/nightly.sh /srv/questions.jsonl
set -u
answers=${1%.jsonl}-answers.jsonl
exec </dev/null >>"${1%.jsonl}.log" 2>&1
export METAALIGN_EDGE_CACHE="${1%.jsonl}.cache"
status=0
metaalign-edge batch "$1" -o "$answers" --seed 1 --parallel 4 || status=$?
case $status in # a second one is refused while the first still writes, and one that was killed goes on where it was
0) echo "$(date): done" ;;
*) echo "$(date): failed with $status" ;;
esac
exit "$status"

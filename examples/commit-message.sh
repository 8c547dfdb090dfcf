#!/bin/sh
# Propose a message for what is staged, and open it in your editor before anything is committed.
set -eu
ask() {
    metaalign-edge chat --pref "One line in the imperative, at most fifty characters." \
        "Write the commit message for this change."
}
if git diff --cached --quiet; then
    echo "nothing is staged: git add something first" >&2
    exit 2
fi
if message=$(git diff --cached | ask 2>/dev/null); then status=0; else status=$?; fi
if [ "$status" -eq 6 ]; then # longer than the model's context: its summary will do
    message=$(git diff --cached --stat | ask)
elif [ "$status" -ne 0 ]; then
    exit "$status"
fi
git commit --edit --cleanup=strip --message "$message"

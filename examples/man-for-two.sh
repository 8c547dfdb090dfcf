#!/bin/sh
# Sum up a manual page for a child and for an expert, from one reading: man-for-two.sh tar
set -eu
page=$(MANWIDTH=80 man -- "${1:?name a command}") # fails here if there is none
printf '%s\n' "$page" | head -c "${BYTES:-6000}" |
    metaalign-edge compare --pref @child --pref @expert "What is this for? Sum it up in two sentences."

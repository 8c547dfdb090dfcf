#!/bin/sh
# Name text files after what is in them: rename.sh *.txt. It shows each name and asks first; nothing is overwritten.
set -eu
for file in "$@"; do
    [ -s "$file" ] || continue
    name=$(head -c 1500 -- "$file" | metaalign-edge chat --max-tokens 16 "Name this text in three words.") || continue
    # What a model says is only text: of it, keep letters, digits and hyphens.
    name=$(printf %s "$name" | LC_ALL=C tr '[:upper:] _' '[:lower:]--' | LC_ALL=C tr -cd 'a-z0-9-' | cut -c 1-40)
    name=${name#"${name%%[!-]*}"} # without hyphens in front
    base=${file##*/}
    case $base in *.*) name=${name:+$name.${base##*.}} ;; esac
    target=$(dirname -- "$file")/$name
    if [ -z "$name" ] || [ -e "$target" ]; then
        printf '%s: no name, or one that is taken (%s)\n' "$file" "$name" >&2
        continue
    fi
    printf '%s -> %s? [y/N] ' "$file" "$target" >&2
    read -r answer || exit 0
    if [ "$answer" = y ]; then mv -- "$file" "$target"; fi
done

# Completion of metaalign-edge in bash: eval "$(metaalign-edge completion bash)"
_metaalign_edge() {
    local rest=${COMP_LINE:0:COMP_POINT} words=() word blank line
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do # bash cuts words at @ = : too: join what no blank separates
        blank=${rest%%[![:space:]]*}
        rest=${rest#"$blank"}
        word=${rest:0:${#word}} # up to the cursor
        rest=${rest:${#word}}
        if [[ -n $blank || ${#words[@]} -eq 0 ]]; then
            words+=("$word")
        else
            words[${#words[@]} - 1]+=$word
        fi
    done
    word=${words[${#words[@]} - 1]#[\"\']}
    blank=${word%"$2"} # what readline keeps of the last word
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("${line#"$blank"}")
    done < <("$1" completion bash -- "${words[@]:1:${#words[@]}-2}" "$word" 2>/dev/null)
}
complete -o default -F _metaalign_edge metaalign-edge mae

#compdef metaalign-edge mae
# Completion of metaalign-edge in zsh, after compinit: source <(metaalign-edge completion zsh)
_metaalign_edge() {
    local line
    local -a before values shown
    (( CURRENT > 2 )) && before=("${(@Q)words[2,CURRENT-1]}")
    for line in "${(@f)$("$words[1]" completion zsh -- "${before[@]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        [[ -n $line ]] && values+=("${line%%$'\t'*}") shown+=("${line/$'\t'/  }")
    done
    if (( $#values )); then compadd -l -d shown -a values; else _files; fi
}
if [[ $funcstack[1] = _metaalign[-_]edge ]]; then _metaalign_edge; else compdef _metaalign_edge metaalign-edge mae; fi

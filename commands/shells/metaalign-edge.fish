# Completion of metaalign-edge in fish: metaalign-edge completion fish | source
function __metaalign_edge
    set -l words (commandline -opc)
    set -l found ($words[1] completion fish -- $words[2..] "$(commandline -ct)" 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c metaalign-edge -f -a '(__metaalign_edge)'
complete -c mae -f -a '(__metaalign_edge)'

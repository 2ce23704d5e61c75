# bash completion of ptender, made of its table of options (share/pages.py)
_ptender() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    [ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD - 2]}
    [ "$word" != = ] || word=
    compopt -o filenames 2>/dev/null
    case $before in
    --name) mapfile -t COMPREPLY < <(true) && return ;;
    --mem) mapfile -t COMPREPLY < <(true) && return ;;
    --net) mapfile -t COMPREPLY < <(true) && return ;;
    --block) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --net-rate) mapfile -t COMPREPLY < <(true) && return ;;
    --block-rate) mapfile -t COMPREPLY < <(true) && return ;;
    --console-limit) mapfile -t COMPREPLY < <(true) && return ;;
    --dumpcore) mapfile -t COMPREPLY < <(compgen -d -- "$word") && return ;;
    --snapshots) mapfile -t COMPREPLY < <(compgen -d -- "$word") && return ;;
    --restore) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --clock-resume) mapfile -t COMPREPLY < <(compgen -W 'continue catch-up' -- "$word") && return ;;
    --cpu) mapfile -t COMPREPLY < <(compgen -W 'auto kvm native soft' -- "$word") && return ;;
    --clock) mapfile -t COMPREPLY < <(true) && return ;;
    --instructions) mapfile -t COMPREPLY < <(true) && return ;;
    --sandbox) mapfile -t COMPREPLY < <(compgen -W 'on require off' -- "$word") && return ;;
    --user) mapfile -t COMPREPLY < <(true) && return ;;
    --engine) mapfile -t COMPREPLY < <(compgen -W 'c python' -- "$word") && return ;;
    --report) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --trace) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --record) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --replay) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --pcap) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --pidfile) mapfile -t COMPREPLY < <(compgen -f -- "$word") && return ;;
    --log) mapfile -t COMPREPLY < <(compgen -W 'text json' -- "$word") && return ;;
    esac
    case $word in
    -*)
        case ${COMP_WORDS[1]} in inspect|build|image|trace|ps|stats|snapshot|metrics|help|version) return ;; esac
        mapfile -t COMPREPLY < <(compgen -W '--name --mem --net --block --net-rate --block-rate --console-limit --dumpcore --snapshots --restore --clone --clock-resume --cpu --clock --instructions --x-exec-heap --sandbox --user --hugepages --no-net-ring --net-ring --engine --report --trace --record --replay --gdb --pcap --pidfile --log --verbose --version --help -v -h' -- "$word")
        return
        ;;
    esac
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
    if [ "$COMP_CWORD" -eq 1 ]; then
        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W 'inspect policy build image trace ps stats snapshot metrics demo help version' -- "$word")
    fi
}
complete -F _ptender ptender

# The machine's first process, second half: runs the command in the host's own tree and hands out its status.
# The rule: the status is written last, when every byte of output is with the host; run.py then cuts the power.
set -e
HERE=/run/amdv
PATH=$HERE/bin

# A virtio port by itself cannot be opened twice, so "echo >/dev/stdout" would fail: the command gets pipes.
start_pipes() {
    mkfifo $HERE/stdout $HERE/stderr
    cat $HERE/stdout >"$(echo /dev/vport*p1)" &
    stdout_cat=$!
    cat $HERE/stderr >"$(echo /dev/vport*p2)" &
    stderr_cat=$!
}

# Whatever the command left running would hold the pipes open for ever.
kill_the_rest() {
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case $pid in
        1 | "$stdout_cat" | "$stderr_cat") ;;
        *) kill -9 "$pid" 2>/dev/null || true ;;
        esac
    done
}

hostname amdv
ip link set lo up
start_pipes
status=0
setsid sh $HERE/command </dev/null >$HERE/stdout 2>$HERE/stderr || status=$?
kill_the_rest
wait "$stdout_cat" "$stderr_cat"
sync
echo "$status" >"$(echo /dev/vport*p3)"
sleep 60 # until the power goes; leaving is a panic

# sh -c THIS name SIGNALS GRACE_PERIOD CLEANUP_DIR PROGRAM ARGUMENTS...
#
# Forks a watcher and executes PROGRAM in its own place, so that the owner sees PROGRAM's pid and exit status directly. The
# watcher reads standard input, a pipe that only the owner holds open:
#   a line       the owner has seen PROGRAM end: exit
#   end of file  the owner has ended or dropped the process: send SIGNALS one after the other, each with GRACE_PERIOD
#                tenths of a second to stop, and remove CLEANUP_DIR
signals=$1 grace_period=$2 cleanup_dir=$3
shift 3
exec 3<&0

alive() {
    # `kill -0` succeeds for a zombie until it is reaped.
    kill -0 $$ 2>/dev/null && ! grep -qs '^State:[[:space:]]*Z' "/proc/$$/status"
}

watch() {
    trap '' HUP INT QUIT TERM
    read -r _ && return
    for signal in $signals KILL; do
        # Frozen children of a frozen PROGRAM would outlive it.
        [ "$signal" != KILL ] || kill -s KILL $(cat "/proc/$$/task/$$/children") 2>/dev/null
        kill -s "$signal" $$ 2>/dev/null
        left=$grace_period
        while alive; do
            [ "$left" -gt 0 ] || continue 2
            left=$((left - 1))
            sleep 0.1
        done
        break
    done
    [ -z "$cleanup_dir" ] || rm -rf "$cleanup_dir"
}

# Forked twice, so that the watcher is no child of PROGRAM: Postgres would take it for a crashed backend.
(watch <&3 >/dev/null 2>&1 &)
exec "$@" <&- </dev/null 3<&-

# sh -c THIS name SIGNALS PATIENCE LITTER PROGRAM ARGUMENTS...
#
# Becomes PROGRAM, so that its pid, its exit status and its signals are the owner's to see without detour, and
# leaves a watcher behind. The watcher reads standard input, a pipe that only the owner holds open:
#   a line       the owner has seen the end of PROGRAM itself: nothing is left to do
#   end of file  the owner is gone or has let go: stop PROGRAM with one of SIGNALS after the other, each given
#                PATIENCE tenths of a second, and remove LITTER
signals=$1 patience=$2 litter=$3
shift 3
exec 3<&0

alive() {
    # A zombie answers `kill -0` for as long as nobody reaps it.
    kill -0 $$ 2>/dev/null && ! grep -qs '^State:[[:space:]]*Z' "/proc/$$/status"
}

watch() {
    trap '' HUP INT QUIT TERM
    read -r _ && return
    for signal in $signals KILL; do
        kill -s "$signal" $$ 2>/dev/null
        left=$patience
        while alive; do
            [ "$left" -gt 0 ] || continue 2
            left=$((left - 1))
            sleep 0.1
        done
        break
    done
    [ -z "$litter" ] || rm -rf "$litter"
}

# Forked twice, for PROGRAM must not meet a child that it did not start: Postgres would take it for a crashed backend.
(watch <&3 >/dev/null 2>&1 &)
exec "$@" <&- </dev/null 3<&-

# Runs a Postgres cluster until standard input ends. Arguments: the directory of Postgres's programs, a port, the
# superuser's name, and whether commits wait for the disk (on or off). Answers "done" once the server accepts
# connections, and after each command: "crash" or "start".
programs=$1 port=$2 user=$3 fsync=$4
directory=$(mktemp -d "${TMPDIR:-/tmp}/isobar-postgres.XXXXXX") || exit 1
server=
trap 'stop; rm -rf "$directory"' EXIT
trap 'exit 1' TERM HUP

fail() {
    cat "$directory/log" >&2
    exit 1
}

stop() {
    if [ -n "$server" ]; then
        kill -QUIT "$server" 2>/dev/null
        wait "$server" 2>/dev/null
        server=
    fi
}

start() {
    "$programs/postgres" -D "$directory/data" -k "$directory" -p "$port" \
        -c listen_addresses=127.0.0.1 -c max_connections=200 -c shared_buffers=128MB \
        -c "fsync=$fsync" >>"$directory/log" 2>&1 </dev/null &
    server=$!
    # By the socket in the cluster's own directory: on the port, somebody else might answer.
    until "$programs/pg_isready" -q -h "$directory" -p "$port"; do
        kill -0 "$server" 2>/dev/null || fail
        sleep 0.05
    done
}

"$programs/initdb" -D "$directory/data" --username="$user" --auth=trust --encoding=UTF8 --locale=C --no-sync \
    >"$directory/log" 2>&1 </dev/null || fail
start
echo done
while read -r command; do
    case $command in
    crash) stop ;;
    start) start ;;
    esac
    echo done
done

# Shell functions that the demo, the suites and the benches share. Sourced, never run; needs bash and `set -euo pipefail`.
# Everything that is started is recorded by process id and everything that is mounted by path, and `cleanup` ends both.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${HELIOFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/heliofs}
TOOLS=$CACHE/tools
WEED=$TOOLS/weed/bin/weed
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$REPO/target}
# Cargo resolves a relative path against its working directory, we resolve it against the repository.
[[ $CARGO_TARGET_DIR == /* ]] || CARGO_TARGET_DIR=$REPO/$CARGO_TARGET_DIR
# HELIOFS=PROGRAM runs that one and builds nothing.
GIVEN=${HELIOFS:-}
HELIOFS=${GIVEN:-$CARGO_TARGET_DIR/release/heliofs}

PIDS=()
MOUNTS=()
WORK=

step() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
note() { printf '    %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A scratch directory on disk (not tmpfs: nodes must really sync), removed by cleanup.
make_work() { WORK=$(mktemp -d "${HELIOFS_SCRATCH:-${TMPDIR:-/tmp}}/heliofs-$1.XXXXXX"); }

# Ends what was started, newest first; keeps the logs of a run that failed.
cleanup() {
    local status=$? pid mount_point index
    trap - EXIT INT TERM
    set +e
    for ((index = ${#MOUNTS[@]} - 1; index >= 0; index--)); do
        mount_point=${MOUNTS[index]}
        if mountpoint -q "$mount_point" 2>/dev/null || ! stat "$mount_point" >/dev/null 2>&1; then
            timeout 20 umount "$mount_point" 2>/dev/null || umount -l "$mount_point" 2>/dev/null
        fi
    done
    for ((index = ${#PIDS[@]} - 1; index >= 0; index--)); do kill -TERM "${PIDS[index]}" 2>/dev/null; done
    for pid in "${PIDS[@]}"; do
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    if [[ -n $WORK && -d $WORK ]]; then
        if ((status != 0)); then
            mkdir -p "$CACHE/failed"
            local kept="$CACHE/failed/$(basename "$WORK").tar.gz"
            (cd "$WORK" && find . -name '*.log' -print0 | tar czf "$kept" --null -T -) && note "logs of the failed run: $kept"
        fi
        rm -rf --one-file-system "$WORK"
    fi
    exit "$status"
}

cleanup_always() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# start NAME COMMAND…: in the background, logged to $WORK/NAME.log; its process id is in $STARTED.
start() {
    local name=$1
    shift
    "$@" >>"$WORK/$name.log" 2>&1 </dev/null &
    STARTED=$!
    PIDS+=("$STARTED")
}

# Forgets a process that was ended on purpose.
forget() {
    local kept=() pid
    for pid in "${PIDS[@]}"; do [[ $pid == "$1" ]] || kept+=("$pid"); done
    PIDS=("${kept[@]}")
}

# Ports that were free a moment ago, one a line; all are held while they are chosen, so none comes twice.
free_ports() {
    python3 - "$1" <<'PY'
import socket, sys
held = []
for _ in range(int(sys.argv[1])):
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    held.append(s)
for s in held:
    print(s.getsockname()[1])
PY
}

# wait_for SECONDS WHAT COMMAND…: until the command succeeds.
wait_for() {
    local seconds=$1 what=$2 deadline=$((SECONDS + $1))
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "$what did not happen within $seconds s"
        sleep 0.1
    done
}

now_ms() { echo $(($(date +%s%N) / 1000000)); }

S3_ACCESS=demo-access
S3_SECRET=demo-secret-key

# start_s3 [FLAG…]: a real S3 server with signatures (SeaweedFS). Sets S3_URL. S3_NAME: for another one.
start_s3() {
    local ports name=${S3_NAME:-s3}
    mapfile -t ports < <(free_ports 8)
    mkdir -p "$WORK/$name"
    (umask 077 && cat >"$WORK/$name.json") <<JSON
{"identities":[{"name":"demo","credentials":[{"accessKey":"$S3_ACCESS","secretKey":"$S3_SECRET"}],
 "actions":["Admin","Read","Write","List","Tagging"]}]}
JSON
    start "$name" "$WEED" server -dir="$WORK/$name" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -master.port="${ports[0]}" -master.port.grpc="${ports[1]}" -master.volumeSizeLimitMB=1024 -master.telemetry=false \
        -volume.port="${ports[2]}" -volume.port.grpc="${ports[3]}" -volume.max=100 \
        -filer -filer.port="${ports[4]}" -filer.port.grpc="${ports[5]}" \
        -s3 -s3.port="${ports[6]}" -s3.port.grpc="${ports[7]}" -s3.config="$WORK/$name.json" \
        -s3.port.iceberg=0 -s3.port.lance=0 "$@"
    S3_URL=http://127.0.0.1:${ports[6]}
    wait_for 60 "the S3 server's start" s3_answers
}

# Any HTTP status means that it listens and checks signatures.
s3_answers() { [[ $(curl -s -o /dev/null -w '%{http_code}' "$S3_URL/") != 000 ]]; }

# Three metadata nodes with directories of their own. Sets META_URL, NODE_PORT[1..3], NODE_PID[1..3]. REGION: a prefix of their
# names, for another cluster with the same token.
start_cluster() {
    local ports id
    mapfile -t ports < <(free_ports 3)
    NODE_PORT=(- "${ports[@]}")
    NODE_PID=(-)
    META_URL=helio://127.0.0.1:${ports[0]},127.0.0.1:${ports[1]},127.0.0.1:${ports[2]}
    [[ -e $WORK/token ]] || (umask 077 && head -c 24 /dev/urandom | base64 >"$WORK/token")
    export HELIOFS_TOKEN_FILE=$WORK/token
    for id in 1 2 3; do start_node "$id"; done
    "$HELIOFS" raft init "helio://127.0.0.1:${ports[0]}"
    "$HELIOFS" raft add "$META_URL" 2 "127.0.0.1:${ports[1]}"
    "$HELIOFS" raft add "$META_URL" 3 "127.0.0.1:${ports[2]}"
    wait_for 30 "the election of a leader" leader
}

start_node() {
    local id=$1
    # HELIOFS_META_FLAGS: for trying settings out.
    # shellcheck disable=SC2086
    start "${REGION:-}node-$id" "$HELIOFS" meta --id "$id" --data-dir "$WORK/${REGION:-}node-$id" --listen "127.0.0.1:${NODE_PORT[id]}" \
        ${HELIOFS_META_FLAGS:-}
    NODE_PID[id]=$STARTED
    wait_for 60 "node $id's start" node_answers "$id"
}

node_answers() { kill -0 "${NODE_PID[$1]}" && "$HELIOFS" raft status "helio://127.0.0.1:${NODE_PORT[$1]}"; }

# Prints the leader's node id; fails while there is none.
leader() {
    local id
    id=$("$HELIOFS" raft status "$META_URL" --json 2>/dev/null | python3 -c '
import json, sys
print(json.load(sys.stdin).get("leader") or 0)') || return 1
    [[ $id != 0 ]] && echo "$id"
}

# mount_volume NAME DIRECTORY CACHE [FLAG…]: in the foreground of a recorded process ($MOUNT_PID), so that cleanup can end it
# even when an umount hangs.
mount_volume() {
    local name=$1 mount_point=$2 cache=$3
    shift 3
    mkdir -p "$mount_point"
    MOUNTS+=("$mount_point")
    start "mount-$(basename "$mount_point")" "$HELIOFS" mount "$META_URL" "$name" "$mount_point" --cache-dir "$cache" "$@"
    MOUNT_PID=$STARTED
    local deadline=$((SECONDS + 60))
    until mountpoint -q "$mount_point"; do
        kill -0 "$MOUNT_PID" 2>/dev/null || {
            tail -5 "$WORK/mount-$(basename "$mount_point").log" >&2
            fail "the mount of $name at $mount_point failed"
        }
        ((SECONDS < deadline)) || fail "$mount_point was not mounted within 60 s"
        sleep 0.05
    done
}

# unmount_volume DIRECTORY PID: returns when the process that served it is gone, hence everything is stored.
unmount_volume() {
    "$HELIOFS" umount "$1"
    local deadline=$((SECONDS + 60))
    while kill -0 "$2" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "the mount process $2 did not end within 60 s after umount"
        sleep 0.05
    done
    wait "$2" || fail "the mount process $2 ended with status $?"
    forget "$2"
}

# start_redis_juicefs PORT: a Redis that syncs every write, and a JuiceFS volume `bench` in it. Sets REDIS_URL, JUICEFS.
start_redis_juicefs() {
    mkdir "$WORK/redis"
    start redis redis-server --bind 127.0.0.1 --port "$1" --dir "$WORK/redis" --appendonly yes --appendfsync always --save ""
    REDIS_URL=redis://127.0.0.1:$1/1
    JUICEFS=$TOOLS/juicefs/bin/juicefs
    wait_for 20 "Redis' start" redis-cli -p "$1" ping
    "$JUICEFS" format --storage s3 --bucket "$S3_URL/juicefs" --access-key "$S3_ACCESS" --secret-key "$S3_SECRET" --trash-days 0 \
        "$REDIS_URL" bench >"$WORK/juicefs-format.log" 2>&1 || { tail -5 "$WORK/juicefs-format.log" >&2; fail "juicefs format failed"; }
}

# mount_juicefs DIRECTORY CACHE [FLAG…]. Sets JUICEFS_PID.
mount_juicefs() {
    local directory=$1 cache=$2
    shift 2
    mkdir -p "$directory"
    MOUNTS+=("$directory")
    start "mount-$(basename "$directory")" "$JUICEFS" mount --no-usage-report --cache-dir "$cache" --log "$WORK/juicefs-mount.log" "$@" \
        "$REDIS_URL" "$directory"
    JUICEFS_PID=$STARTED
    wait_for 30 "JuiceFS' mount" mountpoint -q "$directory"
}

umount_juicefs() {
    umount "$1"
    wait "$JUICEFS_PID" || true
    forget "$JUICEFS_PID"
}

build() {
    [[ -z $GIVEN ]] || return 0
    (cd "$REPO" && cargo build --release --locked --workspace --bins)
    [[ -x $HELIOFS ]] || fail "the build left no $HELIOFS"
}

#!/usr/bin/env bash
# Run a real Slurm on this machine, with all its files in one folder: for the tests, and to try a sweep before it goes
# to a cluster.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/local_slurm.sh start|stop DIR

  start DIR   start munged, slurmctld and slurmd, and print what a shell needs to use them:
              eval "$(scripts/local_slurm.sh start DIR)"
  stop DIR    end all jobs and the three daemons

DIR has the configuration, state, logs and sockets; you can remove it after stop. The node has the cores of the machine, at
least four, and two GPUs that only have names (--gres=gpu:1). Jobs start at once, requeued ones after five seconds. As on some
clusters, there is no accounting, so sacct shows nothing.

Needs root, and Debian's or Ubuntu's packages slurm-wlm and munge.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Succeed if the process that wrote a pid file still runs.
runs() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

free_port() {
    local port=$((RANDOM % 20000 + 20000))
    while (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

check() {
    [[ $(id -u) -eq 0 ]] || fail "Slurm's daemons need root here; run this as root"
    local name
    for name in munged mungekey slurmctld slurmd sbatch srun; do
        [[ -n $(type -P "$name") ]] ||
            fail "$name is not installed; as root: apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge"
    done
}

write_conf() {
    local dir=$1 host cores
    host=$(hostname -s)
    cores=$(nproc --all)
    [[ $cores -ge 4 ]] || cores=4
    # A requeued job waits until its credential expires, by default after two minutes. Five seconds is the minimum.
    cat >"$dir/slurm.conf" <<CONF
ClusterName=famba
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=30
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    # Slurm needs devices; these exist everywhere.
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
}

start() {
    local dir=$1
    check
    [[ ${#dir} -le 80 ]] || fail "$dir is too long for the path of a socket; choose one of at most 80 characters"
    ! runs "$dir/slurmctld.pid" || fail "a Slurm already runs in $dir; scripts/local_slurm.sh stop $dir ends it"
    mkdir -p "$dir/state" "$dir/spool"
    [[ -f $dir/munge.key ]] || mungekey --create --keyfile="$dir/munge.key"
    write_conf "$dir"
    # --force, because only root needs to reach the socket.
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" >&2
    # Every process of a job has this in its environment, so stop finds it.
    export SLURM_CONF=$dir/slurm.conf
    # Do not continue the jobs of an earlier start.
    slurmctld -c -f "$SLURM_CONF" >&2
    slurmd -c -f "$SLURM_CONF" >&2
    local try
    for try in {1..100}; do
        if [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]]; then
            echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"
            return
        fi
        sleep 0.2
    done
    tail -n 5 "$dir"/*.log >&2
    stop "$dir"
    fail "Slurm's node was not ready after $((try / 5)) seconds; the ends of the logs are above"
}

stop() {
    local dir=$1 name pid
    if runs "$dir/slurmctld.pid"; then
        export SLURM_CONF=$dir/slurm.conf
        scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
        scancel --user="$(id -un)" 2>/dev/null || true
        for _ in {1..50}; do
            [[ -n $(squeue --noheader 2>/dev/null) ]] || break
            sleep 0.2
        done
    fi
    for name in slurmctld slurmd munged; do
        runs "$dir/$name.pid" || continue
        pid=$(cat "$dir/$name.pid")
        kill "$pid"
        for _ in {1..100}; do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -KILL "$pid"
    done
    # Processes that slurmd left would wait for it for ever.
    for pid in $(pgrep -x slurmstepd); do
        if tr '\0' '\n' <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$dir/slurm.conf"; then
            kill -KILL "$pid"
        fi
    done
}

case ${1-} in
start | stop) [[ $# -eq 2 ]] || { usage >&2; exit 2; } ;;
*) usage >&2; exit 2 ;;
esac
"$1" "$(realpath -m "$2")"

#!/usr/bin/env bash
# A real SLURM on one machine (Debian's packages) for tests and laptops: no systemd, nothing under /etc.
#   slurm_box.sh install   install what is missing with apt-get: the only step that needs root
#   slurm_box.sh up        start munged, mariadbd, slurmdbd, slurmctld and slurmd; prints what `env` does
#   slurm_box.sh env       the export that a client needs: eval "$(tools/slurm_box.sh env)"
#   slurm_box.sh status    which of them run
#   slurm_box.sh down      end exactly the processes that `up` started
# Every daemon listens on 127.0.0.1 only and runs as the user who calls. Each command may be given again.
# Settings: SLURM_BOX (folder, default /var/tmp/slurm-box-<user>), SLURM_BOX_CPUS (default this machine's, and at
# least 2), SLURM_BOX_GPUS (default 4) and SLURM_BOX_MEMORY_MB, which the node advertises whether they are there
# or not, SLURM_BOX_PORT (first of three), SLURM_BOX_MAX_ARRAY (one more than the jobs of the largest array),
# SLURM_BOX_PROLOG (what the node runs before each job; default nothing).
set -euo pipefail

BOX=${SLURM_BOX:-/var/tmp/slurm-box-$(id -un)}
ONLINE=$(getconf _NPROCESSORS_ONLN)
CPUS=${SLURM_BOX_CPUS:-$((ONLINE > 2 ? ONLINE : 2))}
GPUS=${SLURM_BOX_GPUS:-4}
MEMORY=${SLURM_BOX_MEMORY_MB:-64000}
PORT=${SLURM_BOX_PORT:-36817}
MAX_ARRAY=${SLURM_BOX_MAX_ARRAY:-1001}
HOST=$(hostname -s)
ME=$(id -un)
PACKAGES=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core)
APT_LOCK=/var/tmp/dp-lora-apt.lock # that of tests/builders/packages.py too
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$BOX/slurm.conf

say() { echo "slurm-box: $*" >&2; }

die() {
  say "$1"
  tail -qn 5 "$BOX"/log/*.log 2>/dev/null >&2 || true
  exit 1
}

launch() { # launch NAME ARGUMENTS...: a daemon that returns once it is in the background
  "$@" 2>>"$BOX/log/$1.err" || die "$1 does not start: $(tail -n 1 "$BOX/log/$1.err")"
}

alive() { # alive NAME: the recorded process runs and is that program of this box
  local pid
  pid=$(cat "$BOX/run/$1.pid" 2>/dev/null) || return 1
  [ -n "$pid" ] && grep -qa "$1" "/proc/$pid/cmdline" 2>/dev/null
}

wait_for() { # wait_for SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}

node_is_up() { sinfo -h -o %T | grep -qE '^(idle|mixed|allocated)'; }
queue_is_empty() { [ -z "$(squeue -h)" ]; }
socket_answers() { mariadb --no-defaults -S "$BOX/run/mysql.sock" -uroot -e "$1"; }

only_loopback() { # none of the three ports is open on any other address than 127.0.0.1
  local port
  for port in "$PORT" $((PORT + 1)) $((PORT + 2)); do
    if awk -v port="$(printf ':%04X' "$port")" '
      $4 == "0A" && substr($2, length($2) - 4) == port && $2 !~ /^0100007F:/ { open = 1 } END { exit !open }
    ' /proc/net/tcp /proc/net/tcp6 2>/dev/null; then return 1; fi
  done
}

find_missing() { # sets `missing` to the packages that are not installed
  local package
  missing=()
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
}

apt() { # apt WORDS...: apt-get, which waits for the locks of others
  DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -o DPkg::Lock::Timeout=300 -qq "$@"
}

cmd_install() {
  local missing policy=/usr/sbin/policy-rc.d status=1 attempt
  find_missing
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || die "not installed: ${missing[*]}; as root: apt-get install ${missing[*]}"
  # One at a time: of two apt-get at once the second gives up. The first may have done the work of both.
  exec 9>"$APT_LOCK"
  flock 9
  find_missing
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  # Without it the packages would start daemons of their own.
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  mkdir -p "$BOX"
  for attempt in 1 2 3 4 5; do
    status=0
    { apt update && apt install -y --no-install-recommends "${missing[@]}"; } >"$BOX/apt.log" 2>&1 9>&- || status=$?
    [ "$status" != 0 ] && grep -qE 'Could not get lock|Unable to (lock|acquire)' "$BOX/apt.log" || break
    sleep $((attempt * 5))
  done
  [ "$status" = 0 ] || { tail -n 5 "$BOX/apt.log" >&2; die "apt-get could not install ${missing[*]}"; }
}

write_settings() {
  mkdir -p "$BOX"/{run,log,state,spool,munge,dev,tmp}
  chmod 700 "$BOX" "$BOX/munge"
  local i
  for ((i = 0; i < GPUS; i++)); do # slurmd only looks whether they are there
    [ -e "$BOX/dev/nvidia$i" ] || mknod "$BOX/dev/nvidia$i" c 1 3 2>/dev/null || : >"$BOX/dev/nvidia$i"
  done
  : >"$BOX/gres.conf"
  local gres=
  if [ "$GPUS" -gt 0 ]; then
    gres="Gres=gpu:$GPUS"
    echo "NodeName=$HOST Name=gpu File=$BOX/dev/nvidia[0-$((GPUS - 1))]" >"$BOX/gres.conf"
    [ "$GPUS" -gt 1 ] || echo "NodeName=$HOST Name=gpu File=$BOX/dev/nvidia0" >"$BOX/gres.conf"
  fi
  cat >"$SLURM_CONF" <<CONF
ClusterName=box
# Numbers of jobs never come twice, whatever was removed in between.
FirstJobId=$(($(date +%s) % 1000000 + 1))
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
# A job that is queued again waits for its old credential to expire: 121 s by default.
AuthInfo=socket=$BOX/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$BOX/state
SlurmdSpoolDir=$BOX/spool
SlurmctldPidFile=$BOX/run/slurmctld.pid
SlurmdPidFile=$BOX/run/slurmd.pid
SlurmctldLogFile=$BOX/log/slurmctld.log
SlurmdLogFile=$BOX/log/slurmd.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Memory is watched, and a job that takes more than it asked for is ended.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SwitchType=switch/none
MpiDefault=none
ReturnToService=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=200000,requeue_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
MaxArraySize=$MAX_ARRAY
KillWait=3
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
BatchStartTimeout=30
SlurmdParameters=config_overrides
${SLURM_BOX_PROLOG:+Prolog=$SLURM_BOX_PROLOG}
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$BOX/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEMORY $gres State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=$HOST Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  cat >"$BOX/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$BOX/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 2))
CommunicationParameters=NoInAddrAny
SlurmUser=$ME
PidFile=$BOX/run/slurmdbd.pid
LogFile=$BOX/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_box
CONF
  chmod 600 "$BOX/slurmdbd.conf"
}

start_munged() {
  if [ ! -s "$BOX/munge/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom >"$BOX/munge/munge.key")
  fi
  rm -f "$BOX/run/munge.socket"*
  launch munged --force --key-file="$BOX/munge/munge.key" --socket="$BOX/run/munge.socket" --num-threads=2 \
    --pid-file="$BOX/run/munged.pid" --log-file="$BOX/log/munged.log" --seed-file="$BOX/munge/munge.seed"
  wait_for 10 test -S "$BOX/run/munge.socket" || die "munged does not answer"
}

start_mariadbd() {
  # A MariaDB that starts removes every temporary table of its folder: in /tmp, those of any other one too.
  local -x TMPDIR=$BOX/tmp
  if [ ! -d "$BOX/mysql/mysql" ]; then
    rm -rf "$BOX/mysql" "$BOX/mysql.new"
    mkdir "$BOX/mysql.new"
    mariadb-install-db --no-defaults --user="$ME" --datadir="$BOX/mysql.new" --skip-test-db --skip-name-resolve \
      --auth-root-authentication-method=normal >"$BOX/log/mariadb-install.log" 2>&1 ||
      die "mariadb-install-db failed: $(grep -m 2 ERROR "$BOX/log/mariadb-install.log" | tr '\n' ' ')"
    mv "$BOX/mysql.new" "$BOX/mysql"
  fi
  setsid mariadbd --no-defaults --user="$ME" --datadir="$BOX/mysql" --socket="$BOX/run/mysql.sock" \
    --skip-networking --pid-file="$BOX/run/mariadbd.pid" --innodb-buffer-pool-size=64M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF \
    >"$BOX/log/mariadbd.log" 2>&1 </dev/null &
  wait_for 30 socket_answers "select 1" || die "mariadbd does not answer"
  socket_answers 'create database if not exists slurm_box'
}

start_slurmdbd() {
  rm -f "$BOX/run/slurmdbd.pid"
  # slurmdbd.conf has no setting for the socket of the database.
  SLURM_CONF=$BOX/slurmdbd.conf MYSQL_UNIX_PORT="$BOX/run/mysql.sock" launch slurmdbd
  wait_for 30 sacctmgr -n show cluster || die "slurmdbd does not answer"
  sacctmgr -n show cluster box format=cluster | grep -q box && return 0
  { sacctmgr -i add cluster box && sacctmgr -i add account lab cluster=box &&
    sacctmgr -i add user "$ME" cluster=box account=lab; } >>"$BOX/log/sacctmgr.log" || die "sacctmgr refuses"
}

start_slurmctld() {
  rm -f "$BOX/run/slurmctld.pid"
  launch slurmctld -f "$SLURM_CONF"
  wait_for 20 scontrol ping || die "slurmctld does not answer"
}

start_slurmd() {
  rm -f "$BOX/run/slurmd.pid"
  launch slurmd -f "$SLURM_CONF"
}

cmd_up() {
  local name
  for name in munged mariadbd slurmdbd slurmctld slurmd sbatch; do
    command -v $name >/dev/null || die "no $name here: $0 install"
  done
  alive slurmctld || write_settings
  for name in munged mariadbd slurmdbd slurmctld slurmd; do
    alive $name || start_$name
  done
  only_loopback || { cmd_down; die "a daemon listened on another address than 127.0.0.1; all are ended"; }
  # It may be down or drained since an earlier life, which only somebody's word ends.
  wait_for 5 node_is_up || scontrol update "nodename=$HOST" state=resume 2>/dev/null || true
  wait_for 30 node_is_up || die "the node does not come up"
  cmd_env
}

cmd_env() { echo "export SLURM_CONF=$SLURM_CONF"; }

cmd_status() {
  local name
  for name in munged mariadbd slurmdbd slurmctld slurmd; do
    if alive $name; then echo "$name runs, process $(cat "$BOX/run/$name.pid")"; else echo "$name is down"; fi
  done
}

cmd_down() {
  local group name pid
  if alive slurmctld; then
    scancel -u "$ME" 2>/dev/null || true
    wait_for 8 queue_is_empty || true
  fi
  for group in "slurmd slurmctld slurmdbd" "mariadbd munged"; do # each group at once: they take seconds to end
    for name in $group; do
      if alive "$name"; then kill "$(cat "$BOX/run/$name.pid")" || true; fi
    done
    for name in $group; do
      pid=$(cat "$BOX/run/$name.pid" 2>/dev/null) || continue
      wait_for 15 bash -c "! [ -d /proc/$pid ]" || { alive "$name" && kill -9 "$pid"; } || true
      rm -f "$BOX/run/$name.pid"
    done
  done
  # A daemon that was starting or ending a job may have left a process of it; all have this environment.
  for pid in $(grep -lzxF -- "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3); do
    if grep -qsE '^slurm(d|stepd|ctld)$' "/proc/$pid/comm"; then kill -9 "$pid" 2>/dev/null || true; fi
  done
  say "down"
}

case "${1:-}" in
  install | up | env | status | down) "cmd_$1" ;;
  *)
    sed -n 2,12p "$0"
    exit 2
    ;;
esac

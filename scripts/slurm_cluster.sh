#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, for tests: slurm_cluster.sh up|down DIR. As root, with Debian's slurmctld,
# slurmd, slurm-client and munge. All of it lives in DIR; clients need SLURM_CONF=DIR/slurm.conf. Nothing of the
# system's own Slurm or munge is touched, and neither cgroups nor systemd are needed.
# Partition main is preempted by partition urgent: its jobs go back to the queue.
set -eu
what=$1
D=$(realpath -m "$2")
export SLURM_CONF=$D/slurm.conf
socket=$D/munge/socket

up() {
  mkdir -p "$D"/{state,spool.n1,spool.n2,log,munge}
  chmod 755 "$D"
  chmod 700 "$D/munge"
  host=$(hostname -s)
  # shellcheck disable=SC2046
  set -- $(python3 -c '
import socket
held = [socket.socket() for _ in range(3)]
for one in held: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))')
  # cred_expire: a job that was put back waits this long and a little before it may start again (usually 120 s).
  # config_overrides: a node has the CPUs that are written here, whatever the machine has.
  cat > "$SLURM_CONF" <<CONF
ClusterName=moetrain
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$1
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
InactiveLimit=0
KillWait=20
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$2 CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$3 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=20 PreemptMode=OFF
CONF
  dd if=/dev/urandom of="$D/munge/key" bs=1024 count=1 status=none
  chmod 600 "$D/munge/key"
  munged --force --socket="$socket" --key-file="$D/munge/key" --pid-file="$D/munge/pid" \
    --log-file="$D/munge/log" --seed-file="$D/munge/seed"
  slurmctld -c -f "$SLURM_CONF"
  slurmd -N n1 -f "$SLURM_CONF"
  slurmd -N n2 -f "$SLURM_CONF"
  for _ in $(seq 300); do
    if [ "$(sinfo -h -p main -o '%D %T' 2>/dev/null)" = "2 idle" ]; then exit 0; fi
    sleep 0.1
  done
  sinfo -N -l || true
  tail -n 20 "$D"/log/* "$D/munge/log"
  exit 1
}

down() {
  pids=$(cat "$D"/slurmctld.pid "$D"/slurmd.*.pid 2>/dev/null || true)
  scancel --user=root 2>/dev/null || true
  for _ in $(seq 300); do
    [ -n "$(squeue -h 2>/dev/null)" ] || break
    sleep 0.1
  done
  scontrol shutdown 2>/dev/null || true # of slurmctld and every slurmd
  for pid in $pids; do
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
  [ ! -s "$D/munge/pid" ] || kill "$(cat "$D/munge/pid")" 2>/dev/null || true
}

case $what in
  up) up ;;
  down) down ;;
  *) echo "usage: slurm_cluster.sh up|down DIR" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# What 'make slurm-test' runs: launch, preempt, requeue and cancel on a real Slurm, two nodes on this machine.
# slurm_test.sh PYTHON. Installs Debian's packages where it can; where it cannot, says so in one line and ends well.
set -eu
cd "$(dirname "$0")/.."
skip() { echo "slurm-test: skipped: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "the daemons of the test cluster run as root"
if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
  command -v apt-get > /dev/null || skip "there is no slurmctld here, and no apt-get to install it"
  echo "slurm-test: installing slurmctld, slurmd, slurm-client and munge"
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } \
    > /tmp/slurm-test-install.log 2>&1 || skip "Slurm cannot be installed: $(tail -n 1 /tmp/slurm-test-install.log)"
fi
exec "$1" -m pytest tests/launch/test_slurm_cluster.py
